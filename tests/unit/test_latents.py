"""VAEs of pictures and of films, by the same four questions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage

from dreambooth_sm.latents import latent_channels, latent_scale, moments_of, pixels_of


def of_pictures() -> Any:
    return AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=6,
    )


def of_films() -> Any:
    return AutoencoderKLQwenImage(base_dim=8, z_dim=6, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True])


@pytest.mark.parametrize("make", [of_pictures, of_films])
@torch.no_grad()
def test_latents_and_pictures_have_the_sizes_that_are_told(make: Any) -> None:
    vae = make()
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, deviation = moments_of(vae, pixels)
    scale = latent_scale(vae)
    assert mean.shape == deviation.shape == (2, latent_channels(vae), 16 // scale, 24 // scale)
    assert (deviation > 0).all()
    assert pixels_of(vae, mean).shape == pixels.shape


@torch.no_grad()
def test_a_picture_is_the_first_frame_of_a_film() -> None:
    vae = of_films()
    film = torch.rand(1, 3, 5, 16, 16)
    mean, _ = moments_of(vae, film[:, :, 0])
    assert torch.allclose(mean, vae.encode(film).latent_dist.mean[:, :, 0], atol=1e-5)
