"""Frozen linear layers in 8 or 4 bits a weight, beside which adapters are trained.

``int8``: rows of integers, each row with a scale. ``nf4``: blocks of 64 values, each the nearest of 16 levels times the
block's largest value; the levels are quantiles of a normal distribution (Dettmers et al. 2023, "QLoRA: Efficient
Finetuning of Quantized LLMs"). A pass makes the weights of a layer in 16 bits from them, and drops them again;
activations and gradients are never quantised. Nothing here waits for the device: steps can be captured.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from statistics import NormalDist
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CodeKind = Literal["int8", "nf4"]
# Values that share a scale in nf4.
BLOCK = 64
_LARGEST = 127
# Probability of the outermost levels, between that of 15 and that of 16 levels.
_TAIL = 1 - (1 / 30 + 1 / 32) / 2


def _quantiles(count: int) -> list[float]:
    """Of probabilities from that of the outermost level to, and without, one half."""
    return [NormalDist().inv_cdf(_TAIL + (0.5 - _TAIL) * number / count) for number in range(count)]


_POSITIVE, _NEGATIVE = _quantiles(8), _quantiles(7)
LEVELS = tuple(sorted(value / _POSITIVE[0] for value in (*_POSITIVE, 0.0, *(-value for value in _NEGATIVE))))


def quantise(weight: Tensor, kind: CodeKind, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix.

    Args:
        weight: ``(out, in)``; for nf4 of whole blocks, and with an even ``in``.
        dtype: that is computed in, of the scales.

    Returns:
        int8 ``(out, in)`` and ``(out, 1)``, or uint8 ``(out, in / 2)`` and ``(blocks, 1)``.
    """
    if kind == "int8":
        scales = (weight.float().abs().amax(1, keepdim=True) / _LARGEST).to(dtype)
        codes = (weight.float() / _not_zero(scales)).round_().clamp_(-_LARGEST, _LARGEST)
        return codes.to(torch.int8), scales
    blocks = weight.float().reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True).to(dtype)
    between = torch.tensor([(low + high) / 2 for low, high in pairwise(LEVELS)], device=weight.device)
    levels = torch.bucketize(blocks / _not_zero(scales), between, out_int32=True).to(torch.uint8)
    return levels[:, ::2].mul(16).add_(levels[:, 1::2]).view(weight.shape[0], -1), scales


def _not_zero(scales: Tensor) -> Tensor:
    return scales.float().masked_fill(scales == 0, 1)


def dequantised(codes: Tensor, scales: Tensor) -> Tensor:
    """The matrix that codes and scales stand for, in the type of the scales."""
    if codes.dtype == torch.int8:
        return codes * scales  # one pass: integers are converted as they are read
    if kernels := _kernels(codes.device):
        matrix: Tensor = kernels.dequantised(codes, scales, _levels(codes.device, scales.dtype))
        return matrix
    pairs = F.embedding(codes.int(), _pairs(codes.device, scales.dtype))
    return pairs.view(-1, BLOCK).mul_(scales).view(codes.shape[0], -1)


@cache
def _levels(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(LEVELS, device=device, dtype=dtype)


@cache
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two values of each byte."""
    return torch.cartesian_prod(_levels(device, dtype), _levels(device, dtype))


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The module of Triton kernels, or None where they don't run."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 5):
        return None
    try:
        from dreambooth_sm.training import quantised_triton as kernels
        from dreambooth_sm.training.adamw_blockwise_triton import INTERPRETED
    except ImportError:
        return None
    return kernels if device.type == "cuda" or INTERPRETED else None


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weights are codes and scales.

    Attributes:
        codes, scales: see :func:`quantise`; parameters, as those stay shared where a module is moved.
    """

    def __init__(self, linear: nn.Linear, kind: CodeKind, dtype: torch.dtype, device: torch.device) -> None:
        """
        Args:
            device: that quantises; the layer stays where ``linear`` is.
        """
        nn.Module.__init__(self)  # a linear layer's own makes weights
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        home = linear.weight.device
        codes, scales = quantise(linear.weight.detach().to(device), kind, dtype)
        self.codes = nn.Parameter(codes.to(home), requires_grad=False)
        self.scales = nn.Parameter(scales.to(home), requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The whole weights, made anew."""
        return dequantised(self.codes, self.scales)

    def forward(self, states: Tensor) -> Tensor:
        result: Tensor = _QuantisedProduct.apply(states, self.codes, self.scales, self.bias)
        return result


class _QuantisedProduct(torch.autograd.Function):
    """``x W^T + b``, which keeps codes instead of W for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(states, dequantised(codes, scales), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ dequantised(*ctx.saved_tensors), None, None, None


def quantise_linears(module: nn.Module, kind: CodeKind, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces the linear layers of a module, one after another; layers of odd shapes stay as they are.

    Args:
        dtype: that is computed in.
        device: that quantises; the module stays where it is.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and not (child.in_features % 2 or child.weight.numel() % BLOCK):
                setattr(parent, name, QuantisedLinear(child, kind, dtype, device))


def is_quantised(module: nn.Module) -> bool:
    """Whether layers of a module are."""
    return any(isinstance(layer, QuantisedLinear) for layer in module.modules())
