"""Attention and feed-forward side by side (Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion
Parameters"), between the one projection into both and the one out of both.

Of what lies between them, only the projection is kept: it is cut, normalised and put together again without copies,
but for what attention itself is given and gives. The backward pass, which can be run once, puts the gradients of its
parts into the projection itself: they are its largest tensors, and nothing else has to read it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreambooth_sm.training.rms_norm import gated, gated_grad, numbers_of, turn, turn_grad


def attention_and_swiglu(
    projected: Tensor, query_norm: Tensor, key_norm: Tensor, eps: float, turns: Tensor, heads: int
) -> Tensor:
    """Attention of heads that are normalised and turned (`rms_norm.turned_norm`), and SwiGLU, side by side.

    Args:
        projected: ``(rows, words, 3 * width + 2 * inner)``: queries, keys, values, gates, what is gated.
        query_norm, key_norm: ``(width / heads,)``.
        eps: added to the mean square of a head.
        turns: complex ``(rows, words, width / heads / 2)``.

    Returns:
        ``(rows, words, width + inner)``.
    """
    query, key, value, halves = _Parted.apply(projected, query_norm, key_norm, eps, numbers_of(turns), heads)
    result: Tensor = _Joined.apply(attend(query, key, value), halves)
    return result


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot product attention of heads ``(rows, words, heads, width)``.

    Args:
        mask: of ``(rows, 1, words, words)``, or of one row or word for all: which are looked at, or what is added to
            their scores; None: all are, and nothing.
    """
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def _cut(projected: Tensor, heads: int, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(rows, words, heads, width)``, and the rest."""
    width = heads * head
    *attention, halves = projected.split([width, width, width, projected.shape[-1] - 3 * width], dim=-1)
    query, key, value = (each.unflatten(-1, (heads, head)) for each in attention)
    return query, key, value, halves


def _once(ctx: Any, saved: Tensor) -> Tensor:
    """What was saved, to be written to: autograd, which is to find it changed, does not see it."""
    if getattr(ctx, "spent", False):
        raise RuntimeError("the backward pass of attention_and_swiglu can be run once")
    ctx.spent = True
    return saved.data


class _Parted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, query_norm: Tensor, key_norm: Tensor, eps: float, turns: Tensor, heads: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(projected, query_norm, key_norm, turns)
        ctx.eps, ctx.heads = eps, heads
        *pair, value, halves = _cut(projected, heads, len(query_norm))
        turned = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in pair]
        for each, norm, result in zip(pair, (query_norm, key_norm), turned, strict=True):
            turn(each, norm, eps, turns, result)
        return *turned, value, halves

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        projected, query_norm, key_norm, turns = ctx.saved_tensors
        result = _once(ctx, projected)  # where `_Joined` has put the gradient of the halves
        *pair, for_value, _ = _cut(result, ctx.heads, len(query_norm))
        for grad, each, norm in zip(grads[:2], pair, (query_norm, key_norm), strict=True):
            turn_grad(grad, each, norm, ctx.eps, turns, each)
        for_value.copy_(grads[2])
        return result, None, None, None, None, None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, seen: Tensor, halves: Tensor) -> Tensor:
        ctx.save_for_backward(halves)
        ctx.heads = seen.shape[2:]
        gate, hidden = halves.chunk(2, dim=-1)
        width = ctx.heads.numel()
        result = seen.new_empty(*seen.shape[:2], width + gate.shape[-1])
        result[..., :width].unflatten(-1, ctx.heads).copy_(seen)
        gated(gate, hidden, result[..., width:])
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (halves,) = ctx.saved_tensors
        width = ctx.heads.numel()
        result = _once(ctx, halves)
        parts = result.chunk(2, dim=-1)
        gated_grad(grads[0][..., width:], *parts, *parts)
        return grads[0][..., :width].unflatten(-1, ctx.heads), result
