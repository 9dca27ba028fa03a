"""All that a denoiser is told of each row beside its noised latents and their time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Named tensors of as many rows each; what the names are is between a family's functions.

    Attributes:
        text: what its text encoders make of prompts: states, masks and the like.
        extras: what it is told of pictures, float32; of most families nothing.
    """

    text: Mapping[str, Tensor]
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Counts the rows."""
        return len(next(iter(self.text.values())))

    def of(self, rows: Tensor) -> Conditioning:
        """Some rows, by their numbers."""
        text, extras = ({name: value[rows] for name, value in part.items()} for part in (self.text, self.extras))
        return Conditioning(text, extras)

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """On a device, with the text's floating-point values in ``dtype``; extras stay in full precision."""
        return Conditioning(
            {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in self.text.items()},
            {name: value.to(device) for name, value in self.extras.items()},
        )

    def beside(self, extras: Mapping[str, Tensor]) -> Conditioning:
        """The same text with these extras."""
        return replace(self, extras=extras)
