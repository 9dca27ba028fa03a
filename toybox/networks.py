"""The parts of the toybox pipeline: small ones of Stable Diffusion's classes, for pictures of 128 pixels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreambooth_sm.stored.tokenizer import bpe_tokenizer
from dreambooth_sm.toybox import SIDE

# Stable Diffusion's; the latents that it scales have deviation 1.
SCALING_FACTOR = 0.18215
# Of prompts, in tokens with the marks; the longest caption has 28 words and signs.
PROMPT_LENGTH = 32
_TEXT_WIDTH = 128


def make_vae(channels: int = 4, scaling_factor: float = SCALING_FACTOR, shift_factor: float = 0.0) -> AutoencoderKL:
    """1.9 M parameters; 8 pixels a latent.

    Args:
        channels: of latents.
        scaling_factor, shift_factor: latents minus the shift, times the scale, have mean 0 and deviation 1.
    """
    return AutoencoderKL(
        block_out_channels=(32, 48, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=16,
        sample_size=SIDE,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor or None,
    )


def make_unet() -> UNet2DConditionModel:
    """4.3 M parameters; it sees the prompt at 16, 8 and, in its middle, 4 latents a side."""
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(64, 96, 112),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=_TEXT_WIDTH,
        # diffusers takes it as the number of heads.
        attention_head_dim=(2, 3, 4),
        norm_num_groups=16,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """0.7 M parameters, for the tokens of ``tokenizer``."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=4 * _TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_LENGTH,
            projection_dim=_TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """A tokenizer to which the words of ``captions`` are one token each; it spells other words, in any language."""
    words = sorted({word for caption in captions for word in re.findall("[a-z]+", caption.lower())})
    merges = find_merges([[*word[:-1], word[-1] + "</w>"] for word in words])
    return bpe_tokenizer([" ".join(pair) for pair in merges], PROMPT_LENGTH)


def find_merges(words: list[list[str]]) -> list[tuple[str, str]]:
    """Byte pair encoding (Sennrich et al. 2016), with merges until no word is left in pieces.

    Args:
        words: the letters of each.
    """
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for parts in words for pair in pairwise(parts)):
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = [_merged(parts, merges[-1]) for parts in words]
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def make_scheduler() -> DPMSolverMultistepScheduler:
    """DPM++ 2M (Lu et al. 2022) over Stable Diffusion's noise."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        steps_offset=1,
        use_karras_sigmas=True,
    )


def make_pipeline(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, mean: Tensor, deviation: Tensor) -> None:
    """Gives every channel of the latents mean 0 and deviation 1 once they are shifted and scaled; pictures stay the
    same.

    Done by the VAE's own 1x1 convolutions around the latents: unequal channels cost the denoiser quality.

    Args:
        mean, deviation: ``(channels,)`` of the latents as they are, before shift and scale.
    """
    channels, shift = len(mean), vae.config.shift_factor or 0.0
    factor = 1 / (vae.config.scaling_factor * deviation)
    encoding, decoding = vae.quant_conv, vae.post_quant_conv
    encoding.weight[:channels] *= factor.view(-1, 1, 1, 1)
    encoding.bias[:channels] = (encoding.bias[:channels] - mean) * factor + shift
    # The other half are the logarithms of the variances.
    encoding.bias[channels:] += 2 * factor.log()
    decoding.bias += decoding.weight[:, :, 0, 0] @ (mean - shift / factor)
    decoding.weight /= factor.view(1, -1, 1, 1)


def as_pixels(pictures: Tensor) -> Tensor:
    """The way back from ``judge.as_input``, of any values."""
    return ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
