"""`geglu` and `layer_norm` on the CPU: their definitions, and the Triton kernels run by Triton's interpreter, beside
torch's own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth_sm.training.geglu import gate
from dreambooth_sm.training.layer_norm import FrozenLayerNorm, norm_in_one_pass
from tests.helpers.interpreter import printed_in_the_interpreter
from tests.unit.test_rms_norm import TYPES, compare

EPS = 1e-5
# Rows, words, width: none fills the kernels' blocks.
SHAPES = [(2, 3, 30), (1, 5, 32), (3, 1, 34)]


def plain_gate(projected: Tensor) -> Tensor:
    hidden, gate = projected.chunk(2, -1)
    return hidden * F.gelu(gate)


def compare_all(
    device: str = "cpu", shapes: Sequence[tuple[int, ...]] = SHAPES, types: Sequence[torch.dtype] = TYPES
) -> None:
    random = torch.Generator().manual_seed(0)
    for dtype in types:
        for rows, words, width in shapes:
            x, gates, grad = torch.randn(3, rows, words, width, generator=random).to(device, dtype).unbind()
            weight, bias = torch.randn(2, width, generator=random).to(device, dtype).unbind()
            for its in (grad, grad[..., :1].expand_as(grad)):
                compare(gate, plain_gate, [torch.cat([x, 3 * gates], -1)], its, rounding=2)  # plain torch rounds twice
                compare(
                    lambda x, w=weight, b=bias: FrozenLayerNorm.apply(x, w, b, EPS),
                    lambda x, w=weight, b=bias: F.layer_norm(x, x.shape[-1:], w.double(), b.double(), EPS),
                    [x],
                    its,
                )
    print("compared")


def test_reference_computes_what_torch_does() -> None:
    compare_all()


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    assert printed_in_the_interpreter(__file__).count("compared") == len(SHAPES)


def test_gradients_are_the_derivatives() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=random).requires_grad_()
    weight, bias = torch.randn(2, 8, dtype=torch.float64, generator=random)
    assert torch.autograd.gradcheck(gate, (x,))
    assert torch.autograd.gradcheck(lambda x: FrozenLayerNorm.apply(x, weight, bias, EPS), (x,))


def test_where_no_kernel_serves_norms_are_torchs_own() -> None:
    """Those whose weights are trained have gradients for them."""
    for norm in (nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm((2, 8))):
        x = torch.randn(3, 2, 8)
        expected = norm(x)
        norm_in_one_pass(norm)
        assert torch.equal(norm(x), expected)
        norm(x).sum().backward() if norm.elementwise_affine else None
        assert all(parameter.grad is not None for parameter in norm.parameters())


if __name__ == "__main__":  # slowly: each type in a shape, and each shape in a type
    for dtype, shape in zip(TYPES, SHAPES, strict=True):
        compare_all(shapes=[shape], types=[dtype])
