"""Kernels of attention in a training step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dreambooth_sm.planning.plan import Plan

Attention = Callable[[], contextlib.AbstractContextManager[Any]]


def attention_context(plan: Plan, denoiser: Any, device: torch.device, warn: Callable[[str], None]) -> Attention:
    """Sets the attention kernels that the plan names, and makes contexts for a step.

    xformers changes the denoiser for good. Where it can't run (not installed, or built for another torch), SDPA serves
    and ``warn`` gets a line.
    """
    if plan.attention == "xformers":
        try:
            denoiser.enable_xformers_memory_efficient_attention()
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warn(f"attention=xformers can't run here ({reason}); SDPA serves instead")
    if plan.attention == "flash_attention":
        return partial(planned_kernels, plan)
    return gradients_as_results_lie if device.type == "cuda" else contextlib.nullcontext


def planned_kernels(plan: Plan) -> contextlib.AbstractContextManager[Any]:
    """The kernels of SDPA that the plan names. What is drawn takes them as well: others would be compiled for it."""
    if plan.attention != "flash_attention":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(backends, set_priority=True)


@contextlib.contextmanager
def gradients_as_results_lie() -> Iterator[None]:
    """Attention gets gradients in the memory layout of its results.

    PyTorch (2.11, and by its source up to 2.13) builds cuDNN's backward pass once for all calls whose queries, keys
    and values lie alike, whatever the gradients do: where one block's result is put beside others, its gradient is a
    slice of theirs, and the next block's gradient is then read with the wrong strides.
    """
    functional = torch.nn.functional
    plain = functional.scaled_dot_product_attention

    def attention(*args: Any, **options: Any) -> Tensor:
        result: Tensor = _GradientAsResult.apply(plain(*args, **options))
        return result

    functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


class _GradientAsResult(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor) -> Tensor:
        ctx.strides = result.stride()
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if grad.stride() == ctx.strides:
            return grad
        return torch.empty_strided(grad.shape, ctx.strides, dtype=grad.dtype, device=grad.device).copy_(grad)
