"""Stable Diffusion XL (Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image
Synthesis")."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dreambooth_sm.families.conditioning import Conditioning
from dreambooth_sm.families.facts import AdaptedLayers, Facts, ModelFootprint
from dreambooth_sm.families.family import Pair
from dreambooth_sm.families.sd import (
    ALL,
    ATTENTION,
    DRAWING,
    LINEAR,
    LORA_DEFAULTS,
    PIVOTAL_DEFAULTS,
    TEXT_ATTENTION,
    TEXT_LINEAR,
    StableDiffusion,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class StableDiffusionXL(StableDiffusion):
    """A UNet on the states of two text encoders, side by side, that is told of the whole prompt and of the picture.

    Text: ``states`` ``(rows, chunks * length, width of both)`` and ``pooled`` ``(rows, width)``. Extras: ``sizes``
    ``(rows, 6)``.
    """

    facts = Facts(
        name="sdxl",
        title="Stable Diffusion XL",
        short="SDXL",
        article="an",
        listed="XL",
        resolution=1024,
        footprint=ModelFootprint(
            denoiser=2567.5,
            text_encoder=817.7,
            vae=83.7,
            text_width=2048,
            denoiser_coded=2560.6,
            text_coded=714.7,
            vae_bytes=4,  # its VAE overflows in 16 bits
            trains_text_encoder=False,
        ),
        pipeline="StableDiffusionXLPipeline",
        drawing=DRAWING,
        parts=("unet", "vae", "text_encoder", "text_encoder_2"),
        methods={
            "full": {},
            "lora": LORA_DEFAULTS,
            "textual_inversion": {"learning_rate": 5e-4, "adam_weight_decay": 0.0, "with_prior_preservation": False},
            "pivotal": PIVOTAL_DEFAULTS,
        },
        adapted={
            "attention": AdaptedLayers(ATTENTION, TEXT_ATTENTION, width=1_451_520, text_width=401_408),
            "linear": AdaptedLayers(LINEAR, TEXT_LINEAR, width=2_659_840, text_width=903_168),
            "all": AdaptedLayers(ALL, TEXT_LINEAR, width=3_074_240, text_width=903_168),
        },
        tags=("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
        licences={"stabilityai/stable-diffusion-xl": "openrail++"},
        folder="text_encoder_2",
        tensor=b'"conditioner.embedders.1.',
        # juggernautXL_v9, sd_xl_base_1.0; and those that do without the letters.
        names=re.compile(r"xl(?![a-z])|pony|illustrious|noobai", re.IGNORECASE),
        hint="xl",
    )

    def tokenize(
        self, model: Any, prompts: Sequence[str], *, max_tokens: int | None = 75, pad: bool = True
    ) -> dict[str, Tensor]:
        import torch

        from dreambooth_sm.data.prompts import tokenize_for

        tokenizers = (model.tokenizer, model.tokenizer_2)
        first, second = tokenize_for(tokenizers, list(prompts), max_tokens=max_tokens, pad=pad)
        return {"ids": first, "ids_2": second, "empty": torch.tensor([not prompt for prompt in prompts])}

    def encode(self, model: Any, tokens: Mapping[str, Tensor]) -> Conditioning:
        from dreambooth_sm.data.prompts import encode_two

        encoders = (model.text_encoder, model.text_encoder_2)
        states, pooled = encode_two(encoders, (tokens["ids"], tokens["ids_2"]))
        if model.config.get("force_zeros_for_empty_prompt", True):
            empty = tokens["empty"][:, None]
            states = states.masked_fill(empty[..., None], 0)
            pooled = pooled.masked_fill(empty, 0)
        return Conditioning({"states": states, "pooled": pooled})

    def extras(self, size: Pair, crop: Pair, target: Pair) -> Mapping[str, Sequence[float]]:
        """The six numbers of section 2.2: height and width, top and left, height and width."""
        return {"sizes": (*reversed(size), *reversed(crop), *reversed(target))}

    def predict(self, denoiser: Any, noised: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        text = conditioning.text
        # Sizes are embedded as angles: float32.
        added = {"text_embeds": text["pooled"], "time_ids": conditioning.extras["sizes"]}
        prediction: Tensor = denoiser(
            noised, times, encoder_hidden_states=text["states"], added_cond_kwargs=added, return_dict=False
        )[0]
        return prediction

    def vae_dtype(self, vae: Any) -> torch.dtype:
        """Its first VAE overflows in fp16."""
        import torch

        return torch.float32 if vae.force_upcast else torch.float16


FAMILY = StableDiffusionXL()
