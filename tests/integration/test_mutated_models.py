"""Base models with one thing wrong are refused in one line before anything is drawn, or are trained."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from dreambooth_sm.errors import UserError
from dreambooth_sm.models import check_base, load_base
from dreambooth_sm.sampling import draw
from dreambooth_sm.stored.noise_schedule import training_scheduler
from tests.helpers.mutations import Mutation, mutations
from tests.helpers.training import hyperparameters

TRIED = 24  # of more than a thousand


def outcome(base: Path, mutation: Mutation, copy: Path) -> str:
    """What becomes of a mutated model: its refusal, or nothing where it can be used for all that a job does."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(base, copy)
    mutation(copy)
    h = hyperparameters(pretrained_model_name_or_path=str(copy))
    try:
        check_base(h)
    except UserError as error:
        for line in error.problems:
            assert "\n" not in line
            assert len(line) < 800
        return "; ".join(error.problems)
    model = load_base(h)
    (pictures,) = draw(model.pipeline(), "a toy", [1], resolution=32, steps=2)
    assert pictures[0].size == (32, 32)
    assert len(training_scheduler(model.scheduler).alphas_cumprod) == model.scheduler.config.num_train_timesteps
    for module in model.modules.values():
        assert all(bool(torch.isfinite(value).all()) for value in module.parameters())
    model.save(copy / "saved")
    model.save_single_file(copy / "saved.safetensors")
    return ""


@pytest.mark.parametrize("which", ["tiny_base", "tiny_xl_base"])
def test_a_model_with_one_thing_wrong(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    base: Path = request.getfixturevalue(which)
    tried = random.Random(which).sample(list(mutations(base)), TRIED)
    outcomes = {name: outcome(base, mutation, tmp_path / "copy") for name, mutation in tried}
    assert any(outcomes.values())
    # What is said names the model.
    assert all(str(tmp_path / "copy") in said for said in outcomes.values() if said)
