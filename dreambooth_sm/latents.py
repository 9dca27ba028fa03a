"""What VAEs of pictures and VAEs of films have in common here. A film's takes a picture as its first frame."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def latent_channels(vae: Any) -> int:
    """Channels of a VAE's latents."""
    config = vae.config
    return int(config.z_dim if _is_of_films(vae) else config.latent_channels)


def latent_scale(vae: Any) -> int:
    """Pixels a side of one latent."""
    config = vae.config
    return 2 ** (len(config.temperal_downsample) if _is_of_films(vae) else len(config.block_out_channels) - 1)


def moments_of(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents of pictures ``(rows, 3, height, width)``, each ``(rows, channels, h, w)``."""
    if not _is_of_films(vae):
        found = vae.encode(pixels).latent_dist
        return found.mean, found.std
    found = vae.encode(pixels.unsqueeze(2)).latent_dist
    return found.mean.squeeze(2), found.std.squeeze(2)


def pixels_of(vae: Any, latents: Tensor) -> Tensor:
    """The pictures of latents ``(rows, channels, h, w)``, of the VAE's own scale."""
    if not _is_of_films(vae):
        pixels: Tensor = vae.decode(latents).sample
        return pixels
    film: Tensor = vae.decode(latents.unsqueeze(2)).sample
    return film[:, :, 0]


def _is_of_films(vae: Any) -> bool:
    return hasattr(vae.config, "temperal_downsample")
