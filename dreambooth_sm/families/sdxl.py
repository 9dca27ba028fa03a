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
        activations_gb=1.58,
        checkpointed_gb=0.207,
        drawn_gb=0.1,
        vae_bytes=4,  # its VAE overflows in 16 bits
        trains_text_encoder=False,
    ),
    # As measured on an H100 at 1,024 pixels; arithmetic says 2.1 for both.
    step_cost=1.6,
    class_image_cost=1.8,
    tags=("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    licences={"stabilityai/stable-diffusion-xl": "openrail++"},
    folder="text_encoder_2",
    tensor=b'"conditioner.embedders.1.',
    # juggernautXL_v9, sd_xl_base_1.0; and those that do without the letters.
    names=re.compile(r"xl(?![a-z])|pony|illustrious|noobai", re.IGNORECASE),
)
