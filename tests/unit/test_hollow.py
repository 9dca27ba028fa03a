"""Weights of a frozen base model that adapters lie beside: read to where they are computed with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file

from dreambooth_sm.models import PretrainedModel, open_base
from dreambooth_sm.stored import hollow
from dreambooth_sm.training.quantised import is_quantised
from tests.helpers.marks import slow_except
from tests.helpers.training import Run, attach, cpu_plan, hyperparameters, same, weights

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LORA = {"method": "lora", "learning_rate": 1e-2, "max_train_steps": 2, "lora_rank": 4}
WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")


def from_files(path: Path, **values: object) -> tuple[PretrainedModel, dict[str, Any]]:
    named = {**LORA, "pretrained_model_name_or_path": str(path), **values}
    return open_base(hyperparameters(**named)), named


def frozen(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Those of the base model, by their names in it."""
    return {
        name.replace(".base_layer", ""): value for name, value in module.named_parameters() if ".trained." not in name
    }


def held(module: torch.nn.Module) -> int:
    """The bytes of the base model's weights on the CPU."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in frozen(module).values()}
    return sum(storages.values())


@pytest.mark.parametrize("variant", slow_except(["lora"], ["lora", "dora", "loha", "lokr", "oft"]))
def test_training_is_to_the_bit_that_beside_weights_in_memory(
    variant: str, tiny_base: Path, loaded_base: PretrainedModel, tmp_path: Path
) -> None:
    """All that is trained begins with the same values; text encoders are adapted as well."""
    values = {"lora_variant": variant, "train_text_encoder": True, "lora_targets": "all"}
    lazy, named = from_files(tiny_base, **values)
    ours = Run(lazy, tmp_path / "ours", **named).train()
    theirs = Run(loaded_base, tmp_path / "theirs", **named).train()
    assert ours.losses == theirs.losses
    mine, other = ({n: p.detach() for n, p in each.trainable.parameters.items()} for each in (ours, theirs))
    assert same(mine, other)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_holds_no_weight_of_it(stored: torch.dtype, tiny_z_image: Path, tmp_path: Path) -> None:
    """Before there is a device for them, neither for training nor for pictures in between."""
    shutil.copytree(tiny_z_image, tmp_path / "base")
    tensors = {name: value.to(stored) for name, value in load_file(tmp_path / "base" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "base" / WEIGHTS)
    base, named = from_files(tmp_path / "base")
    h = hyperparameters(**named)
    trainable: Any = attach(base, h, cpu_plan(h))
    trainable.load()
    (module,) = trainable._adapted.values()
    assert frozen(module).keys() == tensors.keys()
    assert held(module) <= 4 * len(tensors)
    drawn = trainable.drawable(torch.float32)
    assert held(drawn.model.transformer) <= 4 * len(tensors)
    trainable.place(cpu_plan(h), CPU)
    assert same({name: p.detach() for name, p in frozen(module).items()}, {n: v.float() for n, v in tensors.items()})


def test_whoever_draws_meanwhile_gets_the_same_weights(tiny_z_image: Path, loaded_z_image: PretrainedModel) -> None:
    base, named = from_files(tiny_z_image)
    h = hyperparameters(**named)
    trainable = attach(base, h, cpu_plan(h))
    drawn = trainable.drawable(torch.float32)
    assert base.part("transformer", "cpu", torch.float32) is not base.transformer  # read for whoever draws before
    trainable.place(cpu_plan(h), CPU)
    theirs, ours = frozen(drawn.model.transformer), frozen(base.transformer)
    assert {name: p.data_ptr() for name, p in theirs.items()} == {name: p.data_ptr() for name, p in ours.items()}
    assert same({name: p.detach() for name, p in ours.items()}, weights(loaded_z_image.transformer))


@pytest.mark.slow
def test_a_card_that_is_too_small_while_they_are_read_gets_fewer_bits(
    tiny_z_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, named = from_files(tiny_z_image, gradient_checkpointing=True)
    run = Run(base, tmp_path / "stepped", **named)
    expected = Run(from_files(tiny_z_image)[0], tmp_path / "whole", **named).train()
    read, too_small = hollow.load_tensors, iter([True])

    def failing(*arguments: Any) -> Any:
        if next(too_small, False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return read(*arguments)

    again = attach(open_base(run.h), run.h, run.plan)
    run.trainable, run.base = again, again.model
    monkeypatch.setattr(hollow, "load_tensors", failing)
    log = run.train_as_a_job()
    assert "base_weights=int8" in log
    assert is_quantised(run.base.transformer)
    for ours, theirs in zip(run.losses, expected.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=0.1)


MEASURE = """
import os, resource, sys, torch
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS
from dreambooth_sm.models import open_base
from dreambooth_sm.planning.cards import CPU
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.stored import classes, hollow
import peft

read = hollow.load_tensors

def on_a_card(tensors, dtypes, device):  # reads all, and keeps nothing
    made = read(tensors, dtypes, torch.device("meta"))
    return {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in made.items()}

hollow.load_tensors = on_a_card
values = {"pretrained_model_name_or_path": sys.argv[1], "instance_prompt": "photo of zwx toy", "method": "lora"}
h = Hyperparameters.parse(values)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
if os.fork():  # whose peak begins with what it has
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
trainable = METHODS["lora"].attach(open_base(h, None), make_plan(h, CPU), h, 7)
before = peak()
trainable.load()
trainable.place(make_plan(h, CPU), torch.device("cpu"))
print(peak() - before)
"""


@pytest.mark.slow
def test_the_host_has_room_for_less_than_a_third_of_a_transformer(tiny_z_image: Path, tmp_path: Path) -> None:
    """A process of its own is asked for its peak; its transformer has 0.3 GB, its adapters 3 MB."""
    folder = tmp_path / "base" / "transformer"
    shutil.copytree(tiny_z_image, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text()) | {"dim": 1024, "n_layers": 9, "n_heads": 32}
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in ZImageTransformer2DModel.from_config(config).state_dict().items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, tmp_path / "base" / WEIGHTS
    )
    size = (tmp_path / "base" / WEIGHTS).stat().st_size
    assert size > 2.5e8
    # What is freed is given back at once: otherwise threads keep some of it, however large the model is.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "base")]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert int(found.stdout.split()[-1]) < size / 3
