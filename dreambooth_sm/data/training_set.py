"""What the training step reads: latents and prompt embeddings, and which of them a step uses.

Every random choice is a function of (seed, position in the global batch sequence): a resumed job, or one spread
over other batch sizes and processes, draws what an uninterrupted one would have drawn, and no generator's state has
to be saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dreambooth_sm.data.class_cache import is_latents, read_latents
from dreambooth_sm.data.pictures import View, crop, is_square, open_picture
from dreambooth_sm.data.prompts import encode, tag_orders, tokenize

# Views of a picture that are encoded ahead where its crop or mirroring is random.
VIEWS = 8


@dataclass(frozen=True)
class Sample:
    """A picture with the prompts it may be shown with (rows of the prompt table)."""

    picture: Path
    prompts: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """The random part of one batch, on the CPU. Rows: the instance samples, then as many class samples.

    Attributes:
        samples, views, prompts: int64 ``(rows,)``: rows of the picture and prompt tables.
        latent_noise: ``(rows, 4, h, w)`` draws from the VAE's posterior.
        noise: ``(rows, 4, h, w)`` what the model has to predict.
        timesteps: int64 ``(rows,)``.
    """

    samples: torch.Tensor
    views: torch.Tensor
    prompts: torch.Tensor
    latent_noise: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor


class Dice:
    """Draws batches.

    Args:
        instances, classes: samples of the two halves of a batch; no classes without prior preservation.
        first_class: row of the first class sample in the picture table.
    """

    def __init__(
        self,
        instances: list[Sample],
        classes: list[Sample],
        *,
        views: int,
        latent_shape: tuple[int, int, int],
        timesteps: int,
        seed: int,
    ) -> None:
        self.instances, self.classes = instances, classes
        self.views, self.latent_shape, self.timesteps, self.seed = views, latent_shape, timesteps, seed
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def batch(self, number: int, size: int) -> Batch:
        """Batch ``number`` (counted from 0) of ``size`` instance samples and as many class samples."""
        positions = range(number * size, (number + 1) * size)
        rows = [self._row(self.instances, 0, position) for position in positions]
        if self.classes:
            rows += [self._row(self.classes, len(self.instances), position) for position in positions]
        samples, views, prompts, latent_noise, noise, timesteps = zip(*rows, strict=True)
        return Batch(
            torch.tensor(samples),
            torch.tensor(views),
            torch.tensor(prompts),
            torch.stack(latent_noise),
            torch.stack(noise),
            torch.tensor(timesteps),
        )

    def _row(self, pool: list[Sample], first: int, position: int) -> tuple[Any, ...]:
        epoch, place = divmod(position, len(pool))
        index = self._order(first, len(pool), epoch)[place]
        generator = torch.Generator().manual_seed(mix(self.seed, first, position))
        view, prompt, timestep = torch.randint(2**31, (3,), generator=generator).tolist()
        sample = pool[index]
        return (
            first + index,
            view % self.views,
            sample.prompts[prompt % len(sample.prompts)],
            torch.randn(self.latent_shape, generator=generator),
            torch.randn(self.latent_shape, generator=generator),
            timestep % self.timesteps,
        )

    def _shuffled(self, first: int, count: int, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix(self.seed, first, -1 - epoch))
        return torch.randperm(count, generator=generator).tolist()


def mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers, such that neighbouring inputs give unrelated seeds."""
    words = np.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(2, np.uint64)
    return int(words[0] >> np.uint64(1))


class PromptTable:
    """All prompts of a job: token ids, and embeddings where the text encoder is not trained."""

    def __init__(self, tokenizer: Any, *, max_tokens: int, pad: bool, shuffle: bool, seed: int) -> None:
        self._texts: dict[str, int] = {}
        self._tokenizer, self._max_tokens, self._pad = tokenizer, max_tokens, pad
        self._shuffle, self._seed = shuffle, seed

    def rows(self, prompt: str) -> tuple[int, ...]:
        """Rows of the table that this prompt may be shown as; new ones are added."""
        texts = tag_orders(prompt, self._seed) if self._shuffle else [prompt]
        return tuple(self._texts.setdefault(text, len(self._texts)) for text in texts)

    def ids(self) -> torch.Tensor:
        """Token ids ``(prompts, chunks, length)``."""
        return tokenize(self._tokenizer, list(self._texts), max_tokens=self._max_tokens, pad=self._pad)

    @torch.no_grad()
    def embeddings(self, text_encoder: Any) -> torch.Tensor:
        """Embeddings ``(prompts, chunks * length, width)`` on the text encoder's device."""
        return encode(text_encoder, self.ids().to(text_encoder.device))


