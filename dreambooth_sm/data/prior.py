"""Class images for prior preservation: those the user has, and generated ones for the rest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from dreambooth_sm import __version__
from dreambooth_sm.data.buckets import class_shapes
from dreambooth_sm.data.class_cache import ClassCache, Recipe, pack
from dreambooth_sm.data.concepts import Subject, shapes_of
from dreambooth_sm.data.pictures import Shape
from dreambooth_sm.distributed import World
from dreambooth_sm.errors import StopRequested
from dreambooth_sm.families import family_of
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.latents import latent_channels
from dreambooth_sm.memory import free_memory
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.outputs import scratch_directory
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.report import Reporter
from dreambooth_sm.sampling import Sampler, decode, draw_latents, drawing_form, make_sampler
from dreambooth_sm.storage import S3Options, S3Uri
from dreambooth_sm.stored.model import Pipeline

# Pictures of those made that are decoded, for people to look at; training needs the latents alone.
SHOWN = 4
# Far from the seeds that people draw with: what a trained model draws from noise that it was trained on proves little.
_FIRST_SEED = 2**30


class ClassImages:
    """Makes class images with one base model, or finds those that earlier jobs made.

    A generated picture is kept as the sampler's latents: what the VAE would make of them and back again is never
    needed to train on. Each picture is drawn from a seed of its own, which its number gives, whatever the job's seed,
    the batch size and the number of processes: jobs with the same base model and class prompt share their pictures.

    Args:
        model: the untrained base model, which tells of itself; its weights are not asked for.
        weights: digest of what of it the pictures depend on, see :func:`weights_digest`.
        draw_with: makes what draws, once something has to be drawn.
        remote: where pictures are kept for later jobs, beside the subject's class directory.
        options: how they are written there.
        scratch: takes their place where the class directory is read-only (a channel in FastFile mode, for example).
        shown: directory for the pictures that people look at.
    """

    def __init__(
        self,
        model: Pipeline,
        *,
        weights: str,
        draw_with: Callable[[], Sampler],
        batch_size: int,
        guidance: float,
        remote: S3Uri | None,
        scratch: Path,
        shown: Path,
        report: Reporter,
        stop: threading.Event,
        world: World = World(),  # noqa: B008 - frozen
        options: S3Options = S3Options(),  # noqa: B008
    ) -> None:
        import diffusers

        self._options = options
        self._model, self._weights, self._draw_with = model, weights, draw_with
        self._sampler: Sampler | None = None
        self._batch_size, self._guidance = batch_size, guidance
        self._remote, self._scratch, self._shown = remote, scratch, shown
        self._report, self._stop, self._world = report, stop, world
        software = [__version__, diffusers.__version__, torch.__version__.partition("+")[0]]
        schedule = sorted(model.scheduler.config.items())
        self._drawing = family_of(model).facts.drawing
        self._manner = f"{self._drawing.manner}, seeds from {_FIRST_SEED}, {software}, {schedule}"

    def complete(self, subject: Subject, shapes: Sequence[Shape], first: int = 0) -> Subject:
        """The subject with all class pictures: its own first, generated ones for the rest.

        Args:
            shapes: width and height in pixels of every class picture, the subject's own included.
            first: number of the first class picture; it differs between subjects of the same class.

        Raises:
            StopRequested: between two batches, when the job is to stop; what was made is kept.
        """
        numbers = range(len(subject.class_pictures), len(shapes))
        if subject.class_prompt is None or not numbers:
            return subject
        directory = _writable(subject.class_directory) or _writable(self._scratch)
        assert directory is not None, f"{self._scratch} has to be writable"
        cache = ClassCache(directory, self._remote, self._report, self._options)
        recipes = {number: self._recipe(subject.class_prompt, shapes[number]) for number in numbers}
        names = {number: recipe.name(first + number) for number, recipe in recipes.items()}
        latents = {names[number]: self._latent_shape(shapes[number]) for number in numbers}
        found: dict[str, bytes] = self._world.first(cache.find(latents) if self._world.is_main else {})
        missing = [number for number in numbers if names[number] not in found]
        if found:
            self._report.say(f"class_images found={len(found)} missing={len(missing)}")
        made: dict[str, bytes] = {}
        for size in sorted({recipes[number].size for number in missing}):
            of_size = [number for number in missing if recipes[number].size == size]
            made |= self._make({first + n: names[n] for n in of_size}, recipes[of_size[0]], cache)
        if self._world.is_main:
            cache.share(made)
        for name, content in (found | made).items():
            if not cache.holds(name, content):  # another host does
                cache.write(name, content)
        return dataclasses.replace(
            subject,
            class_pictures=(*subject.class_pictures, *(directory / names[number] for number in numbers)),
            generated_shapes=tuple(shapes[number] for number in numbers),
        )

    def _make(self, names: dict[int, str], recipe: Recipe, cache: ClassCache) -> dict[str, bytes]:
        """Draws the pictures of these numbers, and gives what all processes drew, by name."""
        share = list(names)[self._world.rank :: self._world.size]
        self._sampler = sampler = self._sampler or self._draw_with()
        batches = draw_latents(
            sampler,
            recipe.prompt,
            [_FIRST_SEED + number for number in share],
            size=recipe.size,
            batch_size=self._batch_size,
            steps=recipe.steps,
            guidance=recipe.guidance,
            guided=recipe.guided,
        )
        made: dict[str, bytes] = {}
        for latents in self._report.progress(batches, -(-len(share) // self._batch_size), "class images"):
            for row in latents:
                number = share[len(made)]
                made[names[number]] = pack(row)
                cache.write(names[number], made[names[number]])
                if number < SHOWN:
                    self._show(sampler, row, number)
            if self._stop.is_set() and self._world.size == 1:
                raise StopRequested(
                    f"while class images were made; {len(made)} of {len(share)} are in {cache.directory}"
                )
        return {name: content for part in self._world.gather(made) for name, content in part.items()}

    def _show(self, sampler: Sampler, latents: torch.Tensor, number: int) -> None:
        self._shown.mkdir(parents=True, exist_ok=True)
        decode(sampler.pipeline, latents[None])[0].save(self._shown / f"class-{number}.png")

    def _latent_shape(self, size: Shape) -> tuple[int, int, int]:
        width, height = (side // self._model.vae_scale_factor for side in size)
        return latent_channels(self._model.vae), height, width

    def _recipe(self, prompt: str, size: Shape) -> Recipe:
        return Recipe(
            weights=self._weights,
            sampler=self._manner,
            prompt=prompt,
            steps=self._drawing.class_steps,
            guidance=self._guidance,
            guided=self._drawing.guided,
            size=size,
        )


def _writable(directory: Path) -> Path | None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return directory if os.access(directory, os.W_OK) else None


def weights_digest(base: PretrainedModel, plan: Plan, digests: Mapping[str, str]) -> str:
    """A digest of what pictures depend on beside their prompt and how they are drawn: the weights of all parts but the
    VAE's, what they are kept in and computed with, and the vocabulary.

    Args:
        digests: of the base model's parts, see :func:`dreambooth_sm.resume.fingerprint`.
    """
    parts = [part for part in base.family.facts.parts if part != "vae"]
    forms = [(part, digests[part], *map(str, drawing_form(base, plan, part))) for part in parts]
    return hashlib.sha256(json.dumps([forms, digests["tokenizer"]]).encode()).hexdigest()


def make_class_images(
    base: PretrainedModel,
    digests: Mapping[str, str],
    subjects: tuple[Subject, ...],
    h: Hyperparameters,
    plan: Plan,
    shown: Path,
    *,
    report: Reporter,
    stop: threading.Event,
    world: World,
    scratch: Path | None = None,
) -> tuple[Subject, ...]:
    """Makes the class images that are missing, with the untrained base model, or finds those of earlier jobs.

    Args:
        digests: of its parts, see :func:`dreambooth_sm.resume.fingerprint`.
        shown: directory for pictures of some of them.
        scratch: directory for those that can't go elsewhere; None for one of the job.
    """
    if h.prior == "output" or all(
        s.class_prompt is None or len(s.class_pictures) >= h.num_class_images for s in subjects
    ):
        return subjects
    prompts = [subject.class_prompt for subject in subjects if subject.class_prompt]
    images = ClassImages(
        base.pipeline(),
        weights=weights_digest(base, plan, digests),
        draw_with=partial(make_sampler, base, plan, prompts, h.sample_guidance_scale),
        batch_size=plan.sample_batch_size,
        guidance=h.sample_guidance_scale,
        remote=S3Uri.parse(h.class_cache) if h.class_cache else None,
        scratch=scratch or scratch_directory(h),
        shown=shown,
        options=h.s3_options,
        report=report,
        stop=stop,
        world=world,
    )
    completed: list[Subject] = []
    for subject, instances in zip(subjects, shapes_of(subjects, h), strict=True):
        wanted = max(h.num_class_images, len(set(instances)))  # each shape has batches, and needs one
        of_same_class = sum(len(s.class_pictures) for s in completed if s.class_prompt == subject.class_prompt)
        completed.append(images.complete(subject, class_shapes(instances, wanted), of_same_class))
    del images
    free_memory()
    return tuple(completed)
