"""The data that the training step reads: latents and prompt embeddings, and which of them a step uses.

All pictures of an optimizer step have one shape, whatever batches and processes it is spread over: each shape costs
one captured graph, and steps of equally many pictures are alike.

Every random choice is a function of (seed, position in the global batch sequence): a resumed job, or one spread
over other batch sizes and processes, draws what an uninterrupted one would have drawn, and no generator's state has
to be saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dreambooth_sm.data.class_cache import is_latents, read_latents
from dreambooth_sm.data.conditioning import embed
from dreambooth_sm.data.masks import keep_subject, subject_box
from dreambooth_sm.data.pictures import Shape, View, crop, cut_off, open_picture, read_size
from dreambooth_sm.data.prompts import tag_orders
from dreambooth_sm.families import Conditioning, Family
from dreambooth_sm.latents import moments_of

# Views of a picture that are encoded ahead where its crop or mirroring is random.
VIEWS = 8


@dataclass(frozen=True)
class TrainingRow:
    """A picture, the prompts it may be shown with (rows of the prompt table), and its width and height in training.

    Attributes:
        noise, timestep: those that the row always has; None draws new ones each time.
    """

    picture: Path
    prompts: tuple[int, ...]
    shape: Shape
    noise: torch.Tensor | None = None
    timestep: int | None = None


@dataclass(frozen=True)
class Batch:
    """The random part of one batch, on the CPU. Rows: those of instances, then as many of classes.

    Attributes:
        pictures, views, prompts: int64 ``(rows,)``: numbers of pictures, their views, and rows of the prompt table.
        latent_noise: ``(rows, 4, h, w)`` draws from the VAE's posterior.
        noise: ``(rows, 4, h, w)`` what the model has to predict.
        timesteps: int64 ``(rows,)``.
    """

    pictures: torch.Tensor
    views: torch.Tensor
    prompts: torch.Tensor
    latent_noise: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Puts what was drawn for a step on a device. The host does not wait for it: it draws the next step's meanwhile."""
    if device.type == "cuda":  # from other memory it would
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class BatchSampler:
    """Draws batches.

    Args:
        instances, classes: rows of the two halves of a batch; no classes without prior preservation, else at least
            one of each shape that instances have.
        channels, latent_scale: channels of the latents, and pixels a side of each of their elements.
        caption_dropout: probability of the row ``empty_prompt`` of the prompt table instead of a row's own.
        noise_offset: deviation of what is added to all values of a channel alike (Guttenberg 2023, "Diffusion with
            Offset Noise"); rows that have noise of their own stay as they are.

    Attributes:
        shapes: those that batches have, the one of most pixels first.
    """

    def __init__(
        self,
        instances: list[TrainingRow],
        classes: list[TrainingRow],
        *,
        views: int,
        channels: int,
        latent_scale: int,
        timesteps: int,
        seed: int,
        empty_prompt: int = 0,
        caption_dropout: float = 0.0,
        noise_offset: float = 0.0,
    ) -> None:
        self.instances, self.classes, self._rows = instances, classes, [*instances, *classes]
        self.views, self.channels, self.latent_scale = views, channels, latent_scale
        self.timesteps, self.seed = timesteps, seed
        self.empty_prompt, self.caption_dropout = empty_prompt, caption_dropout
        self.noise_offset = noise_offset
        pixels = {row.shape: row.shape[0] * row.shape[1] for row in instances}
        self.shapes = sorted(pixels, key=lambda shape: (-pixels[shape], shape))
        halves = [range(len(instances)), range(len(instances), len(self._rows))]
        self._pools = {
            shape: [[row for row in half if self._rows[row].shape == shape] for half in halves if half]
            for shape in self.shapes
        }
        self._order = lru_cache(maxsize=64)(self._shuffled)

    def batch(self, number: int, size: int, together: int = 1) -> Batch:
        """Batch ``number`` (counted from 0) of ``size`` instances and as many class pictures, all of one shape.

        Args:
            together: batches that an optimizer step is made of, on all processes; they share a shape.
        """
        step, part = divmod(number, together)
        shape, turn = self._shape_of(step)
        first = (turn * together + part) * size
        rows = [self._row(pool, position) for pool in self._pools[shape] for position in range(first, first + size)]
        pictures, views, prompts, latent_noise, noise, timesteps = zip(*rows, strict=True)
        return Batch(
            torch.tensor(pictures),
            torch.tensor(views),
            torch.tensor(prompts),
            torch.stack(latent_noise),
            torch.stack(noise),
            torch.tensor(timesteps),
        )

    def _shape_of(self, step: int) -> tuple[Shape, int]:
        """The shape of an optimizer step, and how many steps before it had the same.

        In as many steps as there are instances, a shape has as many turns as it has instances: all are shown equally
        often.
        """
        epoch, place = divmod(step, len(self.instances))
        turns = [self.instances[index].shape for index in self._order(-1, len(self.instances), epoch)]
        shape = turns[place]
        return shape, epoch * turns.count(shape) + turns[:place].count(shape)

    def _row(self, pool: list[int], position: int) -> tuple[Any, ...]:
        epoch, place = divmod(position, len(pool))
        number = pool[self._order(pool[0], len(pool), epoch)[place]]
        generator = torch.Generator().manual_seed(mix(self.seed, pool[0], position))
        view, choice, timestep = torch.randint(2**31, (3,), generator=generator).tolist()
        row = self._rows[number]
        width, height = row.shape
        latent_shape = (self.channels, height // self.latent_scale, width // self.latent_scale)
        latent_noise, noise = (torch.randn(latent_shape, generator=generator) for _ in range(2))
        prompt = row.prompts[choice % len(row.prompts)]
        if self.caption_dropout and torch.rand((), generator=generator) < self.caption_dropout:
            prompt = self.empty_prompt
        if row.noise is not None:
            noise = row.noise
        elif self.noise_offset:
            noise += self.noise_offset * torch.randn((self.channels, 1, 1), generator=generator)
        timestep = timestep % self.timesteps if row.timestep is None else row.timestep
        return number, view % self.views, prompt, latent_noise, noise, timestep

    def _shuffled(self, first: int, count: int, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix(self.seed, first, -1 - epoch))
        return torch.randperm(count, generator=generator).tolist()


def mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers, such that neighbouring inputs give unrelated seeds."""
    words = np.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(2, np.uint64)
    return int(words[0] >> np.uint64(1))


class PromptTable:
    """All prompts of a job: tokens, and embeddings where the text encoder is not trained."""

    def __init__(self, family: Family, *, max_tokens: int, pad: bool, shuffle: bool, seed: int) -> None:
        self._texts: dict[str, int] = {}
        self._family, self._max_tokens, self._pad = family, max_tokens, pad
        self._shuffle, self._seed = shuffle, seed

    def rows(self, prompt: str) -> tuple[int, ...]:
        """Rows of the table that this prompt may be shown as; new ones are added."""
        texts = tag_orders(prompt, self._seed) if self._shuffle else [prompt]
        return tuple(self._texts.setdefault(text, len(self._texts)) for text in texts)

    def tokens(self, model: Any) -> dict[str, torch.Tensor]:
        """Returns what a model's text encoders take, a row a prompt, on the CPU."""
        return self._family.tokenize(model, list(self._texts), max_tokens=self._max_tokens, pad=self._pad)

    def embeddings(self, model: Any) -> Conditioning:
        """The prompts as the text encoders of a model see them, on their device."""
        return embed(self._family, model, list(self._texts), max_tokens=self._max_tokens, pad=self._pad)


def views_of(
    pictures: list[Path],
    shapes: list[Shape],
    masks: list[Image.Image | None],
    seed: int,
    *,
    random_crop: bool,
    mirror: bool,
) -> list[list[View]]:
    """The views of every picture, as many for each: there is nothing to crop of one that has its shape's ratio, and
    what a mask shows is kept. Class images that are kept as latents have one: more of them are as easily made."""
    views: list[list[View]] = []
    for row, (picture, shape, mask) in enumerate(zip(pictures, shapes, masks, strict=True)):
        if is_latents(picture):
            views.append([View()])
            continue
        size = read_size(picture)
        free = random_crop and size[0] * shape[1] != size[1] * shape[0]
        views.append(random_views(seed, row, random_crop=free, mirror=mirror))
        if mask and (box := subject_box(mask)):
            views[-1] = [keep_subject(view, box, size, shape) for view in views[-1]]
    most = max(map(len, views))
    return [row if len(row) == most else row * most for row in views]


def subject_weights(mask: Image.Image | None, grid: Shape, view: View, background: float) -> torch.Tensor:
    """Weighs each latent element of a view in the loss: ``(height, width)``, mean 1.

    The subject weighs 1 and the rest ``background``, by the share that each has of an element's area; all is then
    scaled to a mean of 1, so that a small subject counts no less than a large one. Without a mask, and where the view
    shows nothing that has any weight, all weigh the same.
    """
    if mask is None:
        return torch.ones(grid[1], grid[0])
    share = torch.from_numpy(np.asarray(crop(mask, grid, view, Image.Resampling.BOX)).copy()).float() / 255
    weights = background + (1 - background) * share
    return weights / weights.mean() if weights.mean() > 0 else torch.ones_like(weights)


class SubjectWeights:
    """The weights of all pictures and views on the device, float32; see :func:`subject_weights`."""

    def __init__(
        self,
        masks: list[Image.Image | None],
        shapes: list[Shape],
        views: list[list[View]],
        *,
        latent_scale: int,
        background: float,
        device: torch.device,
    ) -> None:
        self._maps = []
        for mask, (width, height), its in zip(masks, shapes, views, strict=True):
            grid = (width // latent_scale, height // latent_scale)
            maps = [subject_weights(mask, grid, view, background) for view in its]
            self._maps.append(torch.stack(maps).to(device))

    def __call__(self, batch: Batch) -> torch.Tensor:
        """``(rows, 1, h, w)`` of a batch, whose pictures have one shape."""
        pairs = zip(batch.pictures.tolist(), batch.views.tolist(), strict=True)
        return torch.stack([self._maps[row][view % len(self._maps[row])] for row, view in pairs])[:, None]


class PictureExtras:
    """The extras that a family's denoiser is told of all pictures and views, float32.

    A generated class image was drawn in its shape, as a whole.

    Args:
        extras: the family's: size, crop and target to named numbers.
    """

    def __init__(
        self,
        pictures: list[Path],
        shapes: list[Shape],
        views: list[list[View]],
        extras: Callable[[Shape, tuple[int, int], Shape], Mapping[str, Sequence[float]]],
    ) -> None:
        # A row for each view, by name.
        self._rows: list[dict[str, torch.Tensor]] = []
        for picture, shape, its in zip(pictures, shapes, views, strict=True):
            size = shape if is_latents(picture) else read_size(picture)
            told = [extras(size, cut_off(size, shape, view), shape) for view in its]
            self._rows.append(
                {name: torch.tensor([each[name] for each in told], dtype=torch.float32) for name in told[0]}
            )

    def append(self, row: int, view: int) -> None:
        """A further row of the picture table, with a single view: one of another row."""
        self._rows.append({name: value[None] for name, value in self._of(row, view).items()})

    def repeat(self, row: int) -> None:
        """A further row of the picture table, which is the same as another one."""
        self._rows.append(self._rows[row])

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        """``(rows, numbers)`` of a batch, on the CPU."""
        rows = [self._of(*pair) for pair in zip(batch.pictures.tolist(), batch.views.tolist(), strict=True)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _of(self, row: int, view: int) -> dict[str, torch.Tensor]:
        return {name: value[view % len(value)] for name, value in self._rows[row].items()}


def random_views(seed: int, picture: int, *, random_crop: bool, mirror: bool) -> list[View]:
    """The views of one picture: ``VIEWS`` of them where anything is random, else the centre."""
    if not (random_crop or mirror):
        return [View()]
    draws = torch.rand(VIEWS, 3, generator=torch.Generator().manual_seed(mix(seed, picture, 2**31)))
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

    The VAE's mean and deviation are kept, not one draw, so that each step draws another.

    Args:
        pictures: one entry a row of the picture table.
        shapes: width and height of each picture's views.
        views: the views of each picture; all of the same number.
        vae: in fp32 or the precision it should run in, on the device.
        family: whose latents they are.
        cached: encode ahead. The VAE is not needed any more afterwards.
    """

    def __init__(
        self,
        pictures: list[Path],
        shapes: list[Shape],
        views: list[list[View]],
        vae: Any,
        family: Family,
        *,
        cached: bool,
    ) -> None:
        self._pictures, self._shapes, self._views = list(pictures), list(shapes), list(views)
        self._vae, self._scale, self._family = vae, family.scale(vae), family
        # Mean and deviation of every view, a row each.
        self._cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if cached:
            self._cache = {row: self._encode_views(row) for row in range(len(pictures))}
            self._vae = None

    def append(self, latents: torch.Tensor) -> None:
        """A further row of the picture table, which is given as scaled latents ``(4, h, w)`` and has a single view."""
        mean = self._family.denormalise(self._scale, latents[None])
        self._add(Path(), (latents.shape[2], latents.shape[1]), [View()])
        self._cache[len(self._pictures) - 1] = mean, torch.zeros((), device=mean.device).expand_as(mean)

    def repeat(self, row: int) -> None:
        """A further row of the picture table, which is the same as another one."""
        self._add(self._pictures[row], self._shapes[row], self._views[row])
        if row in self._cache:
            self._cache[len(self._pictures) - 1] = self._cache[row]

    def _add(self, picture: Path, shape: Shape, views: list[View]) -> None:
        self._pictures.append(picture)
        self._shapes.append(shape)
        self._views.append(views)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Scaled latents ``(rows, 4, h, w)`` of a batch, whose pictures have one shape; float32, on the device."""
        pairs = zip(batch.pictures.tolist(), batch.views.tolist(), strict=True)
        mean, deviation = (torch.stack(parts) for parts in zip(*(self._moments(*pair) for pair in pairs), strict=True))
        return self._family.normalise(self._scale, mean + deviation * on_device(batch.latent_noise, mean.device))

    def _moments(self, row: int, view: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation ``(4, h, w)`` of one view."""
        if row not in self._cache:
            mean, deviation = self._encode(row, [self._views[row][view]])
            return mean[0], deviation[0]
        means, deviations = self._cache[row]
        return means[view % len(means)], deviations[view % len(means)]

    def _encode_views(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of every view of a picture; views that are the same are encoded once."""
        views = self._views[row]
        distinct = list(dict.fromkeys(views))
        mean, deviation = self._encode(row, distinct)
        places = [distinct.index(view) for view in views]
        return mean[places], deviation[places]

    @torch.no_grad()
    def _encode(self, row: int, views: list[View]) -> tuple[torch.Tensor, torch.Tensor]:
        if is_latents(self._pictures[row]):
            latents = read_latents(self._pictures[row])[None].to(self._vae.device)
            mean = self._family.denormalise(self._scale, latents)
            return mean, torch.zeros_like(mean)
        shape = self._shapes[row]
        picture = open_picture(self._pictures[row], shape)
        # One view at a time: the VAE's activations are the largest of the whole job.
        pixels = [to_tensor(crop(picture, shape, view))[None] for view in views]
        found = [moments_of(self._vae, view.to(self._vae.device, self._vae.dtype)) for view in pixels]
        mean = torch.cat([mean for mean, _ in found]).float()
        if not self._family.facts.draws_latents:
            return mean, torch.zeros_like(mean)
        return mean, torch.cat([deviation for _, deviation in found]).float()
