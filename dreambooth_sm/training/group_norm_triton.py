"""Triton kernels of `group_norm`: GroupNorm, and SiLU behind it, of images whose channels lie side by side.

A step has only some 64 pairs of picture and group, too few programs for a card. So the passes over an image know
nothing of groups: a program reduces some rows (a row: the channels of one pixel) of some channels to sums by channel,
and a small kernel in between makes what each group needs of them. Nothing is summed with atomics: the same input
gives the same bits. Groups' widths, such as 10 or 60 channels, then need not fit a block either, and every load is a
dense one.
"""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# What a program has in registers at a time. The UNets' channels are multiples of 64.
ROWS, CHANNELS = 64, 64
# Stretches that the rows of an image are reduced in, at most; a group's parts are then one tile.
SPLITS = 32
# Channels of a group, at most.
WIDEST_GROUP = 128


@triton.jit
def _tile(channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The channels of this program, and the offsets of a tile's elements from the image's first row of the tile."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    offsets = tl.arange(0, ROWS)[:, None] * channels + channel[None, :]
    return channel, offsets


@triton.jit
def _normalised(x, channel, inside, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, groups, width):
    """What the norm makes of a tile before weight and bias; the weight, and what comes after both."""
    group = tl.program_id(2) * groups + channel // width
    mean = tl.load(mean_ptr + group, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    normalised = (x - mean[None, :]) * rstd[None, :]
    return normalised, weight, normalised * weight[None, :] + bias[None, :]


@triton.jit
def _before_silu(grad, u):
    """The gradient before SiLU, whose input was `u`."""
    sigmoid = tl.sigmoid(u)
    return grad * sigmoid * (1.0 + u * (1.0 - sigmoid))


@triton.jit(do_not_specialize=["rows", "rows_of_split"])
def _moments(x_ptr, means_ptr, squares_ptr, rows, channels, rows_of_split, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean of each channel over the rows of a split, and the sum of squared distances from it.

    Tile by tile, each with its own mean (Chan et al. 1979): large means cancel nothing.
    """
    channel, offsets = _tile(channels, ROWS, CHANNELS)
    image_ptr = x_ptr + tl.program_id(2) * rows * channels
    first = tl.program_id(0) * rows_of_split
    last = tl.minimum(first + rows_of_split, rows)
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for row in range(first, last, ROWS):
        inside = (row + tl.arange(0, ROWS) < last)[:, None] & (channel < channels)[None, :]
        x = tl.load(image_ptr + row * channels + offsets, mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(last - row, ROWS).to(tl.float32)
        before = (row - first).to(tl.float32)
        mean_here = tl.sum(x, 0) / count
        distance = tl.where(inside, x - mean_here[None, :], 0.0)
        difference = mean_here - mean
        squares += tl.sum(distance * distance, 0) + difference * difference * (before * count / (before + count))
        mean += difference * (count / (before + count))
    out = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    tl.store(means_ptr + out, mean, mask=channel < channels)
    tl.store(squares_ptr + out, squares, mask=channel < channels)


@triton.jit(do_not_specialize=["rows", "rows_of_split", "splits", "width"])
def _statistics(
    means_ptr,
    squares_ptr,
    mean_ptr,
    rstd_ptr,
    eps,
    rows,
    channels,
    rows_of_split,
    splits,
    width,
    SPLITS: tl.constexpr,
    WIDEST_GROUP: tl.constexpr,
):
    """Mean and reciprocal deviation of a group, from its channels' in each split."""
    split = tl.arange(0, SPLITS)[:, None]
    lane = tl.arange(0, WIDEST_GROUP)[None, :]
    offsets = (tl.program_id(1) * splits + split) * channels + tl.program_id(0) * width + lane
    inside = (split < splits) & (lane < width)
    count = tl.where(inside, tl.minimum(rows - split * rows_of_split, rows_of_split), 0).to(tl.float32)
    means = tl.load(means_ptr + offsets, mask=inside, other=0.0)
    squares = tl.load(squares_ptr + offsets, mask=inside, other=0.0)
    elements = rows.to(tl.float32) * width.to(tl.float32)
    mean = tl.sum(tl.sum(means * count, 1), 0) / elements
    distance = means - mean
    variance = tl.sum(tl.sum(squares + count * distance * distance, 1), 0) / elements
    out = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(mean_ptr + out, mean)
    tl.store(rstd_ptr + out, 1.0 / tl.sqrt(variance + eps))


@triton.jit(do_not_specialize=["rows", "groups", "width"])
def _apply(
    x_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    channels,
    groups,
    width,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel, offsets = _tile(channels, ROWS, CHANNELS)
    row = tl.program_id(0) * ROWS
    offsets += (tl.program_id(2) * rows + row) * channels
    inside = (row + tl.arange(0, ROWS) < rows)[:, None] & (channel < channels)[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    _, _, y = _normalised(x, channel, channel < channels, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, groups, width)
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_of_split", "groups", "width"])
def _sums(
    grad_ptr,
    x_ptr,
    grads_ptr,
    products_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    channels,
    rows_of_split,
    groups,
    width,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums, of each channel over the rows of a split, of the gradient and of its products with the normalised x."""
    channel, offsets = _tile(channels, ROWS, CHANNELS)
    image = tl.program_id(2) * rows * channels
    first = tl.program_id(0) * rows_of_split
    last = tl.minimum(first + rows_of_split, rows)
    grads = tl.zeros([CHANNELS], tl.float32)
    products = tl.zeros([CHANNELS], tl.float32)
    for row in range(first, last, ROWS):
        inside = (row + tl.arange(0, ROWS) < last)[:, None] & (channel < channels)[None, :]
        here = image + row * channels + offsets
        x = tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + here, mask=inside, other=0.0).to(tl.float32)
        normalised, _, u = _normalised(
            x, channel, channel < channels, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, groups, width
        )
        if SILU:
            grad = _before_silu(grad, u)
        grads += tl.sum(grad, 0)
        products += tl.sum(grad * normalised, 0)
    out = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    tl.store(grads_ptr + out, grads, mask=channel < channels)
    tl.store(products_ptr + out, products, mask=channel < channels)


@triton.jit(do_not_specialize=["rows", "splits", "width"])
def _group_means(
    grads_ptr,
    products_ptr,
    weight_ptr,
    grad_mean_ptr,
    product_mean_ptr,
    rows,
    channels,
    splits,
    width,
    SPLITS: tl.constexpr,
    WIDEST_GROUP: tl.constexpr,
):
    """Means over a group of the gradient of the normalised x, and of its products with it."""
    split = tl.arange(0, SPLITS)[:, None]
    lane = tl.arange(0, WIDEST_GROUP)[None, :]
    channel = tl.program_id(0) * width + lane
    offsets = (tl.program_id(1) * splits + split) * channels + channel
    inside = (split < splits) & (lane < width)
    weight = tl.load(weight_ptr + channel, mask=lane < width, other=0.0).to(tl.float32)
    grads = tl.load(grads_ptr + offsets, mask=inside, other=0.0) * weight
    products = tl.load(products_ptr + offsets, mask=inside, other=0.0) * weight
    elements = rows.to(tl.float32) * width.to(tl.float32)
    out = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(grad_mean_ptr + out, tl.sum(tl.sum(grads, 1), 0) / elements)
    tl.store(product_mean_ptr + out, tl.sum(tl.sum(products, 1), 0) / elements)


@triton.jit(do_not_specialize=["parts"])
def _affine_grads(
    grads_ptr,
    products_ptr,
    weight_grad_ptr,
    bias_grad_ptr,
    parts,
    channels,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The gradients of weight and bias, from the sums of all splits of all images."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    grads = tl.zeros([SPLITS, CHANNELS], tl.float32)
    products = tl.zeros([SPLITS, CHANNELS], tl.float32)
    for first in range(0, parts, SPLITS):
        part = first + tl.arange(0, SPLITS)
        inside = (part < parts)[:, None] & (channel < channels)[None, :]
        offsets = part[:, None] * channels + channel[None, :]
        grads += tl.load(grads_ptr + offsets, mask=inside, other=0.0)
        products += tl.load(products_ptr + offsets, mask=inside, other=0.0)
    inside = channel < channels
    tl.store(weight_grad_ptr + channel, tl.sum(products, 0).to(weight_grad_ptr.dtype.element_ty), mask=inside)
    tl.store(bias_grad_ptr + channel, tl.sum(grads, 0).to(bias_grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "groups", "width"])
def _input_grad(
    grad_ptr,
    x_ptr,
    result_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    grad_mean_ptr,
    product_mean_ptr,
    rows,
    channels,
    groups,
    width,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel, offsets = _tile(channels, ROWS, CHANNELS)
    row = tl.program_id(0) * ROWS
    offsets += (tl.program_id(2) * rows + row) * channels
    present = channel < channels
    inside = (row + tl.arange(0, ROWS) < rows)[:, None] & present[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    normalised, weight, u = _normalised(x, channel, present, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, groups, width)
    if SILU:
        grad = _before_silu(grad, u)
    group = tl.program_id(2) * groups + channel // width
    rstd = tl.load(rstd_ptr + group, mask=present, other=0.0)
    grad_mean = tl.load(grad_mean_ptr + group, mask=present, other=0.0)
    product_mean = tl.load(product_mean_ptr + group, mask=present, other=0.0)
    result = (grad * weight[None, :] - grad_mean[None, :] - normalised * product_mean[None, :]) * rstd[None, :]
    tl.store(result_ptr + offsets, result.to(result_ptr.dtype.element_ty), mask=inside)


def _rows_of_split(rows: int) -> int:
    return ROWS * triton.cdiv(rows, ROWS * SPLITS)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `group_norm.reference_forward` does."""
    images, channels = x.shape[:2]
    rows, width = x.shape[2] * x.shape[3], channels // groups
    rows_of_split = _rows_of_split(rows)
    splits = triton.cdiv(rows, rows_of_split)
    blocks = triton.cdiv(channels, CHANNELS)
    means, squares = x.new_empty((2, images, splits, channels), dtype=torch.float32)
    mean, rstd = x.new_empty((2, images, groups), dtype=torch.float32)
    y = torch.empty_like(x)
    _moments[(splits, blocks, images)](
        x, means, squares, rows, channels, rows_of_split, ROWS=ROWS, CHANNELS=CHANNELS, num_warps=4
    )
    _statistics[(groups, images)](
        means, squares, mean, rstd, eps, rows, channels, rows_of_split, splits, width,
        SPLITS=SPLITS, WIDEST_GROUP=WIDEST_GROUP, num_warps=8,
    )  # fmt: skip
    _apply[(triton.cdiv(rows, ROWS), blocks, images)](
        x, y, mean, rstd, weight, bias, rows, channels, groups, width,
        SILU=silu, ROWS=ROWS, CHANNELS=CHANNELS, num_warps=4,
    )  # fmt: skip
    return y, mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    silu: bool,
    of_input: bool,
    of_affine: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Does what `group_norm.reference_backward` does."""
    images, channels = x.shape[:2]
    groups = mean.shape[1]
    rows, width = x.shape[2] * x.shape[3], channels // groups
    rows_of_split = _rows_of_split(rows)
    splits = triton.cdiv(rows, rows_of_split)
    blocks = triton.cdiv(channels, CHANNELS)
    grads, products = x.new_empty((2, images, splits, channels), dtype=torch.float32)
    _sums[(splits, blocks, images)](
        grad, x, grads, products, mean, rstd, weight, bias, rows, channels, rows_of_split, groups, width,
        SILU=silu, ROWS=ROWS, CHANNELS=CHANNELS, num_warps=8,
    )  # fmt: skip
    input_grad = weight_grad = bias_grad = None
    if of_affine:
        weight_grad, bias_grad = torch.empty_like(weight), torch.empty_like(bias)
        _affine_grads[(blocks,)](
            grads, products, weight_grad, bias_grad, images * splits, channels,
            SPLITS=SPLITS, CHANNELS=CHANNELS, num_warps=4,
        )  # fmt: skip
    if of_input:
        grad_mean, product_mean = torch.empty_like(mean), torch.empty_like(mean)
        input_grad = torch.empty_like(x)
        _group_means[(groups, images)](
            grads, products, weight, grad_mean, product_mean, rows, channels, splits, width,
            SPLITS=SPLITS, WIDEST_GROUP=WIDEST_GROUP, num_warps=8,
        )  # fmt: skip
        _input_grad[(triton.cdiv(rows, ROWS), blocks, images)](
            grad, x, input_grad, mean, rstd, weight, bias, grad_mean, product_mean, rows, channels, groups, width,
            SILU=silu, ROWS=ROWS, CHANNELS=CHANNELS, num_warps=8,
        )  # fmt: skip
    return input_grad, weight_grad, bias_grad
