"""Every Triton kernel compiles for every card, to machine code and within its shared memory; none is needed for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth_sm.training.moments import BLOCK_FORMATS, BlockFormat, DeviceScalars, Moments
from dreambooth_sm.training.quantised import LEVELS, quantise

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.slow

# Of each architecture with kernels: kilobytes of shared memory that a program may have, and its plans' 16-bit type.
CARDS = {
    75: (64, torch.float16),  # T4
    80: (163, torch.bfloat16),  # A100
    86: (99, torch.bfloat16),  # A10G
    89: (99, torch.bfloat16),  # L4, L40S
    90: (227, torch.bfloat16),  # H100, H200
    100: (227, torch.bfloat16),  # B200
    120: (99, torch.bfloat16),  # RTX Pro 6000
}
# Those that all formats of the optimizer are compiled for: the oldest, and the one that figures are measured on.
WHOLE = (75, 90)
CPU = torch.device("cpu")


class Driver:
    """Stands in for a card of an architecture, whose number is the device's as well."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.capability, self._target = capability, GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that were compiled where they would have been launched."""
    found: list[Any] = []
    run = triton.JITFunction.run

    def compile_only(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        found.append(run(kernel, *args, warmup=True, **kwargs))
        return found[-1]

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    return found


@pytest.mark.parametrize("card", CARDS)
def test_kernels_compile(card: int, compiled: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shared_kb, dtype = CARDS[card]
    monkeypatch.setattr(driver, "_active", Driver(card))
    launch_quantised(dtype)
    launch_group_norm(dtype)
    launch_rms_norm(dtype)
    every = [(fmt, residual) for fmt in BLOCK_FORMATS.values() for residual in (True, False)]
    launch_optimizer(dtype, every if card in WHOLE else [(BLOCK_FORMATS[8], True)])
    assert {kernel.metadata.name for kernel in compiled} == KERNELS
    for kernel in compiled:
        assert kernel.asm["cubin"]
        assert f"sm_{card}" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= 1024 * shared_kb


KERNELS = {"_scale", "_dequantise", "_update_one", "_update_many", "_average"}
KERNELS |= {
    "_moments",
    "_statistics",
    "_apply",
    "_sums",
    "_group_means",
    "_input_grad",
    "_affine_grads",
    "_added_grads",
}
KERNELS |= {"_scaled", "_scaled_grad", "_turned", "_turned_grad", "_gated", "_gated_grad"}


def launch_quantised(dtype: torch.dtype) -> None:
    from dreambooth_sm.training import quantised_triton as kernels

    kernels.scaled(*quantise(torch.ones(64, 128), "int8", dtype))
    kernels.dequantised(*quantise(torch.ones(64, 128), "nf4", dtype), torch.tensor(LEVELS, dtype=dtype))


def launch_group_norm(dtype: torch.dtype) -> None:
    from dreambooth_sm.training import group_norm_triton as kernels

    image = torch.ones(2, 64, 8, 8, dtype=dtype).to(memory_format=torch.channels_last)
    weight, bias, shift = torch.ones(64, dtype=dtype), torch.ones(64, dtype=dtype), torch.ones(2, 64, dtype=dtype)
    _, mean, rstd = kernels.forward(image, weight, bias, shift, bias, 32, 1e-5, True)
    kernels.backward(image, image, mean, rstd, weight, bias, shift, bias, True, True, True)


def launch_rms_norm(dtype: torch.dtype) -> None:
    """Of Z-Image's widths."""
    from dreambooth_sm.training import rms_norm_triton as kernels

    x, weight, factor = (
        torch.ones(1, 2, 3840, dtype=dtype),
        torch.ones(3840, dtype=dtype),
        torch.ones(1, 3840, dtype=dtype),
    )
    kernels.scaled(x, weight, 1e-5, factor, x)
    kernels.scaled_grad(x, x, weight, 1e-5, factor)
    heads, turns = x.unflatten(-1, (30, 128)), torch.ones(1, 2, 64, 2)
    kernels.turned(heads, weight[:128], 1e-5, turns)
    kernels.turned_grad(heads, heads, weight[:128], 1e-5, turns)
    kernels.gated(x, x)
    kernels.gated_grad(x, x, x)


def launch_optimizer(dtype: torch.dtype, formats: list[tuple[BlockFormat, bool]]) -> None:
    from dreambooth_sm.training import adamw_blockwise_triton as kernels

    scalars = DeviceScalars(torch.zeros(2, 8), torch.zeros(2), torch.zeros(()))
    for fmt, residual in formats:
        parameter, blocks = torch.ones(4096, dtype=dtype), fmt.blocks(4096)
        moments = Moments.zeros(blocks, fmt, residual, CPU)
        kernels.update(parameter, parameter, moments, scalars, index=0, group=0, fmt=fmt)
        table = kernels.bundle_table([(parameter.data_ptr(), 4096, 0, 0, 0)], fmt, CPU)
        kernels.update_bundle(table, dtype, parameter, moments, scalars, fmt=fmt)
        kernels.average(torch.ones(4096), parameter, moments.residual, torch.ones(()))
