"""`rms_norm` on the CPU: its definition, and the Triton kernels run by Triton's interpreter, beside torch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dreambooth_sm.training.parallel_block import attention_and_swiglu
from dreambooth_sm.training.rms_norm import (
    norms_serve,
    scaled_norm,
    swiglu,
    swiglu_of_halves,
    turned_norm,
    turned_norms,
)
from tests.helpers.interpreter import printed_in_the_interpreter

EPS = 1e-5
# Rows, words, heads, a head's width: none fills the kernels' blocks.
SHAPES = [(2, 3, 3, 10), (1, 5, 4, 8), (3, 1, 1, 34)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def plain_turned(x: Tensor, weight: Tensor, turns: Tensor) -> Tensor:
    one, other = plain_norm(x, weight).unflatten(-1, (-1, 2)).unbind(-1)
    angle = turns.angle().to(x.dtype)[:, :, None]
    return torch.stack(
        [one * angle.cos() - other * angle.sin(), one * angle.sin() + other * angle.cos()], dim=-1
    ).flatten(-2)


def plain_parallel(both: Tensor, weight: Tensor, turns: Tensor, heads: int) -> Tensor:
    query, key, value, gate, hidden = both.chunk(5, -1)
    query, key, value = (each.unflatten(-1, (heads, -1)) for each in (query, key, value))
    query, key = plain_turned(query, weight, turns), plain_turned(key, 2 * weight, turns)
    seen = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return torch.cat([seen.transpose(1, 2).flatten(2), F.silu(gate) * hidden], -1)


def compare(
    ours: Callable[..., Tensor],
    exactly: Callable[..., Tensor],
    inputs: list[Tensor],
    grad: Tensor,
    rounding: float = 1,
) -> None:
    """Value and gradients, against torch's in float64 from the same numbers."""
    mine = [tensor.clone().requires_grad_() for tensor in inputs]
    y = ours(*mine)
    y.backward(grad)
    true = [tensor.double().requires_grad_() for tensor in inputs]
    expected = exactly(*true)
    expected.backward(grad.double())
    assert y.dtype == inputs[0].dtype
    for got, exact in ((y, expected), *((a.grad, b.grad) for a, b in zip(mine, true, strict=True))):
        tolerance = 4e-6 if got.dtype == torch.float32 else rounding * torch.finfo(got.dtype).eps
        assert (got.double() - exact).abs().max() <= tolerance * exact.abs().max()


def compare_all(
    device: str = "cpu", shapes: Sequence[tuple[int, ...]] = SHAPES, types: Sequence[torch.dtype] = TYPES
) -> None:
    random = torch.Generator().manual_seed(0)
    for dtype in types:
        for rows, words, heads, width in shapes:

            def draw(*size: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(size, generator=random).to(device, dtype)

            x, added, grad = draw(3, rows, words, heads * width).unbind()
            weight, factor = draw(heads * width), draw(rows, heads * width)
            compare(
                lambda x, w=weight: scaled_norm(x, w, EPS), lambda x, w=weight: plain_norm(x, w.double()), [x], grad
            )
            compare(
                lambda x, added, w=weight, f=factor: scaled_norm(x, w, EPS, f, added),
                lambda x, added, w=weight, f=factor: added + f.double()[:, None] * plain_norm(x, w.double()),
                [x, added],
                grad,
            )
            angles = draw(rows, words, width // 2).float()
            turns = torch.polar(torch.ones_like(angles), angles)
            of_head = draw(width)
            compare(
                lambda x, w=of_head, t=turns: turned_norm(x, w, EPS, t),
                lambda x, w=of_head, t=turns: plain_turned(x, w.double(), t),
                [x.unflatten(-1, (heads, width))],
                grad.unflatten(-1, (heads, width)),
            )
            compare(
                lambda x, other, w=of_head, t=turns: turned_norms([(x, w), (other, 2 * w)], EPS, torch.cat([t, t], 1)),
                lambda x, other, w=of_head, t=turns: torch.cat(
                    [plain_turned(x, w.double(), t), plain_turned(other, 2 * w.double(), t)], 1
                ),
                [x.unflatten(-1, (heads, width)), added.unflatten(-1, (heads, width))],
                draw(rows, 2 * words, heads, width),
            )
            part = draw(rows, words + 2, heads * width)[:, 1:-1]  # rows are farther from each other than words
            for its in (grad, part, grad[..., :1].expand_as(grad)):
                compare(swiglu, lambda gate, hidden: F.silu(gate) * hidden, [x, added], its)
            compare(
                swiglu_of_halves,
                lambda both: F.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1],
                [torch.cat([x, added], -1)],
                grad,
            )
            projected = draw(rows, words, 5 * heads * width)
            compare(
                lambda both, w=of_head, t=turns, h=heads: attention_and_swiglu(1 * both, w, 2 * w, EPS, t, h),
                lambda both, w=of_head, t=turns, h=heads: plain_parallel(both, w.double(), t, h),
                [projected],
                draw(rows, words, 2 * heads * width),
                rounding=6,  # attention is not computed in one pass
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
    weight, factor = torch.randn(4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    turns = torch.polar(torch.ones(2, 3, 1), torch.randn(2, 3, 1)).to(torch.complex128)
    assert torch.autograd.gradcheck(lambda x, added: scaled_norm(x, weight, EPS, factor, added), (x, added))
    heads = x.detach().unflatten(-1, (2, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: turned_norm(x, weight[:2], EPS, turns), (heads,))
    assert torch.autograd.gradcheck(swiglu, (x, added))
    both = torch.randn(2, 3, 20, dtype=torch.float64, generator=random).requires_grad_()
    assert torch.autograd.gradcheck(swiglu_of_halves, (both,))


def test_the_backward_pass_of_parallel_blocks_is_run_once() -> None:
    both, turns = torch.randn(1, 2, 10, requires_grad=True), torch.ones(1, 2, 1, dtype=torch.complex64)
    made = attention_and_swiglu(2 * both, torch.ones(2), torch.ones(2), EPS, turns, 1)
    made.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        made.sum().backward()


def test_on_the_cpu_the_library_serves() -> None:
    assert not norms_serve(torch.ones(1, 2, 4))


if __name__ == "__main__":  # slowly: each type in a shape, and each shape in a type
    for dtype, shape in zip(TYPES, SHAPES, strict=True):
        compare_all(shapes=[shape], types=[dtype])
