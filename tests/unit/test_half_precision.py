"""The tests' own convolutions and matrix products of 16-bit tensors are those of fp64, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers.half_precision import summed_in_fp32


def results(
    tensors: list[torch.Tensor], operation: Callable[..., torch.Tensor] = torch.conv2d, **options: Any
) -> list[torch.Tensor]:
    """What an operation, such as a convolution, makes of tensors, and the gradients of what goes in."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    y = operation(*leaves, **options)
    y.backward(torch.ones_like(y))
    found = [y.detach(), *(leaf.grad for leaf in leaves)]
    return [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2}, {"groups": 2, "dilation": 2}], ids=str)
def test_they_are_those_of_fp64_rounded(dtype: torch.dtype, bias: bool, options: dict[str, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 9, 8), (6, 4 // options.get("groups", 1), 3, 3), *([(6,)] if bias else [])]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    with summed_in_fp32():
        ours = results(tensors, **options)
        laid_out = results([tensors[0].to(memory_format=torch.channels_last), *tensors[1:]], **options)
    exact = results([tensor.double() for tensor in tensors], **options)
    assert len(ours) == len(exact)
    for mine, other, wanted in zip(ours, laid_out, exact, strict=True):
        assert mine.dtype == other.dtype == dtype
        for found in (mine, other):
            torch.testing.assert_close(found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert laid_out[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("operation", "shapes"),
    [
        (torch.mm, [(5, 40), (40, 6)]),
        (torch.bmm, [(2, 5, 40), (2, 40, 6)]),
        (torch.addmm, [(6,), (5, 40), (40, 6)]),
        (torch.baddbmm, [(2, 5, 6), (2, 5, 40), (2, 40, 6)]),
        (torch.nn.functional.linear, [(2, 5, 40), (6, 40), (6,)]),
    ],
)
def test_so_are_products(
    dtype: torch.dtype, operation: Callable[..., torch.Tensor], shapes: list[tuple[int, ...]]
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    with summed_in_fp32():
        ours = results(tensors, operation)
    exact = results([tensor.double() for tensor in tensors], operation)
    for mine, wanted in zip(ours, exact, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_others_stay_as_they_are() -> None:
    tensors = [torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3), torch.randn(6)]
    with summed_in_fp32():
        ours = results(tensors)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, results(tensors), strict=True))
