"""The types that a plan computes and keeps weights in."""

from __future__ import annotations

import torch

from dreambooth_sm.planning.plan import Plan

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def compute_dtype(plan: Plan) -> torch.dtype:
    """Returns the type of the forward and backward pass."""
    return _DTYPES[plan.precision]


def weights_dtype(plan: Plan) -> torch.dtype:
    """Returns the type of the weights on the device, whatever stands in for their lower bits."""
    return torch.float32 if plan.weights == "fp32" else compute_dtype(plan)
