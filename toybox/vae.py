"""Trains the VAE of a toybox, and encodes pictures with it."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from dreambooth_sm.toybox.judge import as_input
from toybox.networks import as_pixels, normalise_latents
from toybox.optimise import Outcome, random_rows, train_for


def train_vae(
    vae: AutoencoderKL,
    pixels: Tensor,
    seconds: float,
    batch: int,
    *,
    divergence_weight: float = 2e-4,
    halved_weight: float = 0.0,
) -> Outcome:
    """Trains the VAE, then gives its latents, shifted and scaled, mean 0 and deviation 1.

    Args:
        pixels: uint8 ``(photos, 128, 128, 3)``, on the VAE's device.
        divergence_weight: of the latents' divergence from pure noise.
        halved_weight: of the error of pictures of half the size that are drawn from latents of half the size, which
            makes latents smooth, and easier to draw (Kouzelis et al. 2025, "EQ-VAE").
    """

    def loss() -> Tensor:
        real = as_input(pixels[random_rows(len(pixels), batch, pixels.device)])
        code = vae.encode(real.to(vae.dtype)).latent_dist
        mean, log_variance = code.mean.float(), code.logvar.float()
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        drawn = vae.decode(latents.to(vae.dtype)).sample.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        error = reconstruction_loss(drawn, real)
        if halved_weight:
            smaller = vae.decode(F.avg_pool2d(latents, 2).to(vae.dtype)).sample.float()
            error = error + halved_weight * reconstruction_loss(smaller, F.avg_pool2d(real, 2))
        return error + divergence_weight * divergence

    outcome = train_for(seconds, [vae], loss, name="vae", rows=batch, rate=1e-3, weight_decay=1e-4)
    means = _encode(vae, pixels[:2048])[:, : vae.config.latent_channels]
    normalise_latents(vae, means.mean((0, 2, 3)), means.std((0, 2, 3)))
    return outcome


def reconstruction_loss(drawn: Tensor, real: Tensor) -> Tensor:
    """Mean absolute errors of pixels, and of their differences to their neighbours, at three scales.

    The differences keep outlines crisp; squared errors would blur them.

    Args:
        drawn, real: ``(pictures, 3, height, width)``.
    """
    total = (drawn - real).abs().mean()
    for scale in range(3):
        if scale:
            drawn, real = F.avg_pool2d(drawn, 2), F.avg_pool2d(real, 2)
            total = total + 0.5 * (drawn - real).abs().mean()
        error = drawn - real
        total = total + 0.5 * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())
    return total


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Means and deviations of the latents, shifted and scaled: float32 ``(photos, 2 * channels, 16, 16)``."""
    latents = _encode(vae, pixels)
    latents[:, : vae.config.latent_channels] -= vae.config.shift_factor or 0.0
    return latents.mul_(vae.config.scaling_factor)


@torch.no_grad()
def _encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Means and deviations of the latents as the VAE makes them."""
    parts = []
    for batch in pixels.split(256):
        code = vae.encode(as_input(batch)).latent_dist
        parts.append(torch.cat([code.mean, code.std], dim=1))
    return torch.cat(parts)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: Tensor, noise: float) -> Tensor:
    """Encodes and decodes pictures with the VAE: uint8, shaped like ``pixels``.

    Args:
        noise: its deviation, where that of latents is 1.
    """
    parts = []
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda):
        for batch in pixels.split(256):
            latents = vae.encode(as_input(batch)).latent_dist.mean.float()
            latents += noise / vae.config.scaling_factor * torch.randn_like(latents)
            parts.append(as_pixels(vae.decode(latents).sample))
    return torch.cat(parts)
