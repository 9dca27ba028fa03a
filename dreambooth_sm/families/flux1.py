"""FLUX.1 (Black Forest Labs 2024), a transformer of 12 billion parameters: dev, which draws with a guidance that it is
told, and schnell, which was distilled into a few steps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dreambooth_sm.families.conditioning import Conditioning
from dreambooth_sm.families.facts import AdaptedLayers, Drawing, Facts, ModelFootprint
from dreambooth_sm.families.family import Pair
from dreambooth_sm.families.flow import WINDOW
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

# The guidance that the denoiser is told in training: that of a model that was not distilled to be told any.
_GUIDANCE, _TOLD = "guidance", 1.0


class _Files:
    """Pipeline directories as the hub has them."""

    classes = MappingProxyType(
        {
            "transformer": "FluxTransformer2DModel",
            "vae": "AutoencoderKL",
            "text_encoder": "CLIPTextModel",
            "text_encoder_2": "T5EncoderModel",
            "tokenizer": "CLIPTokenizer",
            "tokenizer_2": "T5Tokenizer",
        }
    )

    def config_problems(self, part: str, config: Mapping[str, Any], where: str) -> list[str]:
        if part == "vae":
            return scale_problems(config, where)
        if part == "transformer" and (size := config.get("patch_size", 1)) != 1:
            return [f"{where}: patch_size is {size!r:.60}, and this project trains models with 1"]
        return []

    def fit_problems(self, pipeline: Any) -> list[str]:
        transformer, clip, reader = (
            getattr(pipeline, part).config for part in ("transformer", "text_encoder", "text_encoder_2")
        )
        problems = side_problems(transformer, pipeline.vae.config, reader)
        if clip.hidden_size != transformer.pooled_projection_dim:
            problems.append(
                f"CLIP's states are {clip.hidden_size} wide, and the transformer takes "
                f"{transformer.pooled_projection_dim}"
            )
        return problems + [
            f"{name} has {len(tokenizer)} tokens and its text encoder {config.vocab_size}"
            for name, tokenizer, config in (
                ("tokenizer", pipeline.tokenizer, clip),
                ("tokenizer_2", pipeline.tokenizer_2, reader),
            )
            if len(tokenizer) > config.vocab_size
        ]


class Flux1(TwoStreams):
    """A transformer on a picture's patches and a prompt's words, first side by side and then in one sequence.

    Text: ``states`` ``(rows, 512, width)`` of T5, those of what prompts are filled up with as well: the transformer
    looks at all of them; ``pooled`` ``(rows, width)`` of CLIP. Extras: ``guidance``, which schnell is not told.
    """

    facts = Facts(
        name="flux1",
        title="FLUX.1",
        short="FLUX.1",
        article="a",
        listed="FLUX.1",
        resolution=1024,
        footprint=ModelFootprint(
            denoiser=11901.4,
            text_encoder=4885.4,
            vae=83.8,
            text_width=4096,
            denoiser_coded=11898.3,
            text_coded=4630.5,
            largest_coded=56.6,
            trains_text_encoder=False,
        ),
        pipeline="FluxPipeline",
        drawing=Drawing(
            manner="Euler steps of flow matching",
            steps=28,
            class_steps=28,
            guidance=3.5,
            guided=(float("inf"), 0.0),
            batch=2,
            told=_GUIDANCE,
        ),
        parts=("transformer", "vae", "text_encoder", "text_encoder_2"),
        methods={
            "lora": {
                "learning_rate": 1e-4,
                "lora_targets": "attention",  # more was compared on another family alone
                "export": "adapter",
                "export_precision": "bf16",
                "sample_guidance_scale": 3.5,
                "validation_guidance_scale": 3.5,
            }
        },
        adapted={
            "attention": AdaptedLayers(STREAM_ATTENTION, (), width=1_634_304, text_width=0),
            "linear": AdaptedLayers(STREAM_LINEAR, (), width=4_085_760, text_width=0),
        },
        tensor=b"vector_in.in_layer.weight",
        has_single_file=False,
        adapters="comfyui",
        flat_adapters=True,
        scale_option="joint_attention_kwargs",
        makers_names=tuple(makers_names(modulated=True)),
        files=_Files(),
        tags=("flux",),
        licences={"black-forest-labs/FLUX.1-dev": "other", "black-forest-labs/FLUX.1-schnell": "apache-2.0"},
        gates={"flux-1-dev-non-commercial": re.compile(r"flux.*(dev|krea|kontext)", re.IGNORECASE)},
        names=re.compile(r"flux[-_. ]?(1(?!\d)|dev|schnell)", re.IGNORECASE),
        others=re.compile(r"[-_](kontext|fill|canny|depth|redux)", re.IGNORECASE),
        distilled=re.compile(r"schnell", re.IGNORECASE),
        hint="flux1",
        plain_text=("text_encoder",),
        overflows=True,
        multiple=16,
        longest_prompt=WINDOW,
        matches_flow=True,
        takes=OWN_TAKES,
    )

    def tokenize(
        self, model: Any, prompts: Sequence[str], *, max_tokens: int | None = 75, pad: bool = True
    ) -> dict[str, Tensor]:
        """CLIP reads as much of a prompt as it can, whatever T5 reads of it."""
        read = read_with_t5(model.tokenizer_2, prompts, self.facts.title, max_tokens=max_tokens)
        clip = model.tokenizer(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt", verbose=False
        ).input_ids
        return {"ids": clip, "ids_2": read["ids"]}

    def encode(self, model: Any, tokens: Mapping[str, Tensor]) -> Conditioning:
        import torch

        # T5 one by one: its activations are large.
        states = [model.text_encoder_2(input_ids=ids[None])[0][0] for ids in tokens["ids_2"]]
        pooled = model.text_encoder(input_ids=tokens["ids"]).pooler_output
        return Conditioning({"states": torch.stack(states), "pooled": pooled})

    def extras(self, size: Pair, crop: Pair, target: Pair) -> Mapping[str, Sequence[float]]:
        return {_GUIDANCE: [_TOLD]}

    def predict(self, denoiser: Any, noised: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        states = conditioning.text["states"]
        guided = conditioning.extras[_GUIDANCE].flatten() if denoiser.config.guidance_embeds else None
        made = _run(
            denoiser,
            hidden_states=in_patches(noised),
            encoder_hidden_states=states,
            pooled_projections=conditioning.text["pooled"],
            timestep=times.expand(len(noised)) / TIMES,
            guidance=guided,
            img_ids=places(noised),
            txt_ids=states.new_zeros(states.shape[1], 3),
        )
        return of_patches(made, noised.shape)


def _run(denoiser: Any, **inputs: Any) -> Tensor:
    """The transformer as the library computes it; on cards with kernels in fewer passes over its activations."""
    if runs_in_fewer_passes(denoiser, inputs["hidden_states"], *_modulations(denoiser)):
        return run_in_fewer_passes(denoiser, **inputs)
    result: Tensor = denoiser(**inputs, return_dict=False)[0]
    return result


def _modulations(denoiser: Any) -> Iterator[Tensor]:
    for block in denoiser.transformer_blocks:
        yield from (*block.norm1.parameters(), *block.norm1_context.parameters())
    for block in denoiser.single_transformer_blocks:
        yield from block.norm.parameters()


def run_in_fewer_passes(
    denoiser: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    guidance: Tensor | None,
    img_ids: Tensor,
    txt_ids: Tensor,
) -> Tensor:
    """What a FluxTransformer2DModel computes, but for rounding: norms, modulations and rotations in one pass each.
    Takes what its forward does."""
    import torch

    run = runner(denoiser)
    numbers = [each.to(hidden_states.dtype) * TIMES for each in (timestep, guidance) if each is not None]
    told = denoiser.time_text_embed(*numbers, pooled_projections)
    turns = turns_of(denoiser, torch.cat([txt_ids, img_ids]), len(hidden_states))
    picture, words = denoiser.x_embedder(hidden_states), denoiser.context_embedder(encoder_hidden_states)
    lit = torch.nn.functional.silu(told)
    for block in denoiser.transformer_blocks:
        words, picture = run(_side_by_side, block, words, picture, lit, turns)
    both = torch.cat([words, picture], dim=1)
    for block in denoiser.single_transformer_blocks:
        both = run(_in_one_sequence, block, both, lit, turns)
    result: Tensor = denoiser.proj_out(denoiser.norm_out(both[:, words.shape[1] :], told))
    return result


def _side_by_side(block: Any, words: Tensor, picture: Tensor, told: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    of_words, of_picture = (norm.linear(told).chunk(6, dim=-1) for norm in (block.norm1_context, block.norm1))
    return side_by_side(block, words, picture, of_words, of_picture, turns)


def _in_one_sequence(block: Any, x: Tensor, told: Tensor, turns: Tensor) -> Tensor:
    return in_one_sequence(block, x, block.norm.linear(told).chunk(3, dim=-1), turns)


FAMILY = Flux1()
