"""Shared by the blockwise AdamW and its kernels: how moments are stored, and what changes from step to step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds a small float32 to the nearest integer.


@dataclass(frozen=True)
class PowerCode:
    """The map between a magnitude and its code: `scale * (code / levels) ** power`.

    Args:
        levels: largest code.
        power: 2, 3 or 4.
        stochastic: round stochastically, so that the expectation of what is stored is the value itself;
            otherwise round the code to nearest.
        smallest: smallest code that is given out.
    """

    levels: int
    power: int
    stochastic: bool
    smallest: int = 0

    def encode(self, magnitude: Tensor, scale: Tensor, random16: Tensor) -> Tensor:
        """Codes of non-negative values, not yet rounded if `stochastic` is off.

        Args:
            magnitude: (blocks, size) float32, at most `scale`.
            scale: (blocks, 1) float32, positive.
            random16: (blocks, size) int64, uniform in [0, 65536).
        """
        factor = self.levels**self.power * scale.reciprocal()
        if self.power == 2:
            root = (magnitude * factor).sqrt()
        elif self.power == 4:
            root = (magnitude.sqrt() * factor.sqrt()).sqrt()
        else:
            root = (magnitude.log2() * (1.0 / 3.0) + factor.log2() * (1.0 / 3.0)).exp2()
        if self.stochastic:
            # Rounds down. A hair more than a half keeps the largest root below `levels` despite its error, up to 255
            # levels; beyond, the limit does: one code more would wrap around to zero.
            below = ((root - 0.5002 + _MAGIC) - _MAGIC).clamp(self.smallest, self.levels - 1)
            step = 1.0 / 65536.0
            if self.power == 2:
                gap = below * (2 * step) + step
            elif self.power == 3:
                gap = (below * (3 * step) + 3 * step) * below + step
            else:
                gap = ((below * (4 * step) + 6 * step) * below + 4 * step) * below + step
            uniform = random16.to(torch.float32) + 0.5
            return torch.where(uniform * gap + self._raise(below) < magnitude * factor, below + 1.0, below)
        return root.clamp(min=self.smallest)

    def decode(self, code: Tensor) -> Tensor:
        """`levels ** power / scale` times the values of signed float32 codes."""
        return code * code.abs() if self.power == 2 else self._raise(code)

    def _raise(self, x: Tensor) -> Tensor:
        if self.power == 3:
            return x * x * x
        square = x * x
        return square if self.power == 2 else square * square


@dataclass(frozen=True)
class BlockFormat:
    """The format of the two moments of a block of `size` consecutive elements, with `bits` bits an element."""

    bits: int
    size: int
    m: PowerCode
    v: PowerCode

    @property
    def codes(self) -> int:
        """Elements of one moment's storage in a block."""
        return self.size // 2 if self.bits == 4 else self.size

    def blocks(self, elements: int) -> int:
        return -(-elements // self.size)

    def dtype(self, *, signed: bool) -> torch.dtype:
        """Returns the type that codes are stored as; with 4 bits two share a byte."""
        if self.bits == 16:
            return torch.int16 if signed else torch.uint16
        return torch.int8 if signed and self.bits == 8 else torch.uint8

    def unpack(self, stored: Tensor, *, signed: bool) -> Tensor:
        """(blocks * codes,) integers to (blocks, size) float32 codes."""
        if self.bits >= 8:
            return stored.view(-1, self.size).to(torch.float32)
        code = torch.stack([stored & 15, stored >> 4], dim=1).view(-1, self.size).to(torch.float32)
        return torch.where(code > 7, code - 16, code) if signed else code

    def pack(self, code: Tensor, *, signed: bool) -> Tensor:
        """(blocks, size) float32 codes, rounded to nearest, to (blocks * codes,) integers."""
        rounded = ((code + _MAGIC) - _MAGIC).flatten()
        if self.bits >= 8:
            return rounded.to(self.dtype(signed=signed))
        nibble = rounded.to(torch.int32) & 15
        return (nibble[0::2] | (nibble[1::2] << 4)).to(torch.uint8)


# Powers and roundings chosen by comparing, over 30 and 400 updates, with fp32 moments on gradients whose scale
# varies within a block by a log-normal factor (tests/unit/test_adamw_blockwise.py keeps the comparison).
BLOCK_FORMATS = {
    16: BlockFormat(16, 256, m=PowerCode(32767, 2, False), v=PowerCode(65535, 2, True, smallest=1)),
    8: BlockFormat(8, 256, m=PowerCode(127, 3, False), v=PowerCode(255, 4, True, smallest=1)),
    4: BlockFormat(4, 128, m=PowerCode(7, 2, True), v=PowerCode(15, 3, False, smallest=1)),
}


@dataclass
class Moments:
    """The quantised moments of one or several parameters, each padded to whole blocks, and the weights' rests.

    Attributes:
        m: (blocks * codes,) int8, or uint8 with 4 bits: codes of the first moment.
        v: (blocks * codes,) uint8: codes of the second moment.
        m_scale, v_scale: (blocks,) float32.
        residual: (blocks * size,) int16, what 16-bit weights lack; None without.
    """

    m: Tensor
    v: Tensor
    m_scale: Tensor
    v_scale: Tensor
    residual: Tensor | None

    @classmethod
    def zeros(cls, blocks: int, fmt: BlockFormat, residual: bool, device: torch.device) -> Moments:
        return cls(
            m=torch.zeros(blocks * fmt.codes, dtype=fmt.dtype(signed=True), device=device),
            v=torch.zeros(blocks * fmt.codes, dtype=fmt.dtype(signed=False), device=device),
            m_scale=torch.zeros(blocks, device=device),
            v_scale=torch.zeros(blocks, device=device),
            residual=torch.zeros(blocks * fmt.size, dtype=torch.int16, device=device) if residual else None,
        )

    def part(self, first: int, last: int, fmt: BlockFormat) -> Moments:
        """Views of the blocks from `first` up to `last`."""
        codes = slice(first * fmt.codes, last * fmt.codes)
        return Moments(
            m=self.m[codes],
            v=self.v[codes],
            m_scale=self.m_scale[first:last],
            v_scale=self.v_scale[first:last],
            residual=None if self.residual is None else self.residual[first * fmt.size : last * fmt.size],
        )


@dataclass(frozen=True)
class DeviceScalars:
    """Scalars that change from step to step, on the device, so that a captured CUDA graph reads the present values.

    Attributes:
        hyper: (1 + groups, 8) float32, written by the host before a step. Row 0: the step's random key as the bits
            of its first element. Row 1 + g: step size, 1 / sqrt(bias correction of v), lr * weight decay / step size,
            eps, beta1, beta2, 1 - beta1, 1 - beta2 of group g.
        control: (2,) float32, written by the device: the gradients' factor; whether to leave everything as it is.
        nonfinite: () float32, set to 1 by an update that meets a gradient which is not finite.
    """

    hyper: Tensor
    control: Tensor
    nonfinite: Tensor
