"""Weights that stay in float32 where the rest of a model becomes smaller, because its library says so: norms whose
values 16 bits have no room for, for example."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

_HALF = (torch.float16, torch.bfloat16)


def kept_in_fp32(module: Any, names: Iterable[str], dtype: torch.dtype | None) -> frozenset[str]:
    """Those of a module's weights that are not to become ``dtype``.

    Args:
        module: of diffusers or transformers.
        names: of its weights.
        dtype: of the others; None leaves each as it is.
    """
    if dtype is not None and dtype not in _HALF:
        return frozenset()
    parts = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    # The names that transformers has here are of modules that overflow in float16 alone.
    if dtype == torch.float16 or hasattr(module, "register_to_config"):
        parts |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return frozenset(name for name in names if any(f".{part}." in f".{name}." for part in parts))


def dtypes_of(module: Any, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The type of each weight of a module that is cast to ``dtype``."""
    names = list(names)
    return dict.fromkeys(names, dtype) | dict.fromkeys(kept_in_fp32(module, names, dtype), torch.float32)


def is_cast(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all weights of a module are on a device and, unless they hold integers, as :func:`cast` leaves them."""
    weights = dict(module.named_parameters())
    dtypes = dtypes_of(module, weights, dtype)
    return all(
        weight.device == device and (weight.dtype == dtypes[name] or not weight.is_floating_point())
        for name, weight in weights.items()
    )


def cast(module: torch.nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Moves a module to a device and casts it, but for the weights that stay in float32."""
    weights = dict(module.named_parameters())
    kept = [(weights[name], weights[name].detach()) for name in kept_in_fp32(module, weights, dtype)]
    module.to(device=device, dtype=dtype)
    for weight, value in kept:
        weight.data = value.to(device, torch.float32)
