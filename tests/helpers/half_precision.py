"""Convolutions and matrix products of 16-bit tensors on the CPU, as a GPU computes them: summed in fp32, and rounded.

torch's own take 10 to 50 times as long as those of fp32, unless the CPU has instructions for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

_NAMES = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")


@contextmanager
def summed_in_fp32() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    try:
        for name in _NAMES:
            kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
            with warnings.catch_warnings(action="ignore"):  # that a kernel is replaced
                library.impl(name, partial(_in_fp32, kernel), "CPU", with_keyset=True)
        yield
    finally:
        library._destroy()


def _in_fp32(kernel: Any, keys: torch.DispatchKeySet, first: torch.Tensor, *rest: Any) -> Any:
    """Calls a kernel; its first argument is a tensor of the precision of all others."""
    if first.dtype not in (torch.float16, torch.bfloat16):
        return kernel.call_boxed(keys, first, *rest)
    arguments = [x.float() if isinstance(x, torch.Tensor) else x for x in (first, *rest)]
    result = kernel.call_boxed(keys, *arguments)
    if isinstance(result, torch.Tensor):
        return result.to(first.dtype)
    return tuple(None if x is None else x.to(first.dtype) for x in result)
