"""A small network that says what a picture of the toybox shows, and how alike two of its toys are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth_sm.toybox import toys
from dreambooth_sm.toybox.networks import SIDE, as_input

EMBEDDING = 128
_FEATURES = 192
_BATCH = 64
_SHIPPED = Path(__file__).with_name("judge.safetensors")


class Judge(nn.Module):
    """Convolutions, then one linear head a label of ``toys.LABELS``, and an embedding of the toy.

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
        self.heads = nn.ModuleDict({head: nn.Linear(_FEATURES, len(names)) for head, names in toys.LABELS.items()})

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
                {head: toys.LABELS[head][rows[number]] for head, rows in chosen.items()} for number in range(len(batch))
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


def save_judge(judge: Judge, path: Path) -> None:
    """Writes the weights, in half precision."""
    save_file({name: weight.detach().half().cpu().contiguous() for name, weight in judge.state_dict().items()}, path)


def label_loss(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The sum over the heads of their mean cross entropies.

    Args:
        labels: ``(pictures, heads)``, heads in the order of ``logits``; -1 where a head does not apply.
    """
    losses = []
    for scores, wanted in zip(logits.values(), labels.unbind(1), strict=True):
        total = F.cross_entropy(scores, wanted, ignore_index=-1, reduction="sum")
        losses.append(total / (wanted >= 0).sum().clamp(min=1))
    return torch.stack(losses).sum()


def identity_loss(embeddings: Tensor, individuals: Tensor, temperature: float = 0.1) -> Tensor:
    """Pictures of one toy attract each other, those of different toys repel (Khosla et al. 2020, equation 2).

    Args:
        embeddings: ``(pictures, width)`` of length 1.
        individuals: ``(pictures,)``, a number for each toy; every toy has to be in two pictures or more.
    """
    itself = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    others_of_it = (individuals[:, None] == individuals) & ~itself
    similarity = embeddings @ embeddings.T / temperature
    log_shares = similarity.masked_fill(itself, -torch.inf).log_softmax(1)
    return -(log_shares.masked_fill(~others_of_it, 0).sum(1) / others_of_it.sum(1)).mean()


def _halving(channels: int, out: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, kernel, 2, kernel // 2), nn.GroupNorm(16, out), nn.SiLU())


def _refining(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), nn.GroupNorm(16, channels), nn.SiLU())
