"""Frozen linear layers and convolutions in 8 or 4 bits a weight, beside which adapters are trained.

``int8``: rows of integers, each row with a scale. ``nf4``: blocks of 64 values, each the nearest of 16 levels times the
block's largest value; the levels are quantiles of a normal distribution (Dettmers et al. 2023, "QLoRA: Efficient
Finetuning of Quantized LLMs"). A pass makes the weights of a layer in 16 bits from them, and drops them again;
activations and gradients are never quantised. Nothing here waits for the device: steps can be captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from itertools import pairwise
from statistics import NormalDist
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from dreambooth_sm.training.kernels import kernels_for

CodeKind = Literal["int8", "nf4"]
# Values that share a scale in nf4.
BLOCK = 64
# Convolutions of no more channels read or make latents: few weights, on which all others depend.
_LATENT_CHANNELS = 16
_LARGEST = 127
# Probability of the outermost levels, between that of 15 and that of 16 levels.
_TAIL = 1 - (1 / 30 + 1 / 32) / 2
# By device.
_kernels = partial(kernels_for, "quantised_triton")


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
    kernels = _kernels(codes.device)
    if codes.dtype == torch.int8:
        matrix: Tensor = kernels.scaled(codes, scales) if kernels else codes * scales
        return matrix
    if kernels:
        matrix = kernels.dequantised(codes, scales, _levels(codes.device, scales.dtype))
        return matrix
    pairs = F.embedding(codes.int(), _pairs(codes.device, scales.dtype))
    return pairs.view(-1, BLOCK).mul_(scales).view(codes.shape[0], -1)


# Within `asked_often`: whether values are asked for, and the last layer with its weights.
_asked: ContextVar[_Asked | None] = ContextVar("_asked", default=None)


@contextmanager
def asked_often(*, values: bool) -> Iterator[None]:
    """Makes ``weight`` of quantised layers cheap for a library that asks each layer for it many times, one by one.

    Args:
        values: whether it reads them, so that they are made, once a layer; otherwise zeros that take no memory tell
            shape, type and device.
    """
    before = _asked.set(_Asked(values))
    try:
        yield
    finally:
        _asked.reset(before)


class _Asked:
    def __init__(self, values: bool) -> None:
        self._values = values
        self._last: tuple[nn.Module, Tensor] | None = None

    def weight(self, layer: QuantisedLayer) -> Tensor:
        if self._last is None or self._last[0] is not layer:
            weight = layer.made() if self._values else layer.scales.new_zeros(()).expand(layer.shape)
            self._last = layer, weight
        return self._last[1]


@cache
def _levels(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(LEVELS, device=device, dtype=dtype)


@cache
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two values of each byte."""
    return torch.cartesian_prod(_levels(device, dtype), _levels(device, dtype))


class QuantisedLayer(nn.Module):
    """A frozen layer whose weights are codes and scales.

    Attributes:
        codes, scales: see :func:`quantise`; parameters, as those stay shared where a module is moved.
        bias: the layer's own.
    """

    bias: Any

    @property
    def kind(self) -> CodeKind:
        return "int8" if self.codes.dtype == torch.int8 else "nf4"

    @property
    def weight(self) -> Tensor:
        """The whole weights, made each time but within :func:`asked_often`."""
        asked = _asked.get()
        return asked.weight(self) if asked else self.made()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights."""
        raise NotImplementedError

    def made(self) -> Tensor:
        """The weights that the codes stand for."""
        raise NotImplementedError

    def _quantise(self, layer: Any, matrix: Tensor, kind: CodeKind, dtype: torch.dtype, device: torch.device) -> None:
        codes, scales = quantise(matrix.to(device), kind, dtype)
        self.codes = nn.Parameter(codes.to(matrix.device), requires_grad=False)
        self.scales = nn.Parameter(scales.to(matrix.device), requires_grad=False)
        self.bias = layer.bias

    def product(self, rows: Tensor) -> Tensor:
        """Multiplies ``(..., in)`` with the matrix that the codes stand for, and adds the bias."""
        result: Tensor = _QuantisedProduct.apply(rows, self.codes, self.scales, self.bias)
        return result


class QuantisedLinear(QuantisedLayer, nn.Linear):  # type: ignore[override]
    """A frozen linear layer; ``codes`` are of its matrix."""

    def __init__(self, linear: nn.Linear, kind: CodeKind, dtype: torch.dtype, device: torch.device) -> None:
        """
        Args:
            device: that quantises; the layer stays where ``linear`` is.
        """
        nn.Module.__init__(self)  # a linear layer's own makes weights
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._quantise(linear, linear.weight.detach(), kind, dtype, device)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def made(self) -> Tensor:
        return dequantised(self.codes, self.scales)

    def forward(self, states: Tensor) -> Tensor:
        return self.product(states)


class QuantisedConv2d(QuantisedLayer, nn.Conv2d):  # type: ignore[override]
    """A frozen convolution; ``codes`` are of its weights as ``(out, height * width * in)``: channels_last."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        # PEFT makes an adapter's matrices with the class of the convolution that they lie beside: they are torch's own.
        if arguments and not isinstance(arguments[0], nn.Module):
            return nn.Conv2d(*arguments, **options)
        return super().__new__(cls)

    def __init__(self, conv: nn.Conv2d, kind: CodeKind, dtype: torch.dtype, device: torch.device) -> None:
        """
        Args:
            conv: of one group, padded with zeros.
            device: that quantises; the layer stays where ``conv`` is.
        """
        nn.Module.__init__(self)  # a convolution's own makes weights
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, 1
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, "zeros"
        matrix = conv.weight.detach().permute(0, 2, 3, 1).reshape(conv.out_channels, -1)
        self._quantise(conv, matrix, kind, dtype, device)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels, *self.kernel_size

    def made(self) -> Tensor:
        return _kernel(self.codes, self.scales, self)

    def forward(self, image: Tensor) -> Tensor:
        return convolve_frozen(self, image, self.bias)


