"""`geglu` and `layer_norm` on a CUDA device: the kernels, and a UNet whose weights are not trained."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from dreambooth_sm.training.layer_norm import norm_in_one_pass
from dreambooth_sm.training.recomputation import recompute_gates
from tests.unit import test_unet_transformers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_kernels_compute_what_torch_does() -> None:
    test_unet_transformers.compare_all("cuda", [*test_unet_transformers.SHAPES, (2, 67, 640), (3, 33, 1280)])


def test_a_unet() -> None:
    """As near to fp64 as the library's own comes, forward and backward."""
    random = torch.Generator("cuda").manual_seed(0)
    exact = UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 128), cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).double().cuda().requires_grad_(False)  # fmt: skip
    sample, grad = torch.randn(2, 2, 4, 16, 16, generator=random, dtype=torch.float64, device="cuda").unbind()
    states = torch.randn(2, 5, 32, generator=random, dtype=torch.float64, device="cuda")
    theirs = copy.deepcopy(exact).bfloat16()
    ours = copy.deepcopy(theirs)
    recompute_gates(ours)
    norm_in_one_pass(ours)
    found = []
    for unet in (exact, theirs, ours):
        given = sample.to(unet.dtype, copy=True).requires_grad_()
        made = unet(given, torch.tensor([3, 700], device="cuda"), states.to(unet.dtype)).sample
        made.backward(grad.to(unet.dtype))
        assert given.grad is not None
        found.append(torch.cat([made.detach().double(), given.grad.double()]))
    true, library, mine = found
    assert (mine - true).norm() <= 1.2 * (library - true).norm()
