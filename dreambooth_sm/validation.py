"""Pictures of the same prompts and seeds before, during and after training, for people to compare."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.models import BaseModel
from dreambooth_sm.plan import Plan
from dreambooth_sm.report import Reporter
from dreambooth_sm.sampling import draw, sampling_pipeline

SAMPLES = "samples"
# Apart from the seeds of class images, which the model is trained on.
_SEED = 2_000


@dataclass(frozen=True)
class Sample:
    """One picture.

    Attributes:
        step: optimizer steps done; 0 for the base model.
        path: of the PNG, whose metadata names all of this.
    """

    step: int
    prompt: str
    seed: int
    path: Path


def validation_prompts(h: Hyperparameters, subjects: tuple[Subject, ...]) -> tuple[str, ...]:
    """The job's validation prompts, and the class prompts beside them, which show what the class has become."""
    if h.validation_prompt is None:
        return ()
    asked = [part.strip() for part in h.validation_prompt.split("|")]
    classes = [subject.class_prompt for subject in subjects if subject.class_prompt]
    return tuple(dict.fromkeys(prompt for prompt in [*asked, *classes] if prompt))


class Validator:
    """Draws the validation prompts again and again, with the same seeds.

    Training's own modules are never touched: while it goes on, its weights are copied into modules of their own, which
    are on the device only while they draw.

    Args:
        base: the model, before training.
        directory: for the pictures.
    """

    def __init__(
        self,
        base: BaseModel,
        prompts: tuple[str, ...],
        h: Hyperparameters,
        plan: Plan,
        directory: Path,
        report: Reporter,
    ) -> None:
        self._base, self._prompts, self._h, self._plan, self._report = base, prompts, h, plan, report
        self._directory = directory
        self._copy: BaseModel | None = None
        self.samples: list[Sample] = []
        if prompts and h.validation_steps:
            # In half precision where pictures are drawn so: host memory is short where cards are small.
            dtype = torch.float16 if plan.device != "cpu" and plan.precision != "fp32" else torch.float32
            self._copy = copy.copy(base)
            self._copy.unet = copy.deepcopy(base.unet).to(dtype)
            if plan.train_text_encoder:
                self._copy.text_encoder = copy.deepcopy(base.text_encoder).to(dtype)
            if not plan.cache_latents:  # training needs the VAE where it is
                self._copy.vae = copy.deepcopy(base.vae).to(torch.promote_types(dtype, base.vae_dtype))

    def is_due(self, step: int) -> bool:
        """Whether pictures are wanted after ``step`` steps of training that goes on."""
        return self._copy is not None and step % self._h.validation_steps == 0

    def draw_from(self, weights: Iterable[tuple[str, str, Tensor]], step: int) -> None:
        """Draws with weights of training, and goes without where the device has no memory left for it.

        Args:
            weights: module (``unet``, ``text_encoder``), name and value of each parameter that is trained.
        """
        assert self._copy is not None
        parameters = {name: dict(getattr(self._copy, name).named_parameters()) for name in ("unet", "text_encoder")}
        with torch.no_grad():
            for name, key, value in weights:
                parameters[name][key].copy_(value)
        try:
            self._draw(self._copy, step)
        except torch.OutOfMemoryError:
            self._copy.to("cpu")
            self._copy = None
            self._report.warn(f"no memory for validation pictures at step {step}; the next ones come after training")

    def draw(self, step: int) -> None:
        """Draws with the model itself, before or after training."""
        if self._prompts:
            self._draw(self._base, step)

    def _draw(self, model: BaseModel, step: int) -> None:
        pipeline = sampling_pipeline(model, self._plan)
        seeds = [_SEED + number for number in range(self._h.num_validation_images)]
        self._directory.mkdir(parents=True, exist_ok=True)
        for number, prompt in enumerate(self._prompts):
            batches = draw(
                pipeline,
                prompt,
                seeds,
                resolution=self._h.resolution,
                batch_size=self._plan.sample_batch_size,
                guidance=self._h.validation_guidance_scale,
            )
            pictures = [picture for batch in batches for picture in batch]
            for seed, picture in zip(seeds, pictures, strict=True):
                path = self._directory / f"step-{step:06}-prompt-{number}-seed-{seed}.png"
                facts = PngInfo()
                facts.add_itxt("parameters", f"{prompt}\nSteps: {step} of training, Seed: {seed}")
                facts.add_itxt("prompt", prompt)
                picture.save(path, pnginfo=facts)
                self.samples.append(Sample(step, prompt, seed, path))
        del pipeline
        model.to("cpu")
        self._report.metrics(validation=step, pictures=len(self._prompts) * len(seeds))
