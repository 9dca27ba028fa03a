"""Weights that a model's library keeps in float32 stay there, whoever reads, copies, places or writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from transformers import T5Config, T5EncoderModel

from dreambooth_sm.models import PretrainedModel, open_base
from dreambooth_sm.sampling import drawing_part
from dreambooth_sm.stored.kept_in_fp32 import cast, is_cast
from tests.helpers.marks import slow_except
from tests.helpers.training import Run, hyperparameters

CPU = torch.device("cpu")


class Keeping(ModelMixin, ConfigMixin):  # type: ignore[misc]
    _keep_in_fp32_modules = ["norm"]  # noqa: RUF012 - as diffusers has them

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.normal = nn.LayerNorm(4), nn.LayerNorm(4)


def dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in module.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_they_have_the_values_that_they_had(dtype: torch.dtype) -> None:
    module = Keeping()
    exact = torch.full((4,), 1 + 2**-20)
    module.norm.weight.data = exact.clone()
    assert not is_cast(module, CPU, dtype)
    cast(module, CPU, dtype)
    assert torch.equal(module.norm.weight, exact)
    assert dtypes(module) == {
        **dict.fromkeys(("norm.weight", "norm.bias"), torch.float32),
        **dict.fromkeys(("normal.weight", "normal.bias"), dtype),
    }
    assert is_cast(module, CPU, dtype)
    assert not is_cast(module, CPU, torch.float32)
    cast(module, CPU, torch.float64)
    assert set(dtypes(module).values()) == {torch.float64}


def test_transformers_keeps_some_in_float16_alone() -> None:
    """T5's outputs of feed-forward layers overflow there."""
    for dtype, others in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        module = T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
        cast(module, CPU, dtype)
        assert {kind for name, kind in dtypes(module).items() if ".wo." in name} == {others}
        assert {kind for name, kind in dtypes(module).items() if ".wo." not in name} == {dtype}


@pytest.mark.parametrize("bits", slow_except(["plain"], ["plain", "int8"]))
def test_a_model_is_trained_and_drawn_with_beside_them(
    bits: str, tiny_krea2: Path, loaded_krea2: PretrainedModel, tmp_path: Path
) -> None:
    """Read from files, quantised or not, placed, and read again for whoever draws."""
    values: dict[str, Any] = {
        "method": "lora",
        "base_architecture": "krea2",
        "max_train_steps": 2,
        "base_weights": bits,
    }
    h = hyperparameters(pretrained_model_name_or_path=str(tiny_krea2), **values)
    plan = {"precision": "bf16", "weights": "master"}
    run = Run(open_base(h, None), tmp_path / "half", plan=plan, **values).train()
    whole = Run(loaded_krea2, tmp_path / "whole", **values).train()
    drawn = drawing_part(open_base(h, None), run.plan, "transformer")
    cast(drawn, CPU, torch.bfloat16)
    for module in (run.base.transformer, drawn):
        frozen = {name: kind for name, kind in dtypes(module).items() if ".lora_" not in name and "codes" not in name}
        assert {kind for name, kind in frozen.items() if "norm" in name} == {torch.float32}
        assert {kind for name, kind in frozen.items() if "norm" not in name} == {torch.bfloat16}
    for ours, theirs in zip(run.losses, whole.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=0.03)
