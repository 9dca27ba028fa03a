"""`modulation` on the CPU: its definition, and the Triton kernels run by Triton's interpreter, beside torch's own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dreambooth_sm.training.modulation import gated_sum, modulated_norm
from tests.helpers.interpreter import printed_in_the_interpreter
from tests.unit.test_rms_norm import TYPES, compare

EPS = 1e-6
# Rows, words, width: none fills the kernels' blocks.
SHAPES = [(2, 3, 30), (1, 5, 32), (3, 1, 34)]


def plain_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def compare_all(
    device: str = "cpu", shapes: Sequence[tuple[int, ...]] = SHAPES, types: Sequence[torch.dtype] = TYPES
) -> None:
    random = torch.Generator().manual_seed(0)
    for dtype in types:
        for rows, words, width in shapes:
            x, added, grad = torch.randn(3, rows, words, width, generator=random).to(device, dtype).unbind()
            scale, shift, gate = torch.randn(3, rows, width, generator=random).to(device, dtype).unbind()
            compare(
                lambda x, s=scale, b=shift: modulated_norm(x, s, b, EPS)[0],
                lambda x, s=scale, b=shift: plain_norm(x, s.double(), b.double()),
                [x],
                grad,
            )
            compare(  # with a gradient of x itself, and rounded after each
                lambda x, s=scale, b=shift: torch.cat(modulated_norm(x, s, b, EPS), -1),
                lambda x, s=scale, b=shift: torch.cat([plain_norm(x, s.double(), b.double()), x], -1),
                [x],
                torch.cat([grad, added], -1),
            )
            compare(
                lambda x, added, g=gate: gated_sum(x, g, added),
                lambda x, added, g=gate: x + g.double()[:, None] * added,
                [x, added],
                grad,
            )
    print("compared")


def test_reference_computes_what_torch_does() -> None:
    compare_all()


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    assert printed_in_the_interpreter(__file__).count("compared") == len(SHAPES)


def test_gradients_are_the_derivatives() -> None:
    random = torch.Generator().manual_seed(0)
    x, added = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=random).requires_grad_().unbind()
    scale, shift = torch.randn(2, 2, 4, dtype=torch.float64, generator=random)
    assert torch.autograd.gradcheck(lambda x: modulated_norm(x, scale, shift, EPS), (x,))
    assert torch.autograd.gradcheck(lambda x, added: gated_sum(x, scale, added), (x, added))


def test_what_is_not_asked_for_is_not_computed() -> None:
    x, scale = torch.ones(1, 2, 4), torch.ones(1, 4)
    added = torch.ones(1, 2, 4, requires_grad=True)
    gated_sum(x, scale, added).sum().backward()
    assert torch.equal(added.grad, torch.ones(1, 2, 4))  # type: ignore[arg-type]
    given = torch.ones(1, 2, 4, requires_grad=True)
    modulated_norm(given, scale, scale, EPS)[1].sum().backward()
    assert torch.equal(given.grad, torch.ones(1, 2, 4))  # type: ignore[arg-type]


if __name__ == "__main__":  # slowly: each type in a shape, and each shape in a type
    for dtype, shape in zip(TYPES, SHAPES, strict=True):
        compare_all(shapes=[shape], types=[dtype])
