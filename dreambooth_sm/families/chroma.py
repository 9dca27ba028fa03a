"""Chroma (lodestones 2025), a transformer of 9 billion parameters that was made of FLUX.1 schnell: its blocks get their
modulations from one small net, and it is guided by an empty prompt again."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dreambooth_sm.families.conditioning import Conditioning
from dreambooth_sm.families.facts import AdaptedLayers, Drawing, Facts, ModelFootprint
from dreambooth_sm.families.family import Pair
from dreambooth_sm.families.flow import WINDOW, vocabulary_problems
from dreambooth_sm.families.two_streams import (
    OWN_TAKES,
    STREAM_ATTENTION,
    STREAM_LINEAR,
    TIMES,
    TwoStreams,
    in_one_sequence,
    in_patches,
    makers_names,
    of_patches,
    places,
    read_with_t5,
    runner,
    runs_in_fewer_passes,
    scale_problems,
    side_by_side,
    side_problems,
    turns_of,
)

if TYPE_CHECKING:
    from torch import Tensor

# Modulations that the small net makes: of each single block, and of each side of each double block.
_SINGLE, _DOUBLE = 3, 6


class _Files:
    """Pipeline directories as the hub has them."""

    classes = MappingProxyType(
        {
            "transformer": "ChromaTransformer2DModel",
            "vae": "AutoencoderKL",
            "text_encoder": "T5EncoderModel",
            "tokenizer": "T5Tokenizer",
        }
    )

    def config_problems(self, part: str, config: Mapping[str, Any], where: str) -> list[str]:
        if part == "vae":
            return scale_problems(config, where)
        if part == "transformer" and (size := config.get("patch_size", 1)) != 1:
            return [f"{where}: patch_size is {size!r:.60}, and this project trains models with 1"]
        return []

    def fit_problems(self, pipeline: Any) -> list[str]:
        reader = pipeline.text_encoder.config
        problems = side_problems(pipeline.transformer.config, pipeline.vae.config, reader)
        return problems + vocabulary_problems(pipeline.tokenizer, reader)


class Chroma(TwoStreams):
    """A transformer on a picture's patches and a prompt's words, first side by side and then in one sequence.

    Text: ``states`` ``(rows, 512, width)`` of T5; ``seen`` ``(rows, 512)``, the prompt's own and one more.
    """

    facts = Facts(
        name="chroma",
        title="Chroma",
        short="Chroma",
        article="a",
        listed="Chroma",
        resolution=1024,
        footprint=ModelFootprint(
            denoiser=8900.0,
            text_encoder=4762.3,
            vae=83.8,
            text_width=4096,
            denoiser_coded=8897.9,
            text_coded=4630.5,
            largest_coded=47.2,
            trains_text_encoder=False,
        ),
        pipeline="ChromaPipeline",
        drawing=Drawing(
            manner="Euler steps of flow matching",
            steps=35,
            class_steps=28,
            guidance=5.0,
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
                "sample_guidance_scale": 5.0,
                "validation_guidance_scale": 5.0,
            }
        },
        adapted={
            "attention": AdaptedLayers(STREAM_ATTENTION, (), width=1_634_304, text_width=0),
            "linear": AdaptedLayers(STREAM_LINEAR, (), width=4_085_760, text_width=0),
        },
        tensor=b"distilled_guidance_layer.in_proj.weight",
        has_single_file=False,
        adapters="comfyui",
        flat_adapters=True,
        scale_option="joint_attention_kwargs",
        makers_names=tuple(makers_names(modulated=False)),
        files=_Files(),
        tags=("chroma",),
        licences={"lodestones/Chroma1-HD": "apache-2.0", "lodestones/Chroma1-Base": "apache-2.0"},
        names=re.compile(r"chroma(?!tic)", re.IGNORECASE),
        others=re.compile(r"chroma.*radiance", re.IGNORECASE),
        distilled=re.compile(r"chroma.*(flash|turbo)", re.IGNORECASE),
        hint="chroma",
        overflows=True,
        multiple=16,
        longest_prompt=WINDOW,
        matches_flow=True,
        takes=OWN_TAKES,
    )

    def tokenize(
        self, model: Any, prompts: Sequence[str], *, max_tokens: int | None = 75, pad: bool = True
    ) -> dict[str, Tensor]:
        return read_with_t5(model.tokenizer, prompts, self.facts.title, max_tokens=max_tokens)

    def encode(self, model: Any, tokens: Mapping[str, Tensor]) -> Conditioning:
        import torch

        ids, mask = tokens["ids"], tokens["mask"]
        states = [  # one by one: its activations are large
            model.text_encoder(input_ids=row[None], attention_mask=its[None])[0][0]
            for row, its in zip(ids, mask, strict=True)
        ]
        seen = torch.arange(ids.shape[1], device=ids.device) <= mask.sum(1, keepdim=True)
        return Conditioning({"states": torch.stack(states), "seen": seen})

    def extras(self, size: Pair, crop: Pair, target: Pair) -> Mapping[str, Sequence[float]]:
        return {}

    def predict(self, denoiser: Any, noised: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Computes what the transformer's own forward does, which makes a tensor on the host, so that it can't be
        captured, and forgets the mask in single blocks where activations are recomputed."""
        import torch

        text = conditioning.text
        picture, words = denoiser.x_embedder(in_patches(noised)), denoiser.context_embedder(text["states"])
        told = (times.expand(len(noised)) / TIMES).to(picture.dtype) * TIMES
        changes = denoiser.distilled_guidance_layer(_asked(denoiser.time_text_embed, told))
        at = places(noised)
        of_both = torch.cat([at.new_zeros(words.shape[1], 3), at])
        turns: Any
        if runs_in_fewer_passes(denoiser, picture, *denoiser.distilled_guidance_layer.parameters()):
            compute, turns = run_in_fewer_passes, turns_of(denoiser, of_both, len(picture))
        else:
            compute, turns = _run, denoiser.pos_embed(of_both)
        run = functools.partial(runner(denoiser), compute)
        # Blocks add it to the scores: what is not seen counts e times less.
        seen = torch.nn.functional.pad(text["seen"].to(picture.dtype), (0, picture.shape[1]), value=1.0)

        of_singles = _SINGLE * len(denoiser.single_transformer_blocks)
        of_sides = _DOUBLE * len(denoiser.transformer_blocks)
        for number, block in enumerate(denoiser.transformer_blocks):
            first = of_singles + _DOUBLE * number
            its = [changes[:, start : start + _DOUBLE] for start in (first, first + of_sides)]
            words, picture = run(block, torch.cat(its, dim=1), turns, seen, picture, words)
        together = torch.cat([words, picture], dim=1)
        for number, block in enumerate(denoiser.single_transformer_blocks):
            first = _SINGLE * number
            together = run(block, changes[:, first : first + _SINGLE], turns, seen, together)
        made = denoiser.proj_out(denoiser.norm_out(together[:, words.shape[1] :], changes[:, -2:]))
        return of_patches(made, noised.shape)


