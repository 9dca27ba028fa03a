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
def _added(channel, channels, shift_ptr, offset_ptr, shifted):
    """What is added to the channels before the norm: a shift of this image, and an offset of all."""
    inside = channel < channels * shifted
    shift = tl.load(shift_ptr + tl.program_id(2) * channels + channel, mask=inside, other=0.0).to(tl.float32)
    return shift + tl.load(offset_ptr + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _affine(channel, channels, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, groups, width):
    """Of each channel the mean and reciprocal deviation of its group, the weight and the bias."""
    inside = channel < channels
    group = tl.program_id(2) * groups + channel // width
    mean = tl.load(mean_ptr + group, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    return mean, rstd, weight, bias


@triton.jit
def _before_silu(grad, u, silu):
    """The gradient before SiLU, whose input was `u`; the gradient itself without SiLU."""
    sigmoid = tl.sigmoid(u)
    return tl.where(silu != 0, grad * sigmoid * (1.0 + u * (1.0 - sigmoid)), grad)


@triton.jit(do_not_specialize=["rows", "rows_of_split", "shifted"])
def _moments(
    x_ptr,
    means_ptr,
    squares_ptr,
    shift_ptr,
    offset_ptr,
    rows,
    channels,
    rows_of_split,
    shifted,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
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
    mean += _added(channel, channels, shift_ptr, offset_ptr, shifted)
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


@triton.jit(do_not_specialize=["rows", "groups", "width", "shifted", "silu"])
def _apply(
    x_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    shift_ptr,
    offset_ptr,
    rows,
    channels,
    groups,
    width,
    shifted,
    silu,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel, offsets = _tile(channels, ROWS, CHANNELS)
    row = tl.program_id(0) * ROWS
    offsets += (tl.program_id(2) * rows + row) * channels
    inside = (row + tl.arange(0, ROWS) < rows)[:, None] & (channel < channels)[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    mean, rstd, weight, bias = _affine(channel, channels, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, groups, width)
    mean -= _added(channel, channels, shift_ptr, offset_ptr, shifted)
    y = (x - mean[None, :]) * rstd[None, :] * weight[None, :] + bias[None, :]
    y = tl.where(silu != 0, y * tl.sigmoid(y), y)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_of_split", "groups", "width", "shifted", "silu"])
def _sums(
    grad_ptr,
    x_ptr,
    grads_ptr,
    products_ptr,
    values_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    shift_ptr,
    offset_ptr,
    rows,
    channels,
    rows_of_split,
    groups,
    width,
    shifted,
    silu,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums of each channel over the rows of a split: of the gradient before SiLU, of its products with the normalised
    x, and of the latter where that is asked for."""
    channel, offsets = _tile(channels, ROWS, CHANNELS)
    image = tl.program_id(2) * rows * channels
    first = tl.program_id(0) * rows_of_split
    last = tl.minimum(first + rows_of_split, rows)
    mean, rstd, weight, bias = _affine(channel, channels, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, groups, width)
    mean -= _added(channel, channels, shift_ptr, offset_ptr, shifted)
    grads = tl.zeros([CHANNELS], tl.float32)
    products = tl.zeros([CHANNELS], tl.float32)
    values = tl.zeros([CHANNELS], tl.float32)
    for row in range(first, last, ROWS):
        inside = (row + tl.arange(0, ROWS) < last)[:, None] & (channel < channels)[None, :]
        here = image + row * channels + offsets
        x = tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + here, mask=inside, other=0.0).to(tl.float32)
        normalised = (x - mean[None, :]) * rstd[None, :]
        grad = _before_silu(grad, normalised * weight[None, :] + bias[None, :], silu)
        grads += tl.sum(grad, 0)
        products += tl.sum(grad * normalised, 0)
        if VALUES:
            values += tl.sum(tl.where(inside, normalised, 0.0), 0)
    out = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    tl.store(grads_ptr + out, grads, mask=channel < channels)
    tl.store(products_ptr + out, products, mask=channel < channels)
    if VALUES:
        tl.store(values_ptr + out, values, mask=channel < channels)


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


@triton.jit(do_not_specialize=["rows", "splits", "groups", "width"])
def _added_grads(
    grads_ptr,
    values_ptr,
    result_ptr,
    rstd_ptr,
    weight_ptr,
    grad_mean_ptr,
    product_mean_ptr,
    rows,
    channels,
    splits,
    groups,
    width,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The gradient of what was added to a channel: the sum of the input's, made of sums that are there."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    split = tl.arange(0, SPLITS)
    inside = (split < splits)[:, None] & present[None, :]
    offsets = (tl.program_id(2) * splits + split)[:, None] * channels + channel[None, :]
    grads = tl.sum(tl.load(grads_ptr + offsets, mask=inside, other=0.0), 0)
    values = tl.sum(tl.load(values_ptr + offsets, mask=inside, other=0.0), 0)
    group = tl.program_id(2) * groups + channel // width
    rstd = tl.load(rstd_ptr + group, mask=present, other=0.0)
    grad_mean = tl.load(grad_mean_ptr + group, mask=present, other=0.0)
    product_mean = tl.load(product_mean_ptr + group, mask=present, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=present, other=0.0).to(tl.float32)
    result = (grads * weight - rows.to(tl.float32) * grad_mean - values * product_mean) * rstd
    tl.store(result_ptr + tl.program_id(2) * channels + channel, result, mask=present)


@triton.jit(do_not_specialize=["rows", "groups", "width", "shifted", "silu"])
def _input_grad(
    grad_ptr,
    x_ptr,
    result_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    shift_ptr,
    offset_ptr,
    grad_mean_ptr,
    product_mean_ptr,
    rows,
    channels,
    groups,
    width,
    shifted,
    silu,
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
    mean, rstd, weight, bias = _affine(channel, channels, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, groups, width)
    mean -= _added(channel, channels, shift_ptr, offset_ptr, shifted)
    normalised = (x - mean[None, :]) * rstd[None, :]
    grad = _before_silu(grad, normalised * weight[None, :] + bias[None, :], silu)
    group = tl.program_id(2) * groups + channel // width
    grad_mean = tl.load(grad_mean_ptr + group, mask=present, other=0.0)
    product_mean = tl.load(product_mean_ptr + group, mask=present, other=0.0)
    result = (grad * weight[None, :] - grad_mean[None, :] - normalised * product_mean[None, :]) * rstd[None, :]
    tl.store(result_ptr + offsets, result.to(result_ptr.dtype.element_ty), mask=inside)


def _rows_of_split(rows: int) -> int:
    return ROWS * triton.cdiv(rows, ROWS * SPLITS)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    offset: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `group_norm.reference_forward` does."""
    images, channels = x.shape[:2]
    rows, width = x.shape[2] * x.shape[3], channels // groups
    rows_of_split = _rows_of_split(rows)
    splits = triton.cdiv(rows, rows_of_split)
    blocks = triton.cdiv(channels, CHANNELS)
    # What is not there is not read.
    added, shifted = (x if shift is None else shift, x if offset is None else offset), int(shift is not None)
    means, squares = x.new_empty((2, images, splits, channels), dtype=torch.float32)
    mean, rstd = x.new_empty((2, images, groups), dtype=torch.float32)
    y = torch.empty_like(x)
    _moments[(splits, blocks, images)](
        x, means, squares, *added, rows, channels, rows_of_split, shifted,
        ROWS=ROWS, CHANNELS=CHANNELS, num_warps=4,
    )  # fmt: skip
    _statistics[(groups, images)](
        means, squares, mean, rstd, eps, rows, channels, rows_of_split, splits, width,
        SPLITS=SPLITS, WIDEST_GROUP=WIDEST_GROUP, num_warps=8,
    )  # fmt: skip
    _apply[(triton.cdiv(rows, ROWS), blocks, images)](
        x, y, mean, rstd, weight, bias, *added, rows, channels, groups, width, shifted, int(silu),
        ROWS=ROWS, CHANNELS=CHANNELS, num_warps=4,
    )  # fmt: skip
    return y, mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    offset: Tensor | None,
    silu: bool,
    of_affine: bool,
    of_added: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Does what `group_norm.reference_backward` does."""
    images, channels = x.shape[:2]
    groups = mean.shape[1]
    rows, width = x.shape[2] * x.shape[3], channels // groups
    rows_of_split = _rows_of_split(rows)
    splits = triton.cdiv(rows, rows_of_split)
    blocks = triton.cdiv(channels, CHANNELS)
    added, shifted = (x if shift is None else shift, x if offset is None else offset), int(shift is not None)
    grads, products, values = x.new_empty((3, images, splits, channels), dtype=torch.float32)
    _sums[(splits, blocks, images)](
        grad, x, grads, products, values, mean, rstd, weight, bias, *added, rows, channels, rows_of_split, groups,
        width, shifted, int(silu), VALUES=of_added, ROWS=ROWS, CHANNELS=CHANNELS, num_warps=8,
    )  # fmt: skip
    grad_mean, product_mean = torch.empty_like(mean), torch.empty_like(mean)
    _group_means[(groups, images)](
        grads, products, weight, grad_mean, product_mean, rows, channels, splits, width,
        SPLITS=SPLITS, WIDEST_GROUP=WIDEST_GROUP, num_warps=8,
    )  # fmt: skip
    input_grad = torch.empty_like(x)
    _input_grad[(triton.cdiv(rows, ROWS), blocks, images)](
        grad, x, input_grad, mean, rstd, weight, bias, *added, grad_mean, product_mean, rows, channels, groups, width,
        shifted, int(silu), ROWS=ROWS, CHANNELS=CHANNELS, num_warps=8,
    )  # fmt: skip
    weight_grad = bias_grad = added_grad = None
    if of_affine:
        weight_grad, bias_grad = torch.empty_like(weight), torch.empty_like(bias)
        _affine_grads[(blocks,)](
            grads, products, weight_grad, bias_grad, images * splits, channels,
            SPLITS=SPLITS, CHANNELS=CHANNELS, num_warps=4,
        )  # fmt: skip
    if of_added:
        added_grad = x.new_empty((images, channels), dtype=torch.float32)
        _added_grads[(1, blocks, images)](
            grads, values, added_grad, rstd, weight, grad_mean, product_mean, rows, channels, splits, groups, width,
            SPLITS=SPLITS, CHANNELS=CHANNELS, num_warps=4,
        )  # fmt: skip
    return input_grad, weight_grad, bias_grad, added_grad
