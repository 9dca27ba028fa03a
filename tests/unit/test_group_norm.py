"""`group_norm` on the CPU: its definition, and the Triton kernels run by Triton's interpreter, beside torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dreambooth_sm.training.group_norm import GroupNormFunction, group_norm
from tests.helpers.interpreter import printed_in_the_interpreter

# (n, channels, groups, h, w): groups of the UNets' widths; no number of pixels or channels fills the kernels' tiles.
SHAPES = [(2, 20, 2, 5, 13), (1, 40, 2, 9, 15), (1, 80, 2, 1, 67), (1, 160, 2, 3, 3), (2, 4, 2, 70, 41)]
TYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]


def compare_with_torch(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, affine_dtype: torch.dtype, *, silu: bool, added: bool
) -> None:
    """Value and gradients, against torch's in float64 from the same numbers; means are several deviations from zero."""
    n, channels, groups, h, w = shape
    random = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=random)

    x = (draw(n, channels, h, w) + 3 * draw(n, channels, 1, 1) + 5).to(dtype).to(memory_format=torch.channels_last)
    inputs = [x, draw(channels).to(affine_dtype), draw(channels).to(affine_dtype)]
    inputs += [draw(n, channels).to(dtype), draw(channels).to(dtype)] if added else []
    grad = draw(n, channels, h, w).to(dtype)  # not in channels_last
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    y = GroupNormFunction.apply(*(ours if added else [*ours, None, None]), groups, 1e-5, silu)
    y.backward(grad)
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    shifted = exact[0] + exact[3][:, :, None, None] + exact[4][:, None, None] if added else exact[0]
    expected = F.group_norm(shifted, groups, exact[1], exact[2], 1e-5)
    expected = F.silu(expected) if silu else expected
    expected.backward(grad.double())
    for image in (y, ours[0].grad):
        assert image.dtype == dtype
        assert image.is_contiguous(memory_format=torch.channels_last)
    for mine, true in ((y, expected), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))):
        tolerance = 4e-6 if mine.dtype == torch.float32 else torch.finfo(mine.dtype).eps
        error = (mine.double() - true).abs().max() / true.abs().max()
        assert error <= tolerance, (shape, dtype, affine_dtype, silu, added, error)


def compare_all() -> None:
    for shape in SHAPES:
        compare_with_torch(shape, torch.float32, torch.float32, silu=True, added=True)
    for number, (dtype, affine_dtype) in enumerate(TYPES):
        for silu in (False, True):
            compare_with_torch(SHAPES[0], dtype, affine_dtype, silu=silu, added=silu == number % 2)
    print("compared")


def test_reference_computes_what_torch_does() -> None:
    compare_all()


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    assert printed_in_the_interpreter(__file__).count("compared") == 1


@pytest.mark.parametrize("silu", [False, True])
def test_gradients_are_the_derivatives(silu: bool) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 2, 2, dtype=torch.float64, generator=random).to(memory_format=torch.channels_last)
    shift, *of_channels = torch.randn(5, 6, dtype=torch.float64, generator=random).split([2, 1, 1, 1])
    weight, bias, offset = (values[0] for values in of_channels)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias, shift, offset)]
    assert torch.autograd.gradcheck(lambda *tensors: GroupNormFunction.apply(*tensors, 3, 1e-5, silu), inputs)


def test_frozen_weights_get_no_gradients() -> None:
    x = torch.randn(1, 4, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    frozen = [torch.ones(4), torch.zeros(4), torch.ones(1, 4), torch.zeros(4)]
    GroupNormFunction.apply(x, *frozen, 2, 1e-5, True).sum().backward()
    assert x.grad is not None
    assert all(tensor.grad is None for tensor in frozen)


def test_elsewhere_torch_serves() -> None:
    x, weight, bias = torch.randn(2, 4, 3, 3), torch.randn(4), torch.randn(4)
    expected = F.group_norm(x, 2, weight, bias, 1e-6)
    assert torch.equal(group_norm(x, 2, weight, bias, 1e-6), expected)
    assert torch.equal(group_norm(x, 2, weight, bias, 1e-6, silu=True), F.silu(expected))
    shift, offset = torch.randn(2, 4), torch.randn(4)
    expected = F.group_norm(x + (shift + offset)[:, :, None, None], 2, weight, bias, 1e-6)
    torch.testing.assert_close(group_norm(x, 2, weight, bias, 1e-6, shift=shift, offset=offset), expected)


if __name__ == "__main__":
    compare_all()
