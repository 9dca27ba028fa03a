"""Stable Diffusion XL (Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image
Synthesis")."""

from __future__ import annotations

import re

from dreambooth_sm.families.facts import Facts, Footprint

FACTS = Facts(
    name="sdxl",
    title="Stable Diffusion XL",
    resolution=1024,
    footprint=Footprint(
        unet=2567.5,
        text_encoder=817.7,
        vae=83.7,
        vae_bytes=4,  # its VAE overflows in 16 bits
        trains_text_encoder=False,
    ),
    tags=("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    licences={"stabilityai/stable-diffusion-xl": "openrail++"},
    folder="text_encoder_2",
    tensor=b'"conditioner.embedders.1.',
    # juggernautXL_v9, sd_xl_base_1.0; and those that do without the letters.
    names=re.compile(r"xl(?![a-z])|pony|illustrious|noobai", re.IGNORECASE),
)
