"""Stable Diffusion 3.5 and 3 (Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image
Synthesis")."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dreambooth_sm.families.conditioning import Conditioning
from dreambooth_sm.families.facts import AdaptedLayers, Drawing, Facts, MakersName, ModelFootprint, Relative, Size
from dreambooth_sm.families.family import Pair
from dreambooth_sm.families.flow import read_texts, shift_by_words
from dreambooth_sm.families.two_streams import (
    OWN_TAKES,
    PATCH,
    TwoStreams,
    attend_alone,
    attend_together,
    changed_by,
    of_patches,
    runner,
    runs_in_fewer_passes,
    scale_problems,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Tokens of T5, as the pipeline reads them.
_WINDOW = 256
# Stable-diffusion-3.5-medium, sd3_medium, sd35.
_NAMES = re.compile(r"(?<![a-z])(stable[-_. ]?diffusion|sd)[-_. ]?3(?!\d*[a-z])", re.IGNORECASE)
_CLIPS = ("text_encoder", "text_encoder_2")
_FROZEN = "its text encoders stay as they are"
_USUAL = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
# Layers by the names of diffusers and of the makers, who have queries, keys and values in one.
_SIDES = (
    ("x_block.attn", "attn", ("to_q", "to_k", "to_v"), "to_out.0"),
    ("context_block.attn", "attn", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out"),
    ("x_block.attn2", "attn2", ("to_q", "to_k", "to_v"), "to_out.0"),
)
_NETS = (("x_block.mlp", "ff"), ("context_block.mlp", "ff_context"))
_ATTENTION = tuple(f"{attention}.{layer}" for _, attention, thirds, out in _SIDES for layer in (*thirds, out))
_LINEAR = (*_ATTENTION, *(f"{net}.net.{layer}" for _, net in _NETS for layer in ("0.proj", "2")))


def _makers_names() -> Iterator[MakersName]:
    ours, theirs = "transformer_blocks.{}.", "joint_blocks.{}."
    for place, attention, thirds, out in _SIDES:
        for number, layer in enumerate(thirds):
            yield MakersName(f"{ours}{attention}.{layer}", f"{theirs}{place}.qkv", (number, 1, 3))
        yield MakersName(f"{ours}{attention}.{out}", f"{theirs}{place}.proj")
    for place, net in _NETS:
        yield MakersName(f"{ours}{net}.net.0.proj", f"{theirs}{place}.fc1")
        yield MakersName(f"{ours}{net}.net.2", f"{theirs}{place}.fc2")
    yield MakersName(f"{ours}norm1.linear", f"{theirs}x_block.adaLN_modulation.1")


class _Files:
    """Pipeline directories as the hub has them."""

    classes = MappingProxyType(
        {
            "transformer": "SD3Transformer2DModel",
            "vae": "AutoencoderKL",
            "text_encoder": "CLIPTextModelWithProjection",
            "text_encoder_2": "CLIPTextModelWithProjection",
            "text_encoder_3": "T5EncoderModel",
            "tokenizer": "CLIPTokenizer",
            "tokenizer_2": "CLIPTokenizer",
            "tokenizer_3": "T5Tokenizer",
        }
    )

    def config_problems(self, part: str, config: Mapping[str, Any], where: str) -> list[str]:
        if part == "vae":
            return scale_problems(config, where, _USUAL)
        if part == "transformer" and (size := config.get("patch_size", PATCH)) != PATCH:
            return [f"{where}: patch_size is {size!r:.60}, and this project trains models with {PATCH}"]
        return []

    def fit_problems(self, pipeline: Any) -> list[str]:
        transformer, vae = pipeline.transformer.config, pipeline.vae.config
        clip, clip_2, reader = (getattr(pipeline, part).config for part in (*_CLIPS, "text_encoder_3"))
        problems = [
            f"{what}, and the transformer takes {taken}"
            for what, width, taken in (
                (
                    f"the VAE makes latents of {vae.latent_channels} channels",
                    vae.latent_channels,
                    transformer.in_channels,
                ),
                (f"T5's states are {reader.d_model} wide", reader.d_model, transformer.joint_attention_dim),
                (
                    f"what CLIP and OpenCLIP say of a whole prompt is {clip.projection_dim} and "
                    f"{clip_2.projection_dim} wide",
                    clip.projection_dim + clip_2.projection_dim,
                    transformer.pooled_projection_dim,
                ),
            )
            if width != taken
        ]
        return problems + [
            f"{name} has {len(tokenizer)} tokens and its text encoder {config.vocab_size}"
            for name, tokenizer, config in (
                ("tokenizer", pipeline.tokenizer, clip),
                ("tokenizer_2", pipeline.tokenizer_2, clip_2),
                ("tokenizer_3", pipeline.tokenizer_3, reader),
            )
            if len(tokenizer) > config.vocab_size
        ]


class StableDiffusion3(TwoStreams):
    """A transformer on a picture's patches and a prompt's words, side by side in all of its blocks.

    Text: ``states`` ``(rows, 77 + 256, width)``: those of both CLIPs, side by side and filled up with zeros to T5's
    width, then T5's, those of what prompts are filled up with as well; ``pooled`` ``(rows, width)`` of both CLIPs.
    """

    facts = Facts(
        name="sd3",
        title="Stable Diffusion 3.5",
        short="SD 3.5",
        article="an",
        listed="3.5",
        resolution=1024,
        footprint=ModelFootprint(
            denoiser=2469.7,  # of Medium, with its table of places
            text_encoder=5580.6,
            vae=83.8,
            text_width=4096,
            denoiser_coded=2241.8,
            text_coded=4630.5,
            largest_coded=21.2,
            trains_text_encoder=False,
        ),
        pipeline="StableDiffusion3Pipeline",
        drawing=Drawing(
            manner="Euler steps of flow matching",
            steps=28,
            class_steps=28,
            guidance=4.5,
            guided=(float("inf"), 0.0),
            batch=4,
        ),
        parts=("transformer", "vae", *_CLIPS, "text_encoder_3"),
        config={
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        methods={
            "lora": {
                "learning_rate": 1e-4,
                "lora_targets": "attention",  # more was compared on another family alone
                "time_sampling": "logit_normal",
                "export": "adapter",
                "export_precision": "bf16",
                "sample_guidance_scale": 4.5,
                "validation_guidance_scale": 4.5,
            }
        },
        adapted={
            "attention": AdaptedLayers(_ATTENTION, (), width=746_496, text_width=0),
            "linear": AdaptedLayers(_LINEAR, (), width=1_468_416, text_width=0),
        },
        tensor=b"joint_blocks.0.context_block.attn.qkv.weight",
        has_single_file=False,
        adapters="comfyui",
        scale_option="joint_attention_kwargs",
        makers_names=tuple(_makers_names()),
        files=_Files(),
        sizes=(
            Size(
                names=re.compile(r"large", re.IGNORECASE),
                config={"num_attention_heads": 38},
                tensor=b"joint_blocks.37.",
                footprint=ModelFootprint(
                    denoiser=8146.3,
                    text_encoder=5580.6,
                    vae=83.8,
                    text_width=4096,
                    denoiser_coded=8053.7,
                    text_coded=4630.5,
                    largest_coded=35.5,
                    trains_text_encoder=False,
                ),
                widths={"attention": 1_473_792, "linear": 3_297_792},
                # 38 blocks of 2,432 to 24 of 1,536, of which 13 have a second attention; a block's own; parameters.
                relative=Relative(kept=2.1, recomputed=1.7, cost=3.6),
            ),
        ),
        tags=("sd3", "sd3-diffusers"),
        licences={"stabilityai/stable-diffusion-3": "other"},
        gates={"stabilityai-ai-community": _NAMES},
        names=_NAMES,
        others=re.compile(r"controlnet|tensorrt|onnx", re.IGNORECASE),
        distilled=re.compile(r"turbo", re.IGNORECASE),
        hint="sd3",
        plain_text=_CLIPS,
        overflows=True,
        multiple=16,
        longest_prompt=_WINDOW,
        matches_flow=True,
        takes={
            **OWN_TAKES,
            "mixed_precision": (("auto", "bf16", "no"), "it was not tried in fp16"),
            "train_text_encoder": (("auto", False), _FROZEN),
            "text_encoder_lr": ((None,), _FROZEN),
            "max_token_length": ((75,), f"it reads prompts of up to {_WINDOW} tokens at once"),
        },
    )

    def tokenize(
        self, model: Any, prompts: Sequence[str], *, max_tokens: int | None = 75, pad: bool = True
    ) -> dict[str, Tensor]:
        """Both CLIPs read as much of a prompt as they can, whatever T5 reads of it."""
        title = self.facts.title
        read = read_texts(model.tokenizer_3, prompts, prompts, title, window=_WINDOW, max_tokens=max_tokens)
        length = model.tokenizer.model_max_length
        clips = [
            tokenizer(
                list(prompts),
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
                verbose=False,
            ).input_ids
            for tokenizer in (model.tokenizer, model.tokenizer_2)
        ]
        return {"ids": clips[0], "ids_2": clips[1], "ids_3": read["ids"]}

    def encode(self, model: Any, tokens: Mapping[str, Tensor]) -> Conditioning:
        import torch

        states, pooled = [], []
        for ids, ids_2, ids_3 in zip(tokens["ids"], tokens["ids_2"], tokens["ids_3"], strict=True):
            # One by one: T5's activations are large.
            clips = [
                encoder(input_ids=each[None], output_hidden_states=True)
                for encoder, each in ((model.text_encoder, ids), (model.text_encoder_2, ids_2))
            ]
            of_t5 = model.text_encoder_3(input_ids=ids_3[None])[0]
            of_clips = torch.cat([each.hidden_states[-2] for each in clips], dim=-1)
            of_clips = torch.nn.functional.pad(of_clips, (0, of_t5.shape[-1] - of_clips.shape[-1]))
            states.append(torch.cat([of_clips, of_t5], dim=1))
            pooled.append(torch.cat([each.text_embeds for each in clips], dim=-1))
        return Conditioning({"states": torch.cat(states), "pooled": torch.cat(pooled)})

    def extras(self, size: Pair, crop: Pair, target: Pair) -> Mapping[str, Sequence[float]]:
        return {}

    def predict(self, denoiser: Any, noised: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        text = conditioning.text
        given = noised, text["states"], text["pooled"], times.expand(len(noised))
        if denoiser.config.qk_norm and runs_in_fewer_passes(denoiser, noised, *_modulations(denoiser)):
            return run_in_fewer_passes(denoiser, *given)
        result: Tensor = denoiser(*given, return_dict=False)[0]
        return result

    def sampler(self, model: Any, steps: int, size: Pair, device: torch.device) -> Any:
        scheduler = type(model.scheduler).from_config(model.scheduler.config)
        shift = {}
        if scheduler.config.use_dynamic_shifting:
            pixels = PATCH * 2 ** (len(model.vae.config.block_out_channels) - 1)
            shift["mu"] = shift_by_words(scheduler.config, size[0] // pixels * (size[1] // pixels))
        scheduler.set_timesteps(steps, device=device, **shift)
        scheduler.set_begin_index(0)
        return scheduler


def _modulations(denoiser: Any) -> Iterator[Tensor]:
    for block in denoiser.transformer_blocks:
        yield from (*block.norm1.parameters(), *block.norm1_context.parameters())
        if block.attn2 is not None:
            yield from (block.attn2.norm_q.weight, block.attn2.norm_k.weight)


def run_in_fewer_passes(denoiser: Any, noised: Tensor, states: Tensor, pooled: Tensor, times: Tensor) -> Tensor:
    """What an SD3Transformer2DModel that normalises heads computes, but for rounding: norms, modulations and gates in
    one pass each. Takes what its forward does."""
    import torch

    run = runner(denoiser)
    picture = denoiser.pos_embed(noised).contiguous()
    told = denoiser.time_text_embed(times, pooled)
    words = denoiser.context_embedder(states)
    lit = torch.nn.functional.silu(told)
    # Places are in what patches are; heads are not turned.
    length, pairs = words.shape[1] + picture.shape[1], denoiser.config.attention_head_dim // 2
    turns = torch.ones(1, length, pairs, dtype=torch.complex64, device=words.device).expand(len(words), -1, -1)
    for block in denoiser.transformer_blocks:
        words, picture = run(_side_by_side, block, words, picture, lit, turns)
    made = denoiser.proj_out(denoiser.norm_out(picture, told))
    # A patch's channels are told apart last, and in `of_patches` first.
    made = made.unflatten(-1, (PATCH**2, -1)).transpose(-2, -1).flatten(-2)
    return of_patches(made, (len(noised), denoiser.out_channels, *noised.shape[-2:]))


def _side_by_side(
    block: Any, words: Tensor, picture: Tensor, told: Tensor, turns: Tensor
) -> tuple[Tensor | None, Tensor]:
    """What a JointTransformerBlock computes; None of words after the last block."""
    from dreambooth_sm.training.modulation import gated_sum, modulated_norm

    of_picture = block.norm1.linear(told).chunk(9 if block.attn2 is not None else 6, dim=-1)
    shown, picture = modulated_norm(picture, of_picture[1], of_picture[0], block.norm1.norm.eps)
    if block.context_pre_only:
        scale, shift = block.norm1_context.linear(told).chunk(2, dim=-1)
        of_words: Sequence[Tensor] = ()
    else:
        shift, scale, *of_words = block.norm1_context.linear(told).chunk(6, dim=-1)
    asked, words = modulated_norm(words, scale, shift, block.norm1_context.norm.eps)
    alone = None
    if block.attn2 is not None:
        alone, picture = modulated_norm(picture, of_picture[7], of_picture[6], block.norm1.norm.eps)
    seen_by_words, seen_by_picture = attend_together(block.attn, asked, shown, turns)
    gate, *of_net = of_picture[2:6]
    if alone is not None:
        picture, gate = gated_sum(picture, gate, seen_by_picture), of_picture[8]
        seen_by_picture = attend_alone(block.attn2, alone, turns[:, words.shape[1] :])
    picture = changed_by(picture, seen_by_picture, (gate, *of_net), block.norm2.eps, block.ff)
    if not of_words:
        return None, picture
    return changed_by(words, seen_by_words, of_words, block.norm2_context.eps, block.ff_context), picture


FAMILY = StableDiffusion3()
