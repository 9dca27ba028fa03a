"""What an adapter does to one layer of a model, by the kind of its parameters. Computed in float32."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad


class Layer(Protocol):
    """What an adapter does to one weight.

    Attributes:
        kind: what people call it.
        rank: how many numbers pass through it, or the size of its blocks.
    """

    @property
    def kind(self) -> str: ...

    @property
    def rank(self) -> int: ...

    def change(self, weight: Tensor) -> Tensor:
        """What it adds, at full strength.

        Args:
            weight: of the base model, ``(out, in)`` or ``(out, in, height, width)``.
        """

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it is for a weight of this shape."""


@dataclass(frozen=True)
class LowRank:
    """LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"), and DoRA (Liu et al. 2024, "DoRA:
    Weight-Decomposed Low-Rank Adaptation").

    Attributes:
        down: ``(rank, in)``, or ``(rank, in, height, width)`` of a convolution.
        up: ``(out, rank)``, or ``(out, rank, 1, 1)``.
        scale: what the product is multiplied by.
        middle: ``(rank, rank, height, width)`` between both, which are then of single points (CP decomposition).
        magnitude: of DoRA: the norms that rows have in the end, ``(out, 1, ...)``, or columns, ``(1, in, ...)``.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    middle: Tensor | None = None
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        _check_ranks((self.up, self.down), self.middle)

    @property
    def kind(self) -> str:
        return "LoRA" if self.magnitude is None else "DoRA"

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    def folded(self) -> LowRank:
        """The same with a scale of 1."""
        return self if self.scale == 1 else replace(self, up=self.up.float() * self.scale, scale=1.0)

    def padded(self, rank: int) -> LowRank:
        """The same of a higher rank, with zeros."""
        more = rank - self.rank
        last = [0, 0] * (self.down.dim() - 2)
        return replace(
            self,
            down=pad(self.down, [*last, 0, 0, 0, more]),
            up=pad(self.up, [*[0, 0] * (self.up.dim() - 2), 0, more]),
            middle=None if self.middle is None else pad(self.middle, [0, 0, 0, 0, 0, more, 0, more]),
        )

    @classmethod
    def zeros(cls, rank: int, width: int, dtype: torch.dtype) -> LowRank:
        """One that changes nothing, of a square matrix."""
        return cls(torch.zeros(rank, width, dtype=dtype), torch.zeros(width, rank, dtype=dtype))

    def product(self) -> Tensor:
        """Of both matrices, without the scale; kernels flat, ``(out, in * height * width)``."""
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        if self.middle is None:
            return up @ down
        return torch.einsum("or,rs...,si->oi...", up, self.middle.float(), down).flatten(1)

    def change(self, weight: Tensor) -> Tensor:
        added = self.scale * self.product().reshape(weight.shape).to(weight.device)
        if self.magnitude is None:
            return added
        whole = weight.float() + added
        # All dimensions but the one that has a magnitude each.
        dims = [number for number, size in enumerate(self.magnitude.shape) if size == 1]
        norm = torch.linalg.vector_norm(whole, dim=dims or None, keepdim=True)
        return whole * (self.magnitude.to(whole) / norm) - weight.float()

    def fits(self, shape: tuple[int, ...]) -> bool:
        size = self.down[0].numel() if self.middle is None else self.down.shape[1] * self.middle[0, 0].numel()
        return self.up.shape[0] == shape[0] and size == torch.Size(shape[1:]).numel()


@dataclass(frozen=True)
class Hadamard:
    """LoHa: the elementwise product of two products of low rank (Hyeon-Woo et al. 2022, "FedPara").

    Attributes:
        first, second: ``(out, rank)`` and ``(rank, in * height * width)``; with a core ``(rank, out)`` and
            ``(rank, in)``.
        cores: ``(rank, rank, height, width)`` of both.
    """

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    scale: float = 1.0
    cores: tuple[Tensor, Tensor] | None = None

    kind = "LoHa"

    def __post_init__(self) -> None:
        for number, pair in enumerate((self.first, self.second)):
            _check_ranks(pair, self.cores[number] if self.cores else None, cored=self.cores is not None)

    @property
    def rank(self) -> int:
        return int(self.first[1].shape[0])

    def folded(self) -> Hadamard:
        """The same with a scale of 1."""
        return (
            self
            if self.scale == 1
            else replace(self, first=(self.first[0].float() * self.scale, self.first[1]), scale=1.0)
        )

    def change(self, weight: Tensor) -> Tensor:
        if self.cores is None:
            one, other = (left.float() @ right.float().flatten(1) for left, right in (self.first, self.second))
        else:
            one, other = (cored(core, *pair) for core, pair in zip(self.cores, (self.first, self.second), strict=True))
        return self.scale * (one * other).reshape(weight.shape).to(weight.device)

    def fits(self, shape: tuple[int, ...]) -> bool:
        left, right = self.first
        rows = left.shape[0] if self.cores is None else left.shape[1]
        kernel = 1 if self.cores is None else self.cores[0][0, 0].numel()
        return rows == shape[0] and right[0].numel() * kernel == torch.Size(shape[1:]).numel()


@dataclass(frozen=True)
class Kronecker:
    """LoKr: the Kronecker product of a small matrix and a larger one, of low rank or not (Edalati et al. 2022, "KronA";
    Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation").

    Attributes:
        first: ``(out / n, in / m)``, or two matrices whose product that is.
        second: ``(n, m)`` or ``(n, m, height, width)``, or two matrices whose product that is; with a core ``(rank,
            n)`` and ``(rank, m)``.
        core: ``(rank, rank, height, width)``.
    """

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    scale: float = 1.0
    core: Tensor | None = None

    kind = "LoKr"

    def __post_init__(self) -> None:
        for factor, core in ((self.first, None), (self.second, self.core)):
            if len(factor) == 2:
                _check_ranks((factor[0], factor[1]), core, cored=core is not None)
            elif factor[0].dim() < 2:
                raise ValueError(f"a factor has the shape {tuple(factor[0].shape)}")

    @property
    def rank(self) -> int:
        """Of the factors that are products; where there are none, that which a product would need."""
        for factor in (self.second, self.first):
            if len(factor) == 2:
                return int(factor[1].shape[0])
        return max(self.second[0].shape[:2])

    def folded(self) -> Kronecker:
        """The same with a scale of 1."""
        return (
            self
            if self.scale == 1
            else replace(self, first=(self.first[0].float() * self.scale, *self.first[1:]), scale=1.0)
        )

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of both factors' outputs, and of their inputs."""
        first = (self.first[0].shape[0], self.first[-1].shape[1])
        rows = self.second[0].shape[0 if self.core is None else 1]
        return (first[0], rows), (first[1], self.second[-1].shape[1])

    def factors(self) -> tuple[Tensor, Tensor]:
        """Both as matrices, the second with flat kernels."""
        first = self.first[0].float() @ self.first[1].float() if len(self.first) == 2 else self.first[0].float()
        if self.core is not None:
            return first, cored(self.core, *self.second).flatten(1)
        if len(self.second) == 2:
            return first, self.second[0].float() @ self.second[1].float().flatten(1)
        return first, self.second[0].float().flatten(1)

    def change(self, weight: Tensor) -> Tensor:
        return self.scale * torch.kron(*self.factors()).reshape(weight.shape).to(weight.device)

    def fits(self, shape: tuple[int, ...]) -> bool:
        rows, columns = zip(*(factor.shape for factor in self.factors()), strict=True)
        return rows[0] * rows[1] == shape[0] and columns[0] * columns[1] == torch.Size(shape[1:]).numel()


@dataclass(frozen=True)
class Rotation:
    """OFT: blocks of a layer's inputs are rotated (Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal
    Finetuning"), as PEFT has it.

    Attributes:
        angles: ``(blocks, size * (size - 1) / 2)``, above the diagonal of skew matrices; one block for all where there
            is only one.
        size: of a block.
        terms: of the series in place of the inverse in Cayley's transform; None for the inverse.
    """

    angles: Tensor
    size: int
    terms: int | None = 5

    kind = "OFT"

    def __post_init__(self) -> None:
        if self.angles.dim() != 2 or self.angles.shape[1] != self.size * (self.size - 1) // 2:
            raise ValueError(f"angles have the shape {tuple(self.angles.shape)}")

    @property
    def rank(self) -> int:
        return self.size

    def blocks(self) -> Tensor:
        """The rotations, ``(blocks, size, size)``: ``(I - Q) / (I + Q)`` of the skew ``Q``, or of ``-Q`` by the
        series."""
        rows, columns = torch.triu_indices(self.size, self.size, 1)
        skew = torch.zeros(len(self.angles), self.size, self.size)
        skew[:, rows, columns] = self.angles.float().cpu()
        skew = skew - skew.mT
        one = torch.eye(self.size).expand_as(skew)
        if self.terms is None:
            return torch.linalg.solve(one + skew, one - skew, left=False)
        # (I + Q) (I + Q + Q^2 + ...): twice every power but the first and the last.
        if self.terms < 3:
            return one + 2 * skew if self.terms == 2 else one
        turned = one + 2 * skew
        power = skew
        for _ in range(2, max(self.terms, 4) - 1):
            power = power @ skew
            turned = turned + 2 * power
        return turned + power @ skew

    def change(self, weight: Tensor) -> Tensor:
        flat = weight.float().flatten(1)
        blocks = self.blocks().to(weight.device)
        parts = flat.unflatten(1, (-1, self.size))
        turned = torch.einsum("obk,bck->obc", parts, blocks.expand(parts.shape[1], -1, -1))
        return turned.flatten(1).reshape(weight.shape) - weight.float()

    def fits(self, shape: tuple[int, ...]) -> bool:
        inputs = torch.Size(shape[1:]).numel()
        return inputs % self.size == 0 and len(self.angles) in (1, inputs // self.size)


def cored(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """A kernel ``(out, in, height, width)`` from its core ``(rank, rank, height, width)``, ``(rank, out)`` and
    ``(rank, in)``."""
    return torch.einsum("rs...,ro,si->oi...", core.float(), left.float(), right.float())


def _check_ranks(pair: tuple[Tensor, Tensor], core: Tensor | None = None, *, cored: bool = False) -> None:
    """Raises ValueError where two matrices, and what stands between them, have no rank in common.

    Args:
        pair: ``(out, rank)`` and ``(rank, in)``.
        cored: whether the first is ``(rank, out)``.
    """
    left, right = pair
    if min(left.dim(), right.dim()) < 2:
        raise ValueError(f"a matrix has the shape {tuple(left.shape)} or {tuple(right.shape)}")
    ranks = {left.shape[0 if cored else 1], right.shape[0], *(core.shape[:2] if core is not None else ())}
    if len(ranks) > 1:
        raise ValueError(f"ranks {sorted(ranks)} in one layer")
