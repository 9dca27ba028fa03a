"""A small network that says what a picture of the toybox shows, and how alike two of its toys are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth_sm.toybox import SIDE
from dreambooth_sm.toybox.labels import LABELS

EMBEDDING = 128
_FEATURES = 192
_BATCH = 64
_SHIPPED = Path(__file__).with_name("judge.safetensors")


class Judge(nn.Module):
    """Convolutions, then one linear head a label of ``LABELS``, and an embedding of the toy.

    The embedding is trained to be the same for all photos of a toy, whatever the background, and to differ from toy
    to toy: the cosine of two embeddings says how alike two toys are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            _halving(3, 32, kernel=5),
            _halving(32, 48),
            _refining(48),
            _halving(48, 80),
            _refining(80),
            _halving(80, 112),
            _refining(112),
            _halving(112, 128),
            nn.Flatten(),
            nn.Linear(128 * (SIDE // 32) ** 2, _FEATURES),
            nn.SiLU(),
        )
        self.embedding = nn.Linear(_FEATURES, EMBEDDING)
        self.heads = nn.ModuleDict({head: nn.Linear(_FEATURES, len(names)) for head, names in LABELS.items()})

    def forward(self, pictures: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeddings and logits.

        Args:
            pictures: ``(pictures, 3, 128, 128)`` from -1 to 1.

        Returns:
            ``(pictures, 128)`` of length 1 and, for each head, ``(pictures, labels)``, all float32.
        """
        features = self.convolutions(pictures)
        embeddings = F.normalize(self.embedding(features).float(), dim=1)
        return embeddings, {head: linear(features).float() for head, linear in self.heads.items()}

    @torch.inference_mode()
    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings of the toys, ``(pictures, 128)``, float32, of length 1, on the CPU."""
        batches = [self(batch)[0].cpu() for batch in self._batches(pictures)]
        return torch.cat(batches) if batches else torch.empty(0, EMBEDDING)

    @torch.inference_mode()
    def read(self, pictures: Sequence[Image.Image]) -> list[dict[str, str]]:
        """For every picture the likeliest label of each head, such as ``{"kind": "cat", "colour": "red", ...}``.

        Labels of parts that only creatures have, from ``body`` on, mean nothing where ``kind`` is another.
        """
        read = []
        for batch in self._batches(pictures):
            chosen = {head: logits.argmax(1).tolist() for head, logits in self(batch)[1].items()}
            read += [
                {head: LABELS[head][rows[number]] for head, rows in chosen.items()} for number in range(len(batch))
            ]
        return read

    def _batches(self, pictures: Sequence[Image.Image]) -> Iterator[Tensor]:
        device = self.embedding.weight.device
        for start in range(0, len(pictures), _BATCH):
            batch = [
                np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
                for picture in pictures[start : start + _BATCH]
            ]
            yield as_input(torch.from_numpy(np.stack(batch)).to(device))


def load_judge(path: Path | None = None) -> Judge:
    """The trained judge, in float32 on the CPU; the one that comes with the package where no ``path`` is given."""
    judge = Judge()
    judge.load_state_dict(load_file(path or _SHIPPED))
    return judge.requires_grad_(False).eval()


def as_input(pixels: Tensor) -> Tensor:
    """Pixels ``(pictures, height, width, 3)`` of uint8 as ``(pictures, 3, height, width)`` from -1 to 1, float32."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def _halving(channels: int, out: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, kernel, 2, kernel // 2), nn.GroupNorm(16, out), nn.SiLU())


def _refining(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), nn.GroupNorm(16, channels), nn.SiLU())
