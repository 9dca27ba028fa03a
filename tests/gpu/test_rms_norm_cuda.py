"""`rms_norm` on a CUDA device: the compiled kernels, and blocks of Z-Image, Qwen-Image and Krea 2 in fewer passes,
beside the library's."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from diffusers.models.transformers.transformer_krea2 import Krea2TransformerBlock
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock

from dreambooth_sm.families import krea2, qwen_image
from dreambooth_sm.families.z_image import run_in_fewer_passes
from dreambooth_sm.training.rms_norm import norms_serve
from tests.unit import test_rms_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_kernels_compute_what_torch_does() -> None:
    test_rms_norm.compare_all("cuda", [*test_rms_norm.SHAPES, (2, 67, 30, 128)])


def test_they_serve_where_norms_are_frozen_and_nothing_is_autocast() -> None:
    x, weight = torch.ones(1, 2, 64, device="cuda", dtype=torch.bfloat16), torch.ones(64, device="cuda")
    assert norms_serve(x, weight)
    assert not norms_serve(x, weight.clone().requires_grad_())
    assert not norms_serve(x.double(), weight)
    with torch.autocast("cuda", torch.bfloat16):
        assert not norms_serve(x, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("modulated", [False, True], ids=["", "modulated"])
def test_a_block(dtype: torch.dtype, modulated: bool) -> None:
    """As near to fp64 as the library's own comes."""
    random = torch.Generator().manual_seed(0)
    exact = ZImageTransformerBlock(0, 384, 3, 3, 1e-5, True, modulation=modulated).double().requires_grad_(False)
    for parameter in exact.parameters():
        parameter.normal_(std=0.05, generator=random)
    hidden, grad = torch.randn(2, 2, 33, 384, generator=random, dtype=torch.float64).cuda().unbind()
    turns = torch.polar(torch.ones(2, 33, 64), torch.randn(2, 33, 64, generator=random)).cuda()
    told = torch.randn(2, 256, generator=random, dtype=torch.float64).cuda() if modulated else None
    exact.cuda()
    rounded = copy.deepcopy(exact).to(dtype)
    found = []
    for run, kind in (
        (exact, torch.float64),
        (rounded, dtype),
        (functools.partial(run_in_fewer_passes, rounded), dtype),
    ):
        given = hidden.to(kind, copy=True).requires_grad_()
        made = run(given, None, turns, None if told is None else told.to(kind))
        made.backward(grad.to(kind))
        assert given.grad is not None
        found.append(torch.cat([made.detach().double(), given.grad.double()]))
    true, theirs, ours = found
    assert (ours - true).norm() <= 1.3 * (theirs - true).norm()
    assert (ours - true).norm() <= 0.05 * true.norm()


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_a_block_of_two_sides(masked: bool) -> None:
    """As near to full precision as the library's own comes, in bf16."""
    random = torch.Generator().manual_seed(0)
    exact = QwenImageTransformerBlock(384, 3, 128).requires_grad_(False)
    for parameter in exact.parameters():
        parameter.normal_(std=0.05, generator=random)
    picture, words = (torch.randn(2, count, 384, generator=random).cuda() for count in (40, 33))
    grads = [torch.randn(2, count, 384, generator=random).cuda() for count in (33, 40)]
    told = torch.randn(2, 384, generator=random).cuda()
    turns = torch.polar(torch.ones(73, 64), torch.randn(73, 64, generator=random)).cuda()
    kept = torch.arange(33, device="cuda") < torch.tensor([[33], [20]], device="cuda") if masked else None
    exact.cuda()
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    found = []
    for run, kind in (
        (lambda *given: exact(*given, kept, told, (turns[33:], turns[:33])), torch.float32),
        (lambda *given: rounded(*given, kept, told.bfloat16(), (turns[33:], turns[:33])), torch.bfloat16),
        (
            lambda *given: qwen_image.run_in_fewer_passes(  # type: ignore[call-arg]
                rounded, *given, kept, told.bfloat16(), turns.expand(2, -1, -1)
            ),
            torch.bfloat16,
        ),
    ):
        given = [each.to(kind, copy=True).requires_grad_() for each in (picture, words)]
        made = run(*given)
        torch.autograd.backward(made, [grad.to(kind) for grad in grads])
        found.append(torch.cat([part.double().flatten() for part in (*made, given[0].grad, given[1].grad)]).detach())
    true, theirs, ours = found
    assert (ours - true).norm() <= 1.3 * (theirs - true).norm()
    assert (ours - true).norm() <= 0.05 * true.norm()


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_a_block_whose_norms_stay_in_float32(masked: bool) -> None:
    """As near to full precision as the library's own comes, in bf16."""
    random = torch.Generator().manual_seed(0)
    exact = Krea2TransformerBlock(384, 512, 6, 2, 1e-5).requires_grad_(False)
    for parameter in exact.parameters():
        parameter.normal_(std=0.05, generator=random)
    x, grad = torch.randn(2, 2, 40, 384, generator=random).cuda().unbind()
    changes, angles = torch.randn(2, 1, 6 * 384, generator=random).cuda(), torch.randn(40, 32, generator=random).cuda()
    rotations = tuple(each.repeat_interleave(2, dim=1) for each in (angles.cos(), angles.sin()))
    turns = torch.polar(torch.ones_like(angles), angles).expand(2, -1, -1)
    kept = torch.arange(40, device="cuda") < torch.tensor([[40], [30]], device="cuda") if masked else None
    mask = None if kept is None else kept[:, None, None]
    exact.cuda()
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    for norm in (each for each in rounded.modules() if type(each).__name__ == "Krea2RMSNorm"):
        norm.float()
    found = []
    for run, kind in (
        (lambda x: exact(x, changes, rotations, mask), torch.float32),
        (lambda x: rounded(x, changes.bfloat16(), rotations, mask), torch.bfloat16),
        (lambda x: krea2.run_in_fewer_passes(rounded, x, changes.bfloat16(), turns, mask), torch.bfloat16),
    ):
        given = x.to(kind, copy=True).requires_grad_()
        made = run(given)
        made.backward(grad.to(kind))
        assert given.grad is not None
        found.append(torch.cat([made.detach().double(), given.grad.double()]))
    true, theirs, ours = found
    assert (ours - true).norm() <= 1.3 * (theirs - true).norm()
    assert (ours - true).norm() <= 0.05 * true.norm()
