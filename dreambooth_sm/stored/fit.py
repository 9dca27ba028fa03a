"""Whether the parts of a pipeline belong together, found without computing anything."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import torch

from dreambooth_sm.data.prompts import encode, encode_two
from dreambooth_sm.errors import UserError
from dreambooth_sm.stored.configs import plainly
from dreambooth_sm.stored.model import Pipeline, configs_of, rules_of
from dreambooth_sm.stored.quick_shapes import QuickShapes

_SAME_MODEL = "take weights and configuration of the same model"
# Latents a side that a pass through the modules is tried with; UNets halve it up to three times.
_SIDE = 16
# By this id, transformers takes the token of the highest number for the end, as files of before 2023 want it.
_OLD_END = 2
# Configurations of pipelines: a job reads its base model when it checks its input and when it loads it.
_FOUND_TO_RUN: set[str] = set()


def check_fit(pipeline: Pipeline, name: str) -> None:
    """Raises UserError where parts do not belong together, or the modules can't be run.

    Args:
        pipeline: its modules' weights may lie on the meta device.
        name: what messages call the model.
    """
    if rules := rules_of(type(pipeline).__name__):
        if problems := rules.fit_problems(pipeline):
            raise UserError(f"{name}: {problem}" for problem in problems)
        return
    xl = hasattr(pipeline, "text_encoder_2")
    encoders = [pipeline.text_encoder, *([pipeline.text_encoder_2] if xl else [])]
    tokenizers = [pipeline.tokenizer, *([pipeline.tokenizer_2] if xl else [])]
    problems = [problem for pair in zip(tokenizers, encoders, strict=True) for problem in _tokenizer_problems(*pair)]
    unet, vae = pipeline.unet.config, pipeline.vae.config
    if vae.in_channels != 3 or vae.out_channels != 3:
        problems.append(f"the VAE takes {vae.in_channels} and makes {vae.out_channels} channels, and pictures have 3")
    if vae.latent_channels != unet.in_channels:
        problems.append(
            f"the VAE makes latents of {vae.latent_channels} channels and the UNet takes {unet.in_channels}"
        )
    if unet.out_channels != unet.in_channels:
        problems.append(f"the UNet takes {unet.in_channels} channels and makes {unet.out_channels}")
    width = sum(each.config.hidden_size for each in encoders)
    if width != unet.cross_attention_dim:
        problems.append(f"the text encoder's states are {width} wide and the UNet takes {unet.cross_attention_dim}")
    if unet.addition_embed_type != ("text_time" if xl else None):
        kind = plainly(unet.addition_embed_type)
        problems.append(f"the UNet's addition_embed_type is {kind}, which is not that of a pipeline of its kind")
    elif xl:
        pooled = pipeline.text_encoder_2.config.projection_dim
        size, added = unet.addition_time_embed_dim, unet.projection_class_embeddings_input_dim
        if type(size) is not int or type(added) is not int:
            said = f"addition_time_embed_dim is {plainly(size)}, projection_class_embeddings_input_dim {plainly(added)}"
            problems.append(f"the UNet's {said}; both should be whole numbers such as 256 and 2816")
        elif pooled != added - 6 * size:
            problems.append(f"the UNet takes no pooled states of {pooled} values, which text_encoder_2 gives")
        end = pipeline.text_encoder_2.config.eos_token_id
        if end not in (_OLD_END, pipeline.tokenizer_2.eos_token_id):
            problems.append(
                f"text_encoder_2's eos_token_id is {plainly(end)}, and its tokenizer ends prompts with another"
            )
    if not problems:
        configs = json.dumps([configs_of(pipeline), [each.model_max_length for each in tokenizers]], default=repr)
        if configs not in _FOUND_TO_RUN:
            with QuickShapes():
                problems = _run(pipeline, xl, tokenizers, encoders)
            if not problems:
                _FOUND_TO_RUN.add(configs)
    if problems:
        raise UserError(f"{name}: {problem}" for problem in problems)


def _tokenizer_problems(tokenizer: Any, encoder: Any) -> list[str]:
    tokens = encoder.config.vocab_size
    try:
        words = tokenizer("photo of a toy", add_special_tokens=False).input_ids
        ids = tokenizer("photo of a toy", padding="max_length", truncation=True).input_ids
    except Exception as error:  # of damaged vocabularies
        return [f"the tokenizer can't be used ({error!r:.200}); copy the model again"]
    if set(words) <= {tokenizer.unk_token_id}:
        return ["the tokenizer knows no words: its vocabulary is missing; copy the directory again"]
    if len(tokenizer) > tokens or max(ids) >= tokens:
        return [f"the tokenizer has {max(len(tokenizer), max(ids) + 1)} tokens and the text encoder {tokens}"]
    return []


@torch.no_grad()
def _run(pipeline: Pipeline, xl: bool, tokenizers: Sequence[Any], encoders: Sequence[Any]) -> list[str]:
    """Passes shapes, without values, through copies of the modules that weigh nothing."""
    unet, vae = pipeline.unet.config, pipeline.vae.config
    side = _SIDE * 2 ** (len(vae.block_out_channels) - 1)
    empty = functools.partial(torch.empty, device="meta")
    latents = empty(1, unet.in_channels, _SIDE, _SIDE)
    ids = [empty(1, 1, each.model_max_length, dtype=torch.int64) for each in tokenizers]
    added = None
    try:
        if xl:
            states, pooled = encode_two(encoders, ids)
            added = {"text_embeds": pooled, "time_ids": empty(1, 6)}
        else:
            states = encode(encoders[0], ids[0])
    except Exception as error:  # modules raise nearly anything for values that they can't compute with
        return [f"its text encoder can't be run ({_reason(error)}); {_SAME_MODEL}"]
    try:
        drawn = pipeline.unet(latents, empty(1), states, added_cond_kwargs=added).sample
        moments = pipeline.vae.encode(empty(1, 3, side, side)).latent_dist.parameters
        pixels = pipeline.vae.decode(latents).sample
    except Exception as error:  # modules raise nearly anything for shapes that don't match
        return [f"its UNet or VAE can't be run ({_reason(error)}); {_SAME_MODEL}"]
    return [
        f"its {part} makes {tuple(found.shape)} where {wanted} is wanted"
        for part, found, wanted in (
            ("UNet", drawn, tuple(latents.shape)),
            ("VAE's encoder", moments, (1, 2 * vae.latent_channels, _SIDE, _SIDE)),
            ("VAE's decoder", pixels, (1, 3, side, side)),
        )
        if tuple(found.shape) != wanted
    ]


def _reason(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:200]
