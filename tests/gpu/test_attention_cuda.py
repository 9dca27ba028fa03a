"""Gradients of attention on a CUDA device, where results lie in different places."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dreambooth_sm.training.attention import gradients_as_results_lie
from tests.unit import test_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("first", [True, False], ids=["a slice first", "a slice last"])
def test_gradients_are_those_of_other_kernels(first: bool) -> None:
    """Also where one block's result is put beside others, and the next block's is not: whichever comes first."""
    tokens = 384 if first else 512  # kernels are kept for each shape
    with sdpa_kernel(SDPBackend.MATH):
        exact = test_attention.gradients("cuda", torch.float32, tokens=tokens, heads=24, width=128, first=first)
    with gradients_as_results_lie():
        found = test_attention.gradients("cuda", torch.bfloat16, tokens=tokens, heads=24, width=128, first=first)
    for ours, theirs in zip(found, exact, strict=True):
        assert torch.nn.functional.cosine_similarity(ours.float().flatten(), theirs.flatten(), 0) > 0.999


def test_what_this_is_for_is_still_there() -> None:
    """Where this fails, PyTorch has mended it, and `gradients_as_results_lie` can go."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN's attention is not the default on this card")
    plain = test_attention.gradients("cuda", torch.bfloat16, tokens=640, heads=24, width=128, first=True)
    with sdpa_kernel(SDPBackend.MATH):
        exact = test_attention.gradients("cuda", torch.float32, tokens=640, heads=24, width=128, first=True)
    near = [
        torch.nn.functional.cosine_similarity(ours.float().flatten(), theirs.flatten(), 0).item()
        for ours, theirs in zip(plain, exact, strict=True)
    ]
    assert not min(near) > 0.999
