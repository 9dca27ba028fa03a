"""`group_norm` on a CUDA device: the compiled kernels, in CUDA graphs, in a UNet, and where torch has to serve."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dreambooth_sm.training.channels_last import keep_channels_last
from dreambooth_sm.training.group_norm import group_norm, serves
from tests.unit.test_channels_last import unet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# (n, channels, h, w), in 32 groups: the UNets', and some that fill no tile.
SHAPES = [
    (2, 320, 64, 64),
    (2, 960, 64, 64),
    (4, 640, 32, 32),
    (2, 1920, 16, 16),
    (8, 2560, 8, 8),
    (2, 320, 128, 128),
    (3, 32, 7, 11),
    (1, 96, 5, 1),
    (2, 4096, 3, 3),
]
TYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]
GROUPS = 32


def tensors(shape: tuple[int, ...], dtype: torch.dtype, affine_dtype: torch.dtype) -> list[Tensor]:
    """x, weight, bias, shift, offset and the result's gradient; the means are several deviations from zero."""
    random = torch.Generator("cuda").manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device="cuda")

    n, channels = shape[:2]
    x = (draw(*shape) + 3 * draw(n, channels, 1, 1) + 5).to(dtype).to(memory_format=torch.channels_last)
    grad = draw(*shape).to(dtype).to(memory_format=torch.channels_last)
    added = [draw(n, channels).to(dtype), draw(channels).to(dtype)]
    return [x, draw(channels).to(affine_dtype), draw(channels).to(affine_dtype), *added, grad]


def value_and_gradients(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, offset: Tensor, grad: Tensor, *, silu: bool, added: bool
) -> list[Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias, *([shift, offset] if added else []))]
    more = dict(zip(("shift", "offset"), inputs[3:], strict=False))
    y = group_norm(inputs[0], GROUPS, inputs[1], inputs[2], silu=silu, **more)
    return [y, *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.parametrize("added", [False, True], ids=["", "added"])
@pytest.mark.parametrize("silu", [False, True], ids=["", "silu"])
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_compute_what_torch_does(
    shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype], silu: bool, added: bool
) -> None:
    given = tensors(shape, *types)
    assert serves(given[0], GROUPS, given[1], given[2])
    ours = value_and_gradients(*given, silu=silu, added=added)
    x, weight, bias, shift, offset, grad = (tensor.double().requires_grad_() for tensor in given)
    shifted = x + shift[:, :, None, None] + offset[:, None, None] if added else x
    y = F.group_norm(shifted, GROUPS, weight, bias, 1e-5)
    y = F.silu(y) if silu else y
    inputs = [x, weight, bias, *([shift, offset] if added else [])]
    theirs = [y, *torch.autograd.grad(y, inputs, grad)]
    # What is added to whole groups of one channel has no gradient: what is left of it is compared with its parts.
    scale = (weight.abs() * grad.abs().sum((2, 3))).max()
    for number, (mine, true) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.dim() < 4 or mine.is_contiguous(memory_format=torch.channels_last)
        tolerance = 1e-5 if mine.dtype == torch.float32 else torch.finfo(mine.dtype).eps
        small = 1e-5 * scale if number > 3 else 0
        assert (mine.double() - true).abs().max() <= tolerance * true.abs().max() + small


def test_same_bits_each_time_and_in_a_graph() -> None:
    inputs = tensors((2, 320, 64, 64), torch.bfloat16, torch.bfloat16)
    expected = value_and_gradients(*inputs, silu=True, added=True)
    for _ in range(3):
        assert all(map(torch.equal, value_and_gradients(*inputs, silu=True, added=True), expected))
    places = [torch.zeros_like(tensor) for tensor in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = value_and_gradients(*places, silu=True, added=True)
    for place, tensor in zip(places, inputs, strict=True):
        place.copy_(tensor)
    for _ in range(2):
        graph.replay()
        assert all(map(torch.equal, results, expected))


def test_frozen_weights_get_no_gradients() -> None:
    given = tensors((2, 320, 16, 16), torch.float16, torch.float16)
    expected = value_and_gradients(*given, silu=True, added=False)[1]
    x, weight, bias, *_, grad = given
    x.requires_grad_()
    group_norm(x, GROUPS, weight, bias, silu=True).backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
    assert weight.grad is bias.grad is None


def test_torch_serves_other_layouts_and_autocast() -> None:
    x, weight, bias, *_ = tensors((2, 64, 9, 5), torch.float16, torch.float16)
    expected = F.group_norm(x.contiguous(), GROUPS, weight, bias, 1e-5)
    assert torch.equal(group_norm(x.contiguous(), GROUPS, weight, bias), expected)
    with torch.autocast("cuda", torch.float16):
        assert group_norm(x, GROUPS, weight, bias).dtype == torch.float32


@pytest.mark.parametrize("linear", [False, True], ids=["sd1", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_unet(dtype: torch.dtype, linear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to fp32 as torch's own kernels come; the layouts are in tests/unit/test_channels_last.py."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact = unet(use_linear_projection=linear).cuda()
    plain, ours = (copy.deepcopy(exact).to(dtype) for _ in range(2))
    keep_channels_last(ours)
    true, theirs, mine = (gradients_of(model) for model in (exact, plain, ours))
    assert (mine - true).norm() <= 1.3 * (theirs - true).norm()
    assert (mine - true).norm() <= 0.05 * true.norm()


def gradients_of(model: Any) -> Tensor:
    random = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 12, generator=random).to("cuda", model.dtype, memory_format=torch.channels_last)
    prompts = torch.randn(2, 7, 16, generator=random).to("cuda", model.dtype)
    result = model(sample, torch.tensor([3, 700], device="cuda"), prompts, return_dict=False)[0]
    result.float().square().mean().backward()
    return torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])
