"""Transformers in fewer passes over their activations, beside the library's own."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dreambooth_sm.training.recomputation import checkpoint_activations


def compare_passes(transformer: Any, run: Callable[..., Tensor], inputs: dict[str, Any], *, recomputing: bool) -> None:
    """Compares what both compute, and the gradients of what they are given, in fp32 with weights drawn for it."""
    transformer = copy.deepcopy(transformer).float().requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    for parameter in transformer.parameters():
        parameter.normal_(std=0.1, generator=random)
    if recomputing:
        checkpoint_activations(transformer)
    found = []
    for compute in (lambda **given: transformer(**given, return_dict=False)[0], functools.partial(run, transformer)):
        learned = {name: inputs[name].clone().requires_grad_() for name in ("hidden_states", "encoder_hidden_states")}
        made = compute(**{**inputs, **learned})
        made.backward(torch.randn(made.shape, generator=torch.Generator().manual_seed(1)))
        found.append([made, *(each.grad for each in learned.values())])
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
