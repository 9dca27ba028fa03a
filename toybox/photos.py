"""Painted pictures with all that is known about them, many at a time."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dreambooth_sm.toybox import SIDE
from dreambooth_sm.toybox.labels import COLOURS, LABELS
from toybox import paint, toys

# Each toy is in two pictures, one after the other: from them the judge learns what makes an individual.
SCENES_A_TOY = 2
_TOYS_A_JOB = 50


@dataclass(frozen=True)
class Photos:
    """Painted scenes; two after another show the same toy.

    Attributes:
        pixels: uint8 ``(photos, 128, 128, 3)``.
        labels: int64 ``(photos, heads)`` as ``toys.labels`` gives them.
        individuals: int64 ``(photos,)``, a number for each toy.
        captions: four for each.
    """

    pixels: Tensor
    labels: Tensor
    individuals: Tensor
    captions: list[list[str]]

    def part(self, rows: slice) -> Photos:
        return Photos(self.pixels[rows], self.labels[rows], self.individuals[rows], self.captions[rows])

    def to(self, device: torch.device) -> Photos:
        return Photos(self.pixels.to(device), self.labels.to(device), self.individuals.to(device), self.captions)

    def and_also(self, others: Photos) -> Photos:
        """Both; no toy of the one counts as a toy of the other."""
        return Photos(
            torch.cat([self.pixels, others.pixels]),
            torch.cat([self.labels, others.labels]),
            torch.cat([self.individuals, others.individuals + self.individuals.max() + 1]),
            self.captions + others.captions,
        )

    def __len__(self) -> int:
        return len(self.pixels)


def paint_photos(count: int, seed: str, *, seconds: float = math.inf, rare_parts: bool = False) -> Photos:
    """Paints random toys, each in two scenes, on all cores.

    Args:
        count: of photos; even.
        seconds: fewer photos are painted where they take longer than that.
        rare_parts: gives creatures the parts that else only held-out subjects have: the judge has to know them.
    """
    started = time.monotonic()
    starts = range(0, count // SCENES_A_TOY, _TOYS_A_JOB)
    jobs = [(f"{seed} {start}", min(_TOYS_A_JOB, count // SCENES_A_TOY - start), rare_parts) for start in starts]
    workers = min(os.cpu_count() or 1, len(jobs))
    pool = multiprocessing.Pool(workers) if workers > 1 else None
    try:
        finished = []
        for done in pool.imap(_paint_job, jobs) if pool else map(_paint_job, jobs):
            finished.append(done)
            if time.monotonic() - started > seconds:
                break
    finally:
        if pool:
            pool.terminate()
    numbers: dict[toys.Toy, int] = {}
    individuals = [numbers.setdefault(scene.toy, len(numbers)) for _, scenes, _ in finished for scene in scenes]
    labels = [list(toys.labels(scene).values()) for _, scenes, _ in finished for scene in scenes]
    pixels = np.concatenate([part for part, _, _ in finished]) if finished else np.empty((0, SIDE, SIDE, 3), np.uint8)
    photos = Photos(
        torch.from_numpy(pixels),
        torch.tensor(labels, dtype=torch.int64).reshape(len(labels), len(LABELS)),
        torch.tensor(individuals, dtype=torch.int64),
        [captions for _, _, written in finished for captions in written],
    )
    print(f"painting done pictures={len(photos)} seconds={time.monotonic() - started:.0f}", flush=True)
    return photos


def _paint_job(job: tuple[str, int, bool]) -> tuple[np.ndarray, list[toys.Scene], list[list[str]]]:
    seed, count, rare_parts = job
    rng = random.Random(seed)
    scenes, captions = [], []
    for _ in range(count):
        name, toy = _rare_creature(rng) if rare_parts else _individual(rng)
        for scene in toys.scenes_of(toy, SCENES_A_TOY, rng.getrandbits(32)):
            scenes.append(scene)
            captions.append([toys.caption(scene, rng, name if by_name else None) for by_name in (False, True) * 2])
    return np.stack([np.asarray(paint.paint(scene, SIDE)) for scene in scenes]), scenes, captions


def _individual(rng: random.Random) -> tuple[str | None, toys.Toy]:
    """A toy, and its name if it has one: a third of the creatures do, so that names can mean individuals."""
    toy = toys.random_toy(rng)
    if toy.kind == "creature" and rng.random() < 1 / 3:
        return rng.choice(list(toys.NAMED.items()))
    return None, toy


def _rare_creature(rng: random.Random) -> tuple[None, toys.Toy]:
    toy = toys.random_toy(rng, "creature")
    if rng.random() < 0.5:
        return None, replace(toy, hat="wizard hat")
    return None, replace(toy, scarf=True, scarf_colour=rng.choice(list(COLOURS)))
