"""Krea 2 (Krea 2026): a transformer on words and patches in one sequence, which is shown twelve layers' states of a
language model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dreambooth_sm.families.conditioning import Conditioning
from dreambooth_sm.families.facts import AdaptedLayers, Drawing, Facts, MakersName, ModelFootprint
from dreambooth_sm.families.family import Pair
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
from dreambooth_sm.families.two_streams import (
    PATCH,
    TIMES,
    heads_of,
    in_patches,
    of_patches,
    places,
    runner,
    runs_in_fewer_passes,
)

if TYPE_CHECKING:
    from torch import Tensor

# What a pipeline's index says of it, and the layers of the language model whose states are read where it does not.
_LAYERS, _TWELVE = "text_encoder_select_layers", (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
_PATCH, _DISTILLED = "patch_size", "is_distilled"
# The logarithm of the shift of times of models that draw in a few steps, of pictures of any size.
_SHIFT_OF_DISTILLED = 1.15
# Tokens of the sentences' end, which are counted within the window.
_BEHIND = 5
_NAMES = re.compile(r"(?<![a-z])krea[-_. ]?2(?!\d)", re.IGNORECASE)
# Layers of attention and of feed-forward nets, by the names of diffusers and of the makers.
_OF_ATTENTION = {"to_q": "wq", "to_k": "wk", "to_v": "wv", "to_out.0": "wo", "to_gate": "gate"}
_OF_NETS = ("gate", "up", "down")
_ATTENTION = tuple(f"attn.{layer}" for layer in _OF_ATTENTION)
_LINEAR = (*_ATTENTION, *(f"ff.{layer}" for layer in _OF_NETS))
_BLOCKS = {
    "transformer_blocks.{}": "blocks.{}",
    "text_fusion.layerwise_blocks.{}": "txtfusion.layerwise_blocks.{}",
    "text_fusion.refiner_blocks.{}": "txtfusion.refiner_blocks.{}",
}
_OUTSIDE_OF_BLOCKS = {
    "img_in": "first",
    "final_layer.linear": "last.linear",
    "time_embed.linear_1": "tmlp.0",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
    "text_fusion.projector": "txtfusion.projector",
}


def _makers_names() -> Iterator[MakersName]:
    for ours, theirs in _BLOCKS.items():
        for layer, name in _OF_ATTENTION.items():
            yield MakersName(f"{ours}.attn.{layer}", f"{theirs}.attn.{name}")
        for layer in _OF_NETS:
            yield MakersName(f"{ours}.ff.{layer}", f"{theirs}.mlp.{layer}")
    for ours, theirs in _OUTSIDE_OF_BLOCKS.items():
        yield MakersName(ours, theirs)


class _Files:
    """Pipeline directories as the hub has them; of the text encoder, the part that sees pictures is left there."""

    classes = MappingProxyType(
        {
            "transformer": "Krea2Transformer2DModel",
            "vae": "AutoencoderKLQwenImage",
            "text_encoder": "Qwen3VLTextModel",
            "tokenizer": "Qwen2Tokenizer",
        }
    )

    def config_problems(self, part: str, config: Mapping[str, Any], where: str) -> list[str]:
        return statistics_problems(config, where) if part == "vae" else []

    def fit_problems(self, pipeline: Any) -> list[str]:
        transformer, vae, text = pipeline.transformer.config, pipeline.vae.config, pipeline.text_encoder.config
        problems = [*vocabulary_problems(pipeline.tokenizer, text), *channel_problems(transformer, vae)]
        if (size := pipeline.config[_PATCH]) != PATCH:
            problems.append(f"{_PATCH} is {size!r:.60}, and this project trains models with {PATCH}")
        if text.hidden_size != transformer.text_hidden_dim:
            problems.append(
                f"the text encoder's states are {text.hidden_size} wide, and the transformer takes "
                f"{transformer.text_hidden_dim}"
            )
        layers = _layers(pipeline)
        if len(layers) != transformer.num_text_layers:
            problems.append(
                f"{_LAYERS} names {len(layers)} layers, and the transformer takes states of "
                f"{transformer.num_text_layers}"
            )
        if strange := [layer for layer in layers if layer not in range(text.num_hidden_layers + 1)]:
            problems.append(
                f"{_LAYERS} names {strange[0]!r:.60}, and the text encoder has {text.num_hidden_layers} layers"
            )
        return problems


def _layers(model: Any) -> Sequence[int]:
    layers: Sequence[int] = model.config.get(_LAYERS) or _TWELVE
    return layers


class Krea2(QwenParts):
    """A transformer on one sequence of a prompt's words and a picture's patches.

    Text: ``states`` ``(rows, words, layers, width)`` of a language model, without those of the template that comes
    first, and zeros where other rows have more; ``kept`` ``(rows, words)``, those that are looked at, where rows have
    more than others. What fills prompts up in diffusers takes no position and is not looked at: here it is left out.
    """

    facts = Facts(
        name="krea2",
        title="Krea 2",
        short="Krea 2",
        article="a",
        listed="Krea 2",
        resolution=1024,
        footprint=ModelFootprint(
            denoiser=12_820.0,
            text_encoder=4022.5,
            vae=126.9,
            text_width=30_720,
            denoiser_coded=12_819.0,
            text_coded=3633.3,
            largest_coded=226.5,
            trains_text_encoder=False,
        ),
        pipeline="Krea2Pipeline",
        drawing=Drawing(
            manner="Euler steps of flow matching",
            steps=28,
            class_steps=28,
            guidance=5.5,
            guided=(float("inf"), 0.0),
            batch=2,
        ),
        parts=("transformer", "vae", "text_encoder"),
        methods={
            "lora": {
                "learning_rate": 1e-4,
                "lora_targets": "attention",  # as its makers advise for long runs; more was not compared
                "export": "adapter",
                "export_precision": "bf16",
                "sample_guidance_scale": 5.5,
                "validation_guidance_scale": 5.5,
            }
        },
        adapted={
            "attention": AdaptedLayers(_ATTENTION, (), width=1_564_672, text_width=0),
            "linear": AdaptedLayers(_LINEAR, (), width=3_570_688, text_width=0),
        },
        tensor=b"txtfusion.projector.weight",
        has_single_file=False,
        adapters="comfyui",
        scale_option="attention_kwargs",
        makers_names=tuple(_makers_names()),
        files=_Files(),
        tags=("krea2", "krea2-diffusers"),
        licences={"krea/Krea-2-Raw": "other"},
        gates={"krea-2-community-license": _NAMES},
        names=_NAMES,
        distilled=re.compile(r"turbo", re.IGNORECASE),
        hint="krea-2",
        overflows=True,
        multiple=16,
        longest_prompt=WINDOW,
        matches_flow=True,
        takes={**TAKES, "mixed_precision": (("auto", "bf16", "no"), "it was not tried in fp16")},
    )

    def tokenize(
        self, model: Any, prompts: Sequence[str], *, max_tokens: int | None = 75, pad: bool = True
    ) -> dict[str, Tensor]:
        """The sentences' end stands behind what is cut off, or fills prompts up."""
        import torch

        texts = [BEFORE + prompt for prompt in prompts]
        read = read_texts(
            model.tokenizer,
            prompts,
            texts,
            self.facts.title,
            before=UNSEEN,
            window=WINDOW - _BEHIND,
            max_tokens=max_tokens,
        )
        behind = model.tokenizer(BEHIND, return_tensors="pt").input_ids.expand(len(prompts), -1)
        return {
            "ids": torch.cat([read["ids"], behind], dim=1),
            "mask": torch.cat([read["mask"], torch.ones_like(behind, dtype=torch.bool)], dim=1),
        }

    def encode(self, model: Any, tokens: Mapping[str, Tensor]) -> Conditioning:
        import torch

        layers, words = _layers(model), []
        for ids, mask in zip(tokens["ids"], tokens["mask"], strict=True):  # one by one: all layers' states are kept
            read = model.text_encoder(input_ids=ids[mask][None], use_cache=False, output_hidden_states=True)
            words.append(torch.stack([read.hidden_states[layer][0, UNSEEN:] for layer in layers], dim=1))
        return filled_up(words)

    def predict(self, denoiser: Any, noised: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Computes what the transformer's own forward does, block by block, so that each may have kernels."""
        import torch

        run, rows, compute = runner(denoiser), len(noised), _as_it_is
        states, kept = conditioning.text["states"], conditioning.text.get("kept")
        patches = denoiser.img_in(in_patches(noised))
        told = denoiser.time_embed(times.expand(rows) / TIMES, dtype=patches.dtype)
        changes = denoiser.time_mod_proj(torch.nn.functional.gelu(told, approximate="tanh"))
        words = denoiser.txt_in(run(denoiser.text_fusion, states, None if kept is None else kept[:, None, None]))
        if kept is not None:
            kept = torch.nn.functional.pad(kept, (0, patches.shape[1]), value=True)[:, None, None]
        count = words.shape[1]
        cosine, sine = denoiser.rotary_emb(torch.nn.functional.pad(places(noised), (0, 0, count, 0)))
        turns: Any = cosine, sine
        if runs_in_fewer_passes(denoiser, noised, *_frozen(denoiser)):
            compute = run_in_fewer_passes
            turns = torch.complex(cosine[:, ::2], sine[:, ::2]).expand(rows, -1, -1)  # each stands twice
        together = torch.cat([words, patches], dim=1)
        for block in denoiser.transformer_blocks:
            together = run(compute, block, together, changes, turns, kept)
        return of_patches(denoiser.final_layer(together[:, count:], told), noised.shape)

    def guide(self, predicted: Tensor, without: Tensor, guidance: float) -> Tensor:
        """The pipeline's ``guidance_scale`` is what is added to the prompt's own: one less."""
        return predicted + (guidance - 1) * (predicted - without)

    def shift(self, model: Any, size: Pair) -> float:
        return _SHIFT_OF_DISTILLED if model.config.get(_DISTILLED) else super().shift(model, size)


def _as_it_is(block: Any, *given: Any) -> Tensor:
    """As the library computes a block."""
    result: Tensor = block(*given)
    return result


def _frozen(denoiser: Any) -> Iterator[Tensor]:
    """What kernels give no gradients to, beside the norms of heads."""
    for layer in (denoiser.time_embed, denoiser.time_mod_proj):
        yield from layer.parameters()
    for block in denoiser.transformer_blocks:
        yield from (block.scale_shift_table, block.norm1.weight, block.norm2.weight)


def run_in_fewer_passes(block: Any, x: Tensor, changes: Tensor, turns: Tensor, mask: Tensor | None) -> Tensor:
    """What a Krea2TransformerBlock computes, but for rounding: norms, rotations and gates in one pass each.

    Args:
        x: words and patches, ``(rows, words, width)``.
        changes: of the time, ``(rows, 1, 6 * width)``: a scale, a shift and a gate of attention, and those of the
            feed-forward net.
        turns: rotary embeddings, complex ``(rows, words, pairs)``.
        mask: as `dreambooth_sm.training.parallel_block.attend` takes it.
    """
    from dreambooth_sm.training.modulation import gated_sum
    from dreambooth_sm.training.rms_norm import scaled_norm, swiglu

    scale, shift, gate, scale_of_net, shift_of_net, gate_of_net = (
        changes.reshape(len(x), 6, -1) + block.scale_shift_table
    ).unbind(1)

    def changed(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return scaled_norm(x, norm.weight + 1, norm.eps, 1 + scale) + shift[:, None]

    x = gated_sum(x, gate, _seen(block.attn, changed(block.norm1, x, scale, shift), turns, mask))
    asked, net = changed(block.norm2, x, scale_of_net, shift_of_net), block.ff
    return gated_sum(x, gate_of_net, net.down(swiglu(net.gate(asked), net.up(asked))))


def _seen(attention: Any, asked: Tensor, turns: Tensor, mask: Tensor | None) -> Tensor:
    from dreambooth_sm.training.parallel_block import attend
    from dreambooth_sm.training.rms_norm import turned_norm

    width = attention.head_dim
    query, key = (
        turned_norm(heads_of(project, asked, width), norm.weight + 1, norm.eps, turns)
        for project, norm in ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k))
    )
    # Several heads look at the same keys and values; not all kernels of attention take fewer of these.
    groups = attention.num_heads // attention.num_kv_heads
    keys, values = (each.repeat_interleave(groups, dim=2) for each in (key, heads_of(attention.to_v, asked, width)))
    seen = attend(query, keys, values, mask).flatten(2)
    result: Tensor = attention.to_out[0](seen * attention.to_gate(asked).sigmoid())
    return result


FAMILY = Krea2()
