"""`modulation` on a CUDA device: the kernels, and a FLUX.2 transformer in fewer passes, beside the library's."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from dreambooth_sm.families.flux2 import run_in_fewer_passes
from tests.unit import test_modulation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_kernels_compute_what_torch_does() -> None:
    test_modulation.compare_all("cuda", [*test_modulation.SHAPES, (2, 67, 3072)])


def test_a_transformer() -> None:
    """As near to fp64 as the library's own comes."""
    random = torch.Generator().manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 3, "joint_attention_dim": 64}
    exact = Flux2Transformer2DModel(**sizes, in_channels=32, guidance_embeds=False).double().requires_grad_(False)
    for parameter in exact.parameters():
        parameter.normal_(std=0.02, generator=random)
    hidden, grad = torch.randn(2, 2, 40, 32, generator=random, dtype=torch.float64).cuda().unbind()
    states = torch.randn(2, 27, 64, generator=random, dtype=torch.float64).cuda()
    places = torch.randint(9, (67, 4), generator=random).cuda()
    exact.cuda()
    rounded = copy.deepcopy(exact).bfloat16()
    found = []
    for run, kind in (
        (lambda **given: exact(**given)[0], torch.float64),
        (lambda **given: rounded(**given)[0], torch.bfloat16),
        (functools.partial(run_in_fewer_passes, rounded), torch.bfloat16),
    ):
        given = hidden.to(kind, copy=True).requires_grad_()
        times = torch.tensor([0.25, 0.75], device="cuda")
        made = run(
            hidden_states=given,
            encoder_hidden_states=states.to(kind),
            timestep=times,
            img_ids=places[:40],
            txt_ids=places[40:],
        )
        made.backward(grad.to(kind))
        assert given.grad is not None
        found.append(torch.cat([made.detach().double(), given.grad.double()]))
    true, theirs, ours = found
    assert (ours - true).norm() <= 1.3 * (theirs - true).norm()
    assert (ours - true).norm() <= 0.02 * true.norm()
