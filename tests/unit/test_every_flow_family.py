"""What all families do alike that match flows: fewer bits, recomputation, merged models, and what other families are
trained with."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from dreambooth_sm.families import FAMILIES
from dreambooth_sm.models import PretrainedModel, load_base
from dreambooth_sm.sampling import draw_latents
from tests.helpers.training import Run, hyperparameters, make_subject

pytestmark = pytest.mark.slow


@pytest.fixture(params=[name for name, family in FAMILIES.items() if family.facts.matches_flow])
def model(request: pytest.FixtureRequest) -> PretrainedModel:
    """A tiny one of each family, the test's own."""
    return copy.deepcopy(request.getfixturevalue(f"loaded_{request.param}"))


def train(base: PretrainedModel, root: Path, **values: object) -> Run:
    usual = {"method": "lora", "base_architecture": base.family.facts.name, "learning_rate": 1e-2, "max_train_steps": 2}
    return Run(base, root, **{**usual, **values}).train()


def test_recomputed_gradients_are_the_same(model: PretrainedModel, tmp_path: Path) -> None:
    """Of Chroma, diffusers' own transformer forgets the mask in single blocks then."""
    values = {"learning_rate": 1e-3, "with_prior_preservation": True}
    kept = train(model, tmp_path / "kept", **values)
    again = train(model, tmp_path / "again", gradient_checkpointing=True, **values)
    assert kept.losses == again.losses
    for name, value in kept.trainable.parameters.items():
        assert torch.equal(value, again.trainable.parameters[name]), name


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_trains_beside_fewer_bits(model: PretrainedModel, tmp_path: Path, bits: str) -> None:
    run = train(model, tmp_path, base_weights=bits)
    plain = train(model, tmp_path / "plain")
    assert run.losses[0] == pytest.approx(plain.losses[0], rel=0.05)
    assert run.losses[0] != plain.losses[0]


@pytest.mark.parametrize(
    "values",
    [
        {"with_prior_preservation": True, "prior": "output"},
        {"prior": "dco", "class_prompt": "photo of a toy"},
        {"lora_targets": "linear", "lora_dropout": 0.1, "lora_min_rank": 4, "distance_penalty": 0.1},
        {"time_sampling": "logit_normal", "time_shift": "resolution", "loss": "huber", "noise_offset": 0.05},
        {"caption_dropout": 0.5, "center_crop": False, "gradient_accumulation_steps": 2},
    ],
    ids=["prior=output", "prior=dco", "ranks", "times", "captions"],
)
def test_what_serves_other_families_serves_them(
    model: PretrainedModel, tmp_path: Path, values: dict[str, object]
) -> None:
    run = train(model, tmp_path, **values)
    assert all(math.isfinite(value) for losses in run.losses for value in losses)


def test_what_lies_outside_of_masks_weighs_less(model: PretrainedModel, tmp_path: Path) -> None:
    """In losses, by latents; where it weighs as much, masks have no part."""
    subject = make_subject(tmp_path, pictures=3)
    for picture in subject.pictures:
        with Image.open(picture) as opened:
            mask = Image.new("L", opened.size)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save(picture.with_name(f"{picture.stem}-mask.png"))
    plain, whole, half = (
        train(model, tmp_path / str(weight), subject=subject, background_weight=weight) for weight in (None, 1.0, 0.1)
    )
    assert plain.losses == whole.losses
    assert half.losses[0] != whole.losses[0]
    assert half.losses[0] == pytest.approx(whole.losses[0], rel=0.3)


def test_a_merged_model_is_a_directory_that_diffusers_reads(model: PretrainedModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"size": (64, 64), "steps": 2, "guidance": 2.0}
    (before,) = draw_latents(model.pipeline(), "toy", [1], **options)
    run = train(model, tmp_path / "run", export="merged")
    (trained,) = draw_latents(run.base.pipeline(), "toy", [1], **options)
    run.trainable.export(tmp_path / "model", run.h, torch.float32)
    read = load_base(hyperparameters(pretrained_model_name_or_path=str(tmp_path / "model"), method="lora"))
    theirs = getattr(diffusers, model.family.facts.pipeline).from_pretrained(tmp_path / "model")
    assert not torch.allclose(trained, before, atol=1e-3)
    for pipeline in (read.pipeline(), theirs):
        (made,) = draw_latents(pipeline, "toy", [1], **options)
        assert torch.allclose(made, trained, atol=1e-5)
