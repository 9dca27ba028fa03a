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


def leave_out_rescaling(denoiser: torch.nn.Module) -> None:
    """Attention divides its result by a factor that is 1 in the transformers of UNets: a pass over it for nothing."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    for module in denoiser.modules():
        processor: Any = getattr(module, "processor", None)
        if type(module) is Attention and type(processor) is AttnProcessor2_0 and _is_plain(module):
            setattr(module, "processor", _PlainAttention(processor))  # noqa: B010 - typed otherwise


def _is_plain(attention: Any) -> bool:
    unused = (attention.spatial_norm, attention.group_norm, attention.norm_q, attention.norm_k)
    return (
        all(part is None for part in unused)
        and not attention.norm_cross
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and not attention.to_out[1].p
    )


class _PlainAttention:
    """A processor of diffusers that computes what ``general`` does, which has other input than that of transformers."""

    def __init__(self, general: Callable[..., Tensor]) -> None:
        self._general = general

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        if attention_mask is not None or hidden_states.dim() != 3:
            return self._general(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **more)
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        made = attn.to_q(hidden_states), attn.to_k(seen), attn.to_v(seen)
        query, key, value = (each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in made)
        # By its full name: a context may stand in for it.
        result = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        whole: Tensor = attn.to_out[0](result.transpose(1, 2).flatten(2).to(query.dtype))
        return whole


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
