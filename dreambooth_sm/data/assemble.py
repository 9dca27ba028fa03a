"""The training set: everything that the loop reads, encoded by the model's own VAE and text encoders."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch

from dreambooth_sm.data.class_cache import is_latents
from dreambooth_sm.data.concepts import Subject, shapes_of, shapes_of_class_pictures
from dreambooth_sm.data.conditioning import embed
from dreambooth_sm.data.masks import read_mask
from dreambooth_sm.data.pictures import View
from dreambooth_sm.data.prior_outputs import Output, base_outputs
from dreambooth_sm.data.training_set import (
    BatchSampler,
    Latents,
    PictureExtras,
    PromptTable,
    SubjectWeights,
    TrainingRow,
    mix,
    views_of,
)
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.latents import latent_channels
from dreambooth_sm.memory import free_memory
from dreambooth_sm.methods import asks_base_of_classes, encodes_in_steps
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.memory import OUTPUTS_PER_IMAGE
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.sampling import drawing_part
from dreambooth_sm.training.loop import TrainingSet


def encode_training_set(
    base: PretrainedModel,
    subjects: tuple[Subject, ...],
    h: Hyperparameters,
    plan: Plan,
    *,
    device: torch.device,
    seed: int,
) -> TrainingSet:
    """Puts latents and prompts on the device; VAE and text encoders are there one after the other, to encode them."""
    table = PromptTable(base.family, max_tokens=h.max_token_length, pad=h.pad_tokens, shuffle=h.shuffle_tags, seed=seed)
    shapes = shapes_of(subjects, h)
    instances = [
        TrainingRow(path, table.rows(prompt), shape)
        for s, its in zip(subjects, shapes, strict=True)
        for path, prompt, shape in zip(s.pictures, s.prompts or [s.prompt] * len(s.pictures), its, strict=True)
    ]
    classes = [
        TrainingRow(path, table.rows(s.class_prompt), shape)
        for s, its in zip(subjects, shapes, strict=True)
        if s.class_prompt
        for path, shape in zip(s.class_pictures, shapes_of_class_pictures(s, its), strict=True)
    ]
    # With fewer class pictures of the user's than shapes, some serve in more than one.
    missing = {sample.shape for sample in instances} - {sample.shape for sample in classes}
    own = [sample for sample in classes if not is_latents(sample.picture)]
    if classes:
        classes += [dataclasses.replace(own[0], shape=shape) for shape in sorted(missing)]
    pictures = [sample.picture for sample in (*instances, *classes)]
    trained_in = [sample.shape for sample in (*instances, *classes)]
    (empty,) = table.rows("") if h.caption_dropout else (0,)
    masks = [read_mask(sample.picture) for sample in instances] + [None] * len(classes)
    views = views_of(pictures, trained_in, masks, seed, random_crop=not h.center_crop, mirror=h.hflip)
    vae = base.part("vae", device, torch.float32)
    latents = Latents(pictures, trained_in, views, vae, base.family, cached=plan.cache_latents)
    del vae
    extras = PictureExtras(pictures, trained_in, views, base.family.extras)
    make_batch_sampler = partial(
        BatchSampler,
        views=len(views[0]),
        channels=latent_channels(base.vae),
        latent_scale=base.latent_scale,
        timesteps=base.family.objective(base, h).times,
        empty_prompt=empty,
        caption_dropout=h.caption_dropout,
        noise_offset=h.noise_offset,
    )
    class_prompts = [str(subject.class_prompt) for subject in subjects for _ in subject.pictures]
    if asks_base_of_classes(h):
        for row, instance in enumerate(instances):
            classes.append(TrainingRow(instance.picture, table.rows(class_prompts[row]), instance.shape))
            latents.repeat(row)
            extras.repeat(row)
            masks.append(None)
            trained_in.append(instance.shape)
            views.append(views[row])
    elif h.prior_preservation and h.prior == "output":
        batch_sampler = make_batch_sampler(instances, [], seed=mix(seed, len(instances)))
        for output in outputs_of_base(base, subjects, h, plan, batch_sampler, latents, extras):
            instance = instances[output.instance]
            prompt_rows = table.rows(class_prompts[output.instance])
            classes.append(TrainingRow(instance.picture, prompt_rows, instance.shape, output.noise, output.timestep))
            latents.append(output.latents.to(device))
            extras.append(output.instance, output.view)
            masks.append(None)
            trained_in.append(instance.shape)
            views.append([View()])
    free_memory()
    if encodes_in_steps(plan, h):
        prompts = {name: value.to(device) for name, value in table.tokens(base).items()}
    else:
        prompts = dict(table.embeddings(base.with_parts(_text_encoders(base, plan, device))).text)
        free_memory()
    batch_sampler = make_batch_sampler(instances, classes, seed=seed)
    weights = None
    if h.background_weight is not None:
        weights = SubjectWeights(
            masks, trained_in, views, latent_scale=base.latent_scale, background=h.background_weight, device=device
        )
    return TrainingSet(batch_sampler, latents, prompts, extras, weights)


def _text_encoders(base: PretrainedModel, plan: Plan, device: torch.device) -> dict[str, Any]:
    """In full precision, where that is not a language model of gigabytes on a card."""
    if base.family.facts.footprint.has_language_model:
        return {part: drawing_part(base, plan, part) for part in base.text_parts}
    return {part: base.part(part, device, torch.float32) for part in base.text_parts}


def outputs_of_base(
    base: PretrainedModel,
    subjects: tuple[Subject, ...],
    h: Hyperparameters,
    plan: Plan,
    batch_sampler: BatchSampler,
    latents: Latents,
    extras: PictureExtras,
) -> list[Output]:
    """Asks the untrained base model about the subjects' noised pictures under their class prompts."""
    prompts = [str(subject.class_prompt) for subject in subjects for _ in subject.pictures]
    encoding = base.with_parts({part: drawing_part(base, plan, part) for part in base.text_parts})
    conditions = embed(base.family, encoding, prompts, max_tokens=h.max_token_length, pad=h.pad_tokens)
    del encoding
    outputs = base_outputs(
        drawing_part(base, plan, base.family.facts.denoiser),
        base.family,
        base.family.objective(base, h),
        batch_sampler,
        latents,
        lambda batch: conditions.of(batch.pictures).beside(extras(batch)),
        count=OUTPUTS_PER_IMAGE * h.num_class_images,
        batch_size=plan.sample_batch_size,
    )
    return list(outputs)
