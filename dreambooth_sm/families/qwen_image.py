"""Qwen-Image (Alibaba 2025, "Qwen-Image Technical Report"), and its later versions of the same kind, such as 2512."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dreambooth_sm.families.conditioning import Conditioning
from dreambooth_sm.families.facts import AdaptedLayers, Drawing, Facts, ModelFootprint
from dreambooth_sm.families.flow import TAKES, WINDOW, read_texts, vocabulary_problems
from dreambooth_sm.families.qwen_parts import (
    BEFORE,
    BEHIND,
    UNSEEN,
    QwenParts,
    channel_problems,
    filled_up,
    statistics_problems,
)
from dreambooth_sm.families.two_streams import PATCH, TIMES, attend_together, changed_by, in_patches, of_patches

if TYPE_CHECKING:
    from torch import Tensor

_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_LINEAR = (
    *_ATTENTION,
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
)


class _Files:
    """Pipeline directories as the hub has them; of the text encoder, the part that sees pictures is left there."""

    classes = MappingProxyType(
        {
            "transformer": "QwenImageTransformer2DModel",
            "vae": "AutoencoderKLQwenImage",
            "text_encoder": "Qwen2_5_VLTextModel",
            "tokenizer": "Qwen2Tokenizer",
        }
    )

    def config_problems(self, part: str, config: Mapping[str, Any], where: str) -> list[str]:
        if part == "vae":
            return statistics_problems(config, where)
        if part != "transformer":
            return []
        usual = {
            "patch_size": PATCH,
            "guidance_embeds": False,
            **dict.fromkeys(("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"), False),
        }
        return [
            f"{where}: {key} is {value!r:.60}, and this project trains models with {wanted}"
            for key, wanted in usual.items()
            if (value := config.get(key, wanted)) != wanted
        ]

    def fit_problems(self, pipeline: Any) -> list[str]:
        transformer, vae, text = pipeline.transformer.config, pipeline.vae.config, pipeline.text_encoder.config
        problems = [*vocabulary_problems(pipeline.tokenizer, text), *channel_problems(transformer, vae)]
        if transformer.out_channels != vae.z_dim:
            problems.append(
                f"the VAE makes latents of {vae.z_dim} channels, and the transformer makes {transformer.out_channels}"
            )
        if text.hidden_size != transformer.joint_attention_dim:
            problems.append(
                f"the text encoder's states are {text.hidden_size} wide, and the transformer takes "
                f"{transformer.joint_attention_dim}"
            )
        return problems


class QwenImage(QwenParts):
    """A transformer on a picture's patches and a prompt's words, side by side.

    Text: ``states`` ``(rows, words, width)`` of a language model, behind those of the template that comes first, and
    zeros where other rows have more; ``kept`` ``(rows, words)``, those that are looked at, where rows have more than
    others.
    """

    facts = Facts(
        name="qwen_image",
        title="Qwen-Image",
        short="Qwen-Image",
        article="a",
        listed="Qwen-Image",
        resolution=1024,
        footprint=ModelFootprint(
            denoiser=20_430.4,
            text_encoder=7070.6,
            vae=126.9,
            text_width=3584,
            denoiser_coded=20_424.8,
            text_coded=6525.3,
            largest_coded=56.6,
            trains_text_encoder=False,
        ),
        pipeline="QwenImagePipeline",
        drawing=Drawing(
            manner="Euler steps of flow matching",
            steps=50,
            class_steps=28,
            guidance=4.0,
            guided=(float("inf"), 0.0),
            batch=2,
        ),
        parts=("transformer", "vae", "text_encoder"),
        methods={
            "lora": {
                "learning_rate": 1e-4,
                "lora_targets": "attention",  # more was compared on another family alone
                "export": "adapter",
                "export_precision": "bf16",
                "sample_guidance_scale": 4.0,
                "validation_guidance_scale": 4.0,
            }
        },
        adapted={
            "attention": AdaptedLayers(_ATTENTION, (), width=1_474_560, text_width=0),
            "linear": AdaptedLayers(_LINEAR, (), width=6_635_520, text_width=0),
        },
        tensor=b"transformer_blocks.0.txt_mod.1.weight",
        has_single_file=False,
        adapters="comfyui",
        scale_option="attention_kwargs",
        call_options={"negative_prompt": ""},
        files=_Files(),
        tags=("qwen-image",),
        licences={"Qwen/Qwen-Image": "apache-2.0"},
        names=re.compile(r"qwen[-_ ]?image", re.IGNORECASE),
        others=re.compile(r"qwen[-_ ]?image[-_ ]?(edit|layered|controlnet|2[._]1)", re.IGNORECASE),
        distilled=re.compile(r"lightning|distill|turbo", re.IGNORECASE),
        hint="qwen-image",
        overflows=True,
        multiple=16,
        longest_prompt=WINDOW,
        matches_flow=True,
        takes={**TAKES, "mixed_precision": (("auto", "bf16", "no"), "it was not tried in fp16")},
    )

    def tokenize(
        self, model: Any, prompts: Sequence[str], *, max_tokens: int | None = 75, pad: bool = True
    ) -> dict[str, Tensor]:
        texts = [f"{BEFORE}{prompt}{BEHIND}" for prompt in prompts]
        return read_texts(model.tokenizer, prompts, texts, self.facts.title, before=UNSEEN, max_tokens=max_tokens)

    def encode(self, model: Any, tokens: Mapping[str, Tensor]) -> Conditioning:
        return filled_up(
            [
                model.text_encoder(input_ids=ids[mask][None], use_cache=False).last_hidden_state[0, UNSEEN:]
                for ids, mask in zip(tokens["ids"], tokens["mask"], strict=True)  # one by one: nothing is filled up
            ]
        )

    def predict(self, denoiser: Any, noised: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Computes what the transformer's own forward does, block by block, so that each may have kernels."""
        import torch

        from dreambooth_sm.training.recomputation import recomputed

        run = functools.partial(recomputed, _run) if denoiser.gradient_checkpointing else _run
        rows, _, height, width = noised.shape
        picture = denoiser.img_in(in_patches(noised))
        words = denoiser.txt_in(denoiser.txt_norm(conditioning.text["states"]))
        kept = conditioning.text.get("kept")
        told = denoiser.time_text_embed((times.expand(rows) / TIMES).to(picture.dtype), picture)
        of_picture, of_words = denoiser.pos_embed(
            [(1, height // PATCH, width // PATCH)], max_txt_seq_len=words.shape[1], device=noised.device
        )
        turns = torch.cat([of_words, of_picture]).expand(rows, -1, -1)
        for block in denoiser.transformer_blocks:
            words, picture = run(block, picture, words, kept, told, turns)
        return of_patches(denoiser.proj_out(denoiser.norm_out(picture, told)), noised.shape)

    def guide(self, predicted: Tensor, without: Tensor, guidance: float) -> Tensor:
        """Each patch keeps the length that it has for the prompt alone."""
        asked, empty = in_patches(predicted), in_patches(without)
        guided = empty + guidance * (asked - empty)
        longer = asked.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return of_patches(guided * longer, predicted.shape)


def _run(
    block: Any, picture: Tensor, words: Tensor, kept: Tensor | None, told: Tensor, turns: Tensor
) -> tuple[Tensor, Tensor]:
    """A block as the library computes it; on cards with kernels in fewer passes over its activations."""
    from dreambooth_sm.training.rms_norm import norms_serve

    if block._compiled_call_impl is None and norms_serve(picture, *_frozen(block)):
        return run_in_fewer_passes(block, picture, words, kept, told, turns)
    count = words.shape[1]
    result: tuple[Tensor, Tensor] = block(picture, words, kept, told, (turns[0, count:], turns[0, :count]))
    return result


def _frozen(block: Any) -> Iterator[Tensor]:
    """What the kernels give no gradients to."""
    attention = block.attn
    for layer in (attention.norm_q, attention.norm_k, attention.norm_added_q, attention.norm_added_k):
        yield layer.weight
    for layer in (block.img_mod, block.txt_mod):
        yield from layer.parameters()


def run_in_fewer_passes(
    block: Any, picture: Tensor, words: Tensor, kept: Tensor | None, told: Tensor, turns: Tensor
) -> tuple[Tensor, Tensor]:
    """What a QwenImageTransformerBlock computes, but for rounding: norms, modulations, rotations and gates in one pass
    each.

    Args:
        picture, words: ``(rows, patches, width)`` and ``(rows, words, width)``.
        kept: ``(rows, words)``, those that are looked at; None: all.
        told: the time's embedding, ``(rows, width)``.
        turns: rotary embeddings of words and patches, complex ``(rows, words + patches, pairs)``.

    Returns:
        words and picture.
    """
    import torch

    from dreambooth_sm.training.modulation import modulated_norm

    # A shift, a scale and a gate of attention, and those of the feed-forward net.
    of_picture, of_words = block.img_mod(told).chunk(6, dim=-1), block.txt_mod(told).chunk(6, dim=-1)
    asked, words = modulated_norm(words, of_words[1], of_words[0], block.txt_norm1.eps)
    shown, picture = modulated_norm(picture, of_picture[1], of_picture[0], block.img_norm1.eps)
    if kept is not None:
        kept = torch.nn.functional.pad(kept, (0, picture.shape[1]), value=True)[:, None, None]
    seen_by_words, seen_by_picture = attend_together(block.attn, asked, shown, turns, kept)
    words = changed_by(words, seen_by_words, of_words[2:], block.txt_norm2.eps, block.txt_mlp)
    picture = changed_by(picture, seen_by_picture, of_picture[2:], block.img_norm2.eps, block.img_mlp)
    return words, picture


FAMILY = QwenImage()
