"""The amounts of everything that a toybox is trained with."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch


@dataclass(frozen=True)
class Amounts:
    """What both toyboxes share.

    Attributes:
        minutes: for all, from the painting to the evaluation.
        pictures: to be painted for the training.
        held_out: further ones to measure on; even.
        drawn: pictures that the pipeline draws in the end, for the judge to read.
    """

    minutes: float = 9.0
    pictures: int = 60_000
    seed: int = 0
    held_out: int = 1024
    drawn: int = 256
    vae_batch: int = 64

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Adds those that a command can set."""
        default = cls()
        parser.add_argument("--minutes", type=float, default=default.minutes, help="for all stages together")
        parser.add_argument("--pictures", type=int, default=default.pictures)
        parser.add_argument("--seed", type=int, default=default.seed)

    @classmethod
    def of(cls, options: argparse.Namespace, device: torch.device) -> Self:
        """As a command set them; on a CPU in miniature."""
        chosen = cls(options.minutes, options.pictures, options.seed)
        if device.type == "cuda":
            return chosen
        batches: dict[str, Any] = {each.name: 16 for each in fields(cls) if each.name.endswith("_batch")}
        return replace(chosen, held_out=16, drawn=8, **batches | {"vae_batch": 4})