def _run(block: Any, changes: Tensor, turns: Any, seen: Tensor, hidden: Tensor, words: Tensor | None = None) -> Any:
    sides = {} if words is None else {"encoder_hidden_states": words}
    return block(hidden_states=hidden, **sides, temb=changes, image_rotary_emb=turns, attention_mask=seen)


def run_in_fewer_passes(
    block: Any, changes: Tensor, turns: Tensor, seen: Tensor, hidden: Tensor, words: Tensor | None = None
) -> Any:
    """What a block of a ChromaTransformer2DModel computes, but for rounding: norms, modulations and rotations in one
    pass each.

    Args:
        changes: its modulations, ``(rows, 12 or 3, width)``.
        turns: of words, then those of the picture, complex ``(rows, words, pairs)``.
        seen: ``(rows, words)`` of both, of which each pair's product is added to its score.
        hidden: the picture, or both in one, ``(rows, words, width)``.
        words: None where both are in one.
    """
    mask = seen[:, None, None, :] * seen[:, None, :, None]
    if words is None:
        return in_one_sequence(block, hidden, changes.unbind(1), turns, mask)
    of_all = changes.unbind(1)
    return side_by_side(block, words, hidden, of_all[_DOUBLE:], of_all[:_DOUBLE], turns, mask)


def _asked(embedding: Any, told: Tensor) -> Tensor:
    """What the small net is asked: the time, no guidance, and the number of each modulation."""
    import torch

    time, guidance = embedding.time_proj(told), embedding.guidance_proj(torch.zeros_like(told))
    numbers = embedding.mod_proj.to(told).expand(len(told), -1, -1)
    of_all = torch.cat([time, guidance], dim=1).to(told.dtype)
    return torch.cat([of_all.unsqueeze(1).expand(-1, numbers.shape[1], -1), numbers], dim=-1)


FAMILY = Chroma()
