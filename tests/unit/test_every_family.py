"""Every family with every method: what is promised of all of them. A new file is tested by being there."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from dreambooth_sm.errors import StopRequested, UserError
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS, hypernetwork
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.cards import CARDS
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.training.checkpoint import latest_checkpoint
from tests.helpers.marks import slow_except
from tests.helpers.training import Run, same


def read_hypernetwork(exported: Path, base: Any) -> Any:
    (file,) = exported.glob("*.safetensors")
    hypernetwork.apply(base, file)
    return base


def read_lora(exported: Path, base: Any) -> Any:
    base.load_lora_weights(str(exported))
    return base


def read_by_card(exported: Path, base: Any, method: str) -> Any:
    """By the lines of its model card."""
    values = Hyperparameters.parse({**PROMPTS, "method": method}).model_dump(mode="json")
    text = METHODS[method].usage(type(base).__name__, "base", PROMPTS["instance_prompt"], values)
    lines = text.split("```python\n")[1].split("```")[0].splitlines()
    names = {"pipeline": base, "load_file": load_file}
    with contextlib.chdir(exported):
        exec("\n".join(line for line in lines if line.startswith(("pipeline.", "vectors"))), names)
    return base


PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
# A tiny model of the family's true classes.
BASES = {
    "sd": "loaded_base",
    "sdxl": "loaded_xl_base",
    "z_image": "loaded_z_image",
    "flux2": "loaded_flux2",
    "flux1": "loaded_flux1",
    "qwen_image": "loaded_qwen_image",
    "chroma": "loaded_chroma",
    "sd3": "loaded_sd3",
    "krea2": "loaded_krea2",
}
# What is exported, read as its users read it, beside the base model where it needs that.
READERS: dict[str, Callable[[Path, Any], Any]] = {
    "full": lambda exported, base: DiffusionPipeline.from_pretrained(exported),
    "hypernetwork": read_hypernetwork,
    "lora": read_lora,
    "textual_inversion": lambda exported, base: read_by_card(exported, base, "textual_inversion"),
    "pivotal": lambda exported, base: read_by_card(exported, base, "pivotal"),
}
ALL = [(name, method) for name, family in FAMILIES.items() for method in family.facts.methods]
# One a family.
QUICK = [
    ("sd", "full"),
    ("sdxl", "textual_inversion"),
    ("z_image", "lora"),
    ("flux2", "lora"),
    ("flux1", "lora"),
    ("qwen_image", "lora"),
    ("chroma", "lora"),
    ("sd3", "lora"),
    ("krea2", "lora"),
]


@pytest.fixture
def model(request: pytest.FixtureRequest, family: str) -> PretrainedModel:
    found: PretrainedModel = request.getfixturevalue(BASES[family])
    return found


def trained(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.trainable.parameters.items()}


@pytest.mark.parametrize(("family", "method"), ALL)
def test_fits_a_card(family: str, method: str) -> None:
    h = Hyperparameters.parse({**PROMPTS, "base_architecture": family, "method": method})

    def fits(name: str) -> bool:
        try:
            return 0 < make_plan(h, CARDS[name]).predicted_peak_gb <= CARDS[name].budget_gb
        except UserError:
            return False

    assert any(fits(name) for name in CARDS)


@pytest.mark.parametrize(("family", "method"), slow_except(QUICK, ALL))
def test_trains_resumes_and_exports(family: str, method: str, model: PretrainedModel, tmp_path: Path) -> None:
    values = {**PROMPTS, "base_architecture": family, "method": method, "max_train_steps": 2, "use_ema": True}
    whole = Run(model, tmp_path / "whole", **values)
    base = copy.deepcopy(model).pipeline()
    before = trained(whole)
    after = trained(whole.train())
    assert any(not torch.equal(after[name], before[name]) for name in before)

    with pytest.raises(StopRequested):
        Run(model, tmp_path / "stopped", **values).train(stop_at=1)
    checkpoint = latest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert checkpoint is not None
    assert list(checkpoint.load()["weights"]) == list(before), "the names of parameters are the checkpoint's keys"
    resumed = Run(model, tmp_path / "stopped", **values)
    resumed.trainer.resume(checkpoint)
    assert same(trained(resumed.train()), after)

    exported = tmp_path / "model"
    exported.mkdir()
    whole.trainable.export(exported, whole.h, torch.float32)
    pipeline = READERS[method](exported, base)
    (picture,) = pipeline(prompt="photo of zwx toy", height=64, width=64, num_inference_steps=1).images
    assert picture.size == (64, 64)