def views_of(pictures: list[Path], seed: int, *, random_crop: bool, mirror: bool) -> list[list[View]]:
    """The views of every picture, as many for each; there is nothing to crop of a square one.

    Class images that are kept as latents have one view: more of them are as easily made as mirrored.
    """
    views = [
        [View()]
        if is_latents(picture)
        else random_views(seed, row, random_crop=random_crop and not is_square(picture), mirror=mirror)
        for row, picture in enumerate(pictures)
    ]
    most = max(map(len, views))
    return [row if len(row) == most else row * most for row in views]


def random_views(seed: int, sample: int, *, random_crop: bool, mirror: bool) -> list[View]:
    """The views of one picture: ``VIEWS`` of them where anything is random, else the centre."""
    if not (random_crop or mirror):
        return [View()]
    draws = torch.rand(VIEWS, 3, generator=torch.Generator().manual_seed(mix(seed, sample, 2**31)))
    return [
        View(
            left=left if random_crop else 0.5,
            top=top if random_crop else 0.5,
            mirrored=mirror and flip < 0.5,
        )
        for left, top, flip in draws.tolist()
    ]


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """RGB as float32 ``(3, height, width)`` in [-1, 1]."""
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


class Latents:
    """The latents of all pictures: encoded ahead and kept on the device, or encoded when they are asked for.

    The VAE's mean and deviation are kept, not one draw, so that each step draws anew.

    Args:
        pictures: one entry a row of the picture table.
        views: the views of each picture; all of the same number.
        vae: in fp32 or the precision it should run in, on the device.
        cached: encode ahead. The VAE is not needed any more afterwards.
    """

    def __init__(
        self, pictures: list[Path], views: list[list[View]], vae: Any, *, resolution: int, cached: bool
    ) -> None:
        self._pictures, self._views, self._resolution = pictures, views, resolution
        self._scaling = float(vae.config.scaling_factor)
        self._vae = vae
        self._mean = self._deviation = None
        if cached:
            moments = [self._encode_views(row) for row in range(len(views))]
            self._mean = torch.stack([mean for mean, _ in moments])
            self._deviation = torch.stack([deviation for _, deviation in moments])
            self._vae = None

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Scaled latents ``(rows, 4, h, w)`` of a batch, float32, on the device."""
        if self._mean is not None and self._deviation is not None:
            at = (batch.samples.to(self._mean.device), batch.views.to(self._mean.device))
            mean, deviation = self._mean[at], self._deviation[at]
        else:
            mean, deviation = self._encode(batch.samples, batch.views)
        return (mean + deviation * batch.latent_noise.to(mean.device)) * self._scaling

    def _encode_views(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of every view of a picture; views that are the same are encoded once."""
        views = self._views[row]
        distinct = list(dict.fromkeys(views))
        mean, deviation = self._encode(
            torch.tensor([row] * len(distinct)), torch.tensor([views.index(view) for view in distinct])
        )
        places = [distinct.index(view) for view in views]
        return mean[places], deviation[places]

    def _encode(self, samples: torch.Tensor, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # One picture at a time: the VAE's activations are the largest of the whole job.
        rows = [
            self._encode_one(self._pictures[sample], self._views[sample][view])
            for sample, view in zip(samples.tolist(), views.tolist(), strict=True)
        ]
        return torch.cat([mean for mean, _ in rows]), torch.cat([deviation for _, deviation in rows])

    @torch.no_grad()
    def _encode_one(self, picture: Path, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation ``(1, 4, h, w)``, float32, on the VAE's device."""
        if is_latents(picture):
            mean = read_latents(picture)[None].to(self._vae.device) / self._scaling
            return mean, torch.zeros_like(mean)
        pixels = to_tensor(crop(open_picture(picture), self._resolution, view))[None]
        found = self._vae.encode(pixels.to(self._vae.device, self._vae.dtype)).latent_dist
        return found.mean.float(), found.std.float()
