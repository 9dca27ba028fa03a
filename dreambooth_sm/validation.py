"""Pictures of the same prompts and seeds before, during and after training, for people to compare."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.families import Conditioning
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import Trainable, encodes_in_steps
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.onlookers import DrawingCopy
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.report import Reporter, ValidationPicture
from dreambooth_sm.sampling import draw, embed_prompts, make_sampler

SAMPLES = "samples"
_NAMES = "step-*-prompt-*-seed-*.png"
# Apart from the seeds of class images, which the model is trained on.
_SEED = 2_000


def validation_prompts(h: Hyperparameters, subjects: tuple[Subject, ...]) -> tuple[str, ...]:
    """The job's validation prompts, and the class prompts beside them, which show what the class has become."""
    if h.validation_prompt is None:
        return ()
    asked = [part.strip() for part in h.validation_prompt.split("|")]
    classes = [subject.class_prompt for subject in subjects if subject.class_prompt]
    return tuple(dict.fromkeys(prompt for prompt in [*asked, *classes] if prompt))


def take_over_pictures(earlier: Path, directory: Path) -> None:
    """Puts the whole pictures of the attempts before this one into ``directory``, beside those of other jobs.

    Args:
        earlier: where they lie.
    """
    for picture in sorted(earlier.glob(_NAMES)):
        if picture.is_symlink() or not picture.is_file():
            continue
        if picture.stem.endswith(_digest(picture.read_bytes())):
            directory.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, directory / picture.name)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


class Validator:
    """Draws the validation prompts again and again, with the same seeds; the report remembers the pictures.

    A picture's name ends with a part of its SHA-256: no other picture ever replaces it, here or in S3.

    Args:
        trained: the model, before training.
        directory: for the pictures.
    """

    def __init__(
        self,
        trained: Trainable,
        prompts: tuple[str, ...],
        h: Hyperparameters,
        plan: Plan,
        directory: Path,
        report: Reporter,
    ) -> None:
        self._trained, self._prompts, self._h, self._plan, self._report = trained, prompts, h, plan, report
        self._directory = directory
        self._copy = DrawingCopy(trained, plan) if prompts and h.validation_steps else None
        # What the text encoders make of the prompts, unless training changes that: they may be larger than what
        # training leaves of a card.
        self._embedded: dict[str, Conditioning] | None = None
        self._seeds = [_SEED + number for number in range(h.num_validation_images)]

    def is_due(self, step: int) -> bool:
        """See :class:`~dreambooth_sm.onlookers.Onlooker`."""
        return self._copy is not None and step % self._h.validation_steps == 0

    def look(self, weights: Iterable[tuple[str, Tensor]], step: int) -> None:
        """See :class:`~dreambooth_sm.onlookers.Onlooker`."""
        assert self._copy is not None
        model = self._copy.take(weights)
        try:
            self._draw(model, step, batch_size=1)  # the plan counts the memory for one
        except torch.OutOfMemoryError:
            self._copy = None
            self._report.warn(f"no memory for validation pictures at step {step}; the next ones come after training")

    def draw(self, step: int) -> None:
        """Draws with the model itself, before or after training, what an earlier attempt has not drawn."""
        if self._copy is not None and not encodes_in_steps(self._plan, self._h) and self._embedded is None:
            guidance = self._h.validation_guidance_scale
            self._embedded = embed_prompts(self._trained.model, self._plan, self._prompts, guidance)
        self._draw(self._trained.model, step, batch_size=self._plan.sample_batch_size)

    def _draw(self, model: PretrainedModel, step: int, *, batch_size: int) -> None:
        there = {(sample.prompt, sample.seed) for sample in self._report.samples if sample.step == step}
        missing = {p: [s for s in self._seeds if (p, s) not in there] for p in self._prompts}
        if not any(missing.values()):
            return
        drawn: list[ValidationPicture] = []
        guidance = self._h.validation_guidance_scale
        wanted = [prompt for prompt, seeds in missing.items() if seeds]
        sampler = make_sampler(model, self._plan, wanted, guidance, self._embedded)
        for prompt, seeds in missing.items():
            batches = draw(
                sampler, prompt, seeds, resolution=self._h.resolution, batch_size=batch_size, guidance=guidance
            )
            pictures = [picture for batch in batches for picture in batch]
            drawn += [self._write(picture, step, prompt, seed) for seed, picture in zip(seeds, pictures, strict=True)]
        del sampler
        self._report.drew(drawn)

    def _write(self, picture: Image.Image, step: int, prompt: str, seed: int) -> ValidationPicture:
        facts = PngInfo()
        facts.add_itxt("parameters", f"{prompt}\nSteps: {step} of training, Seed: {seed}")
        facts.add_itxt("prompt", prompt)
        png = BytesIO()
        picture.save(png, format="PNG", pnginfo=facts)
        content, number = png.getvalue(), self._prompts.index(prompt)
        path = self._directory / f"step-{step:06}-prompt-{number}-seed-{seed}-{_digest(content)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return ValidationPicture(step, prompt, seed, path)