def convolve_frozen(conv: nn.Conv2d, image: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution that is not trained, quantised or not; the image is not kept, as torch's own keeps it.

    Args:
        conv: of one group, padded with zeros.
        bias: that is added, whatever the layer's own.
    """
    is_quantised = isinstance(conv, QuantisedConv2d)
    weight, scales = (conv.codes, conv.scales) if is_quantised else (conv.weight, None)
    result: Tensor = _FrozenConvolution.apply(image, weight, scales, bias, conv)
    return result


def _kernel(weight: Tensor, scales: Tensor | None, conv: nn.Conv2d) -> Tensor:
    if scales is None:
        return weight
    return dequantised(weight, scales).view(len(weight), *conv.kernel_size, -1).permute(0, 3, 1, 2)


class _QuantisedProduct(torch.autograd.Function):
    """``x W^T + b``, which keeps codes instead of W for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(states, dequantised(codes, scales), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ dequantised(*ctx.saved_tensors), None, None, None


class _FrozenConvolution(torch.autograd.Function):
    """A convolution with a gradient for its image alone; of weights in fewer bits it keeps the codes."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None, conv: nn.Conv2d
    ) -> Tensor:
        ctx.save_for_backward(weight, scales)
        ctx.conv, ctx.shape = conv, image.shape
        return F.conv2d(image, _kernel(weight, scales, conv), bias, conv.stride, conv.padding, conv.dilation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        conv, (weight, scales) = ctx.conv, ctx.saved_tensors
        weight = _kernel(weight, scales, conv)
        grad = conv2d_input(ctx.shape, weight, grads[0], conv.stride, conv.padding, conv.dilation)
        return grad, None, None, None, None


def quantise_layers(module: nn.Module, kind: CodeKind, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces the linear layers and convolutions of a module, one after another.

    Those that are trained or of odd shapes stay as they are, and convolutions that read or make latents. Layers with
    other codes get these. Those on the meta device wait for their weights.

    Args:
        dtype: that is computed in.
        device: that quantises; the module stays where it is.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantisedLayer):
                if child.kind == kind:
                    continue
            elif device.type != "meta" and any(weight.is_meta for weight in child.parameters(recurse=False)):
                continue
            if isinstance(child, QuantisedLinear) or (type(child) is nn.Linear and _is_whole(child.weight)):
                setattr(parent, name, QuantisedLinear(child, kind, dtype, device))
            elif isinstance(child, QuantisedConv2d) or (is_plain_convolution(child) and _is_inner(child)):
                setattr(parent, name, QuantisedConv2d(child, kind, dtype, device))


def _is_whole(weight: Tensor) -> bool:
    """Whether a weight is frozen, and of whole blocks."""
    return not (weight.requires_grad or weight[0].numel() % 2 or weight.numel() % BLOCK)


def is_plain_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is torch's own convolution, of one group and padded with zeros."""
    if type(module) is not nn.Conv2d:
        return False
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _is_inner(conv: nn.Conv2d) -> bool:
    return min(conv.in_channels, conv.out_channels) > _LATENT_CHANNELS and _is_whole(conv.weight)


def is_quantised(module: nn.Module) -> bool:
    """Whether layers of a module are."""
    return any(isinstance(layer, QuantisedLayer) for layer in module.modules())
