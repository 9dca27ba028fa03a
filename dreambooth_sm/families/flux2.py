"""FLUX.2 klein (Black Forest Labs 2026), base models of 4 and 9 billion parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dreambooth_sm.families.conditioning import Conditioning
from dreambooth_sm.families.facts import AdaptedLayers, Drawing, Facts, MakersName, ModelFootprint, Relative, Size
from dreambooth_sm.families.family import LossKnobs, Pair
from dreambooth_sm.families.file_rules import is_number
from dreambooth_sm.families.flow import TAKES, WINDOW, chosen_shift, read_prompts, reader_problems
from dreambooth_sm.families.two_streams import (
    PATCH,
    TIMES,
    attend_together,
    changed_by,
    in_patches,
    of_patches,
    runner,
    runs_in_fewer_passes,
    turns_of,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dreambooth_sm.objectives import Objective

# The layers of the language model whose states are read, side by side.
_READ = (9, 18, 27)
# Numbers of blocks that no model comes near.
_BLOCKS = range(64)
_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj"),
    *(f"single_transformer_blocks.{number}.attn.to_out" for number in _BLOCKS),
)
_LINEAR = (
    *_ATTENTION,
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
)
_SIDES = (
    ("img", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff"),
    ("txt", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "ff_context"),
)


def _makers_names() -> Iterator[MakersName]:
    for side, *thirds, out, net in _SIDES:
        for number, layer in enumerate(thirds):
            yield MakersName(f"transformer_blocks.{{}}.{layer}", f"double_blocks.{{}}.{side}_attn.qkv", (number, 1, 3))
        yield MakersName(f"transformer_blocks.{{}}.{out}", f"double_blocks.{{}}.{side}_attn.proj")
        yield MakersName(f"transformer_blocks.{{}}.{net}.linear_in", f"double_blocks.{{}}.{side}_mlp.0")
        yield MakersName(f"transformer_blocks.{{}}.{net}.linear_out", f"double_blocks.{{}}.{side}_mlp.2")
    yield MakersName("single_transformer_blocks.{}.attn.to_qkv_mlp_proj", "single_blocks.{}.linear1")
    yield MakersName("single_transformer_blocks.{}.attn.to_out", "single_blocks.{}.linear2")


# What the pipeline draws in where nobody says otherwise; the shift of times depends on it.
_STEPS = 50


class _Files:
    """Pipeline directories as the hub has them."""

    classes = MappingProxyType(
        {
            "transformer": "Flux2Transformer2DModel",
            "vae": "AutoencoderKLFlux2",
            "text_encoder": "Qwen3Model",
            "tokenizer": "Qwen2Tokenizer",
        }
    )

    def config_problems(self, part: str, config: Mapping[str, Any], where: str) -> list[str]:
        if part == "vae":
            wanted: dict[str, object] = {"patch_size": [PATCH, PATCH]}
            if not is_number(epsilon := config.get("batch_norm_eps", 1e-4)) or epsilon <= 0:
                return [f"{where}: batch_norm_eps is {epsilon!r:.60} and should be a number such as 0.0001"]
        elif part == "transformer":
            wanted = {"patch_size": 1, "guidance_embeds": False}
        else:
            return []
        return [
            f"{where}: {key} is {value!r:.60}, and this project trains models with {usual}"
            for key, usual in wanted.items()
            if (list(value) if isinstance(value := config.get(key, usual), tuple) else value) != usual
        ]

    def fit_problems(self, pipeline: Any) -> list[str]:
        transformer, vae, text = pipeline.transformer.config, pipeline.vae.config, pipeline.text_encoder.config
        problems = reader_problems(pipeline.tokenizer, text)
        if PATCH**2 * vae.latent_channels != transformer.in_channels:
            problems.append(
                f"the VAE makes latents of {vae.latent_channels} channels, and the transformer takes "
                f"{transformer.in_channels}, which is not {PATCH**2} times as many"
            )
        if len(_READ) * text.hidden_size != transformer.joint_attention_dim:
            problems.append(
                f"the text encoder's states are {text.hidden_size} wide, and the transformer takes "
                f"{transformer.joint_attention_dim}, which is not {len(_READ)} times as many"
            )
        if text.num_hidden_layers < _READ[-1]:
            problems.append(f"the text encoder has {text.num_hidden_layers} layers, and its {_READ[-1]}th is read")
        return problems


class Flux2:
    """A transformer on a picture's patches and a prompt's words, first side by side and then in one sequence.

    Text: ``states`` ``(rows, 512, 3 * width)`` of three layers of a language model, those of what prompts are filled up
    with as well: the transformer looks at all of them.
    """

    facts = Facts(
        name="flux2",
        title="FLUX.2 klein",
        short="FLUX.2",
        article="a",
        listed="FLUX.2 klein",
        resolution=1024,
        footprint=ModelFootprint(
            denoiser=3875.5,
            text_encoder=4022.5,
            vae=84.0,
            text_width=7680,
            text_unread=908.4,
            denoiser_coded=3875.5,
            text_coded=2725.0,
            largest_coded=84.9,
            trains_text_encoder=False,
        ),
        pipeline="Flux2KleinPipeline",
        drawing=Drawing(
            manner="Euler steps of flow matching",
            steps=_STEPS,
            class_steps=28,
            guidance=4.0,
            guided=(float("inf"), 0.0),
            batch=2,
        ),
        parts=("transformer", "vae", "text_encoder"),
        config={"num_attention_heads": 24},
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
            "attention": AdaptedLayers(_ATTENTION, (), width=1_044_480, text_width=0),
            "linear": AdaptedLayers(_LINEAR, (), width=1_505_280, text_width=0),
        },
        tensor=b"single_stream_modulation.lin.weight",
        has_single_file=False,
        adapters="comfyui",
        scale_option="attention_kwargs",
        makers_names=tuple(_makers_names()),
        files=_Files(),
        sizes=(
            Size(
                names=re.compile(r"9b", re.IGNORECASE),
                config={"num_attention_heads": 32},
                tensor=b"double_blocks.7.",
                footprint=ModelFootprint(
                    denoiser=9078.6,
                    text_encoder=7568.4,
                    vae=84.0,
                    text_width=12_288,
                    text_unread=1736.5,
                    denoiser_coded=9078.6,
                    text_coded=5209.4,
                    largest_coded=151.0,
                    trains_text_encoder=False,
                ),
                widths={"attention": 1_736_704, "linear": 2_719_744},
                # 32 blocks to 25, of 4,096 to 3,072; a block's own; parameters.
                relative=Relative(kept=1.71, recomputed=1.45, cost=2.35),
            ),
        ),
        tags=("flux2",),
        licences={
            "black-forest-labs/FLUX.2-klein-base-4B": "apache-2.0",
            "black-forest-labs/FLUX.2-klein-4B": "apache-2.0",
            "black-forest-labs/FLUX.2-klein-base-9B": "other",
            "black-forest-labs/FLUX.2-klein-9B": "other",
        },
        gates={"flux-non-commercial": re.compile(r"klein.*9b", re.IGNORECASE)},
        names=re.compile(r"flux[-_. ]?2[-_ ]?klein", re.IGNORECASE),
        distilled=re.compile(r"klein(?!.*base)", re.IGNORECASE),
        hint="flux2-klein",
        overflows=True,
        multiple=16,
        longest_prompt=WINDOW,
        text_layers=_READ[-1],
        matches_flow=True,
        draws_latents=False,
        takes={**TAKES, "mixed_precision": (("auto", "bf16", "no"), "it was not tried in fp16")},
    )

    def tokenize(
        self, model: Any, prompts: Sequence[str], *, max_tokens: int | None = 75, pad: bool = True
    ) -> dict[str, Tensor]:
        return read_prompts(model.tokenizer, prompts, self.facts.title, thinking=False, max_tokens=max_tokens)

    def encode(self, model: Any, tokens: Mapping[str, Tensor]) -> Conditioning:
        import torch

        rows = []
        for ids, mask in zip(tokens["ids"], tokens["mask"], strict=True):  # one by one: all layers' states are kept
            read = model.text_encoder(input_ids=ids[None], attention_mask=mask[None], output_hidden_states=True)
            rows.append(torch.cat([read.hidden_states[number][0] for number in _READ], dim=-1))
        return Conditioning({"states": torch.stack(rows)})

    def extras(self, size: Pair, crop: Pair, target: Pair) -> Mapping[str, Sequence[float]]:
        return {}

    def predict(self, denoiser: Any, noised: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        import torch

        states = conditioning.text["states"]
        sides = (torch.arange(side // PATCH, device=noised.device) for side in noised.shape[-2:])
        words = torch.arange(states.shape[1], device=noised.device)[:, None]
        made = _run(
            denoiser,
            hidden_states=in_patches(noised),
            encoder_hidden_states=states,
            timestep=times.expand(len(noised)) / TIMES,
            img_ids=torch.nn.functional.pad(torch.cartesian_prod(*sides), (1, 1)),
            txt_ids=torch.nn.functional.pad(words, (3, 0)),
        )
        return of_patches(made, noised.shape)

    def sampler(self, model: Any, steps: int, size: Pair, device: torch.device) -> Any:
        import numpy as np

        scheduler = type(model.scheduler).from_config(model.scheduler.config)
        pixels = PATCH * 2 ** (len(model.vae.config.block_out_channels) - 1)
        shift = _shift(size[0] // pixels * (size[1] // pixels), steps)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift, device=device)
        scheduler.set_begin_index(0)
        return scheduler

    def guide(self, predicted: Tensor, without: Tensor, guidance: float) -> Tensor:
        return without + guidance * (predicted - without)

    def objective(self, model: Any, h: LossKnobs) -> Objective:
        """With the shift that pictures are drawn with, where no other is asked for."""
        import math

        from dreambooth_sm.objectives import FlowMatching

        pixels = PATCH * 2 ** (len(model.vae.config.block_out_channels) - 1)
        by_size = math.exp(_shift((h.resolution // pixels) ** 2, _STEPS))
        return FlowMatching.of(chosen_shift(h, model.scheduler.config, by_size), h.time_sampling, TIMES)

    def scale(self, vae: Any) -> tuple[Tensor, Tensor]:
        """Mean and deviation of latents, ``(channels, 2, 2)``: a value for each place in a patch."""
        norm = vae.bn
        deviation = (norm.running_var.float() + vae.config.batch_norm_eps).sqrt()
        mean, deviation = (each.detach().float().view(-1, PATCH, PATCH) for each in (norm.running_mean, deviation))
        return mean, deviation

    def normalise(self, scale: tuple[Tensor, Tensor], latents: Tensor) -> Tensor:
        mean, deviation = (_everywhere(each, latents) for each in scale)
        return (latents - mean) / deviation

    def denormalise(self, scale: tuple[Tensor, Tensor], latents: Tensor) -> Tensor:
        mean, deviation = (_everywhere(each, latents) for each in scale)
        return latents * deviation + mean

    def vae_dtype(self, vae: Any) -> torch.dtype:
        import torch

        return torch.bfloat16


def _run(denoiser: Any, **inputs: Tensor) -> Tensor:
    """The transformer as the library computes it; on cards with kernels in fewer passes over its activations."""
    if runs_in_fewer_passes(denoiser, inputs["hidden_states"], *_modulations(denoiser)):
        return run_in_fewer_passes(denoiser, **inputs)
    result: Tensor = denoiser(**inputs, return_dict=False)[0]
    return result


def _modulations(denoiser: Any) -> Iterator[Tensor]:
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        yield from getattr(denoiser, name).parameters()


def run_in_fewer_passes(
    denoiser: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
) -> Tensor:
    """What a Flux2Transformer2DModel computes, but for rounding: norms, modulations, rotations and gates in one pass
    each. Takes what its forward does."""
    import torch

    run = runner(denoiser)
    told = denoiser.time_guidance_embed(timestep.to(hidden_states.dtype) * TIMES, None)
    of_picture = denoiser.double_stream_modulation_img(told).chunk(6, dim=-1)
    of_words = denoiser.double_stream_modulation_txt(told).chunk(6, dim=-1)
    of_both = denoiser.single_stream_modulation(told).chunk(3, dim=-1)
    turns = turns_of(denoiser, torch.cat([txt_ids, img_ids]), len(hidden_states))

    picture, words = denoiser.x_embedder(hidden_states), denoiser.context_embedder(encoder_hidden_states)
    for block in denoiser.transformer_blocks:
        words, picture = run(_side_by_side, block, words, picture, of_words, of_picture, turns)
    both = torch.cat([words, picture], dim=1)
    for block in denoiser.single_transformer_blocks:
        both = run(_in_one_sequence, block, both, of_both, turns)
    result: Tensor = denoiser.proj_out(denoiser.norm_out(both[:, words.shape[1] :], told))
    return result


def _side_by_side(
    block: Any,
    words: Tensor,
    picture: Tensor,
    of_words: Sequence[Tensor],
    of_picture: Sequence[Tensor],
    turns: Tensor,
) -> tuple[Tensor, Tensor]:
    """What a Flux2TransformerBlock computes. Modulations are a shift, a scale and a gate of attention and those of the
    feed-forward net, each ``(rows, width)``."""
    from dreambooth_sm.training.modulation import modulated_norm
    from dreambooth_sm.training.rms_norm import swiglu_of_halves

    def net(layers: Any) -> Callable[[Tensor], Tensor]:
        return lambda asked: layers.linear_out(swiglu_of_halves(layers.linear_in(asked)))

    asked, words = modulated_norm(words, of_words[1], of_words[0], block.norm1_context.eps)
    shown, picture = modulated_norm(picture, of_picture[1], of_picture[0], block.norm1.eps)
    seen_by_words, seen_by_picture = attend_together(block.attn, asked, shown, turns)
    words = changed_by(words, seen_by_words, of_words[2:], block.norm2_context.eps, net(block.ff_context))
    picture = changed_by(picture, seen_by_picture, of_picture[2:], block.norm2.eps, net(block.ff))
    return words, picture


def _in_one_sequence(block: Any, x: Tensor, changes: Sequence[Tensor], turns: Tensor) -> Tensor:
    """What a Flux2SingleTransformerBlock computes. Modulations are a shift, a scale and a gate, each
    ``(rows, width)``."""
    from dreambooth_sm.training.modulation import gated_sum, modulated_norm
    from dreambooth_sm.training.parallel_block import attention_and_swiglu

    attention = block.attn
    shift, scale, gate = changes
    asked, x = modulated_norm(x, scale, shift, block.norm.eps)
    made = attention_and_swiglu(
        attention.to_qkv_mlp_proj(asked),
        attention.norm_q.weight,
        attention.norm_k.weight,
        attention.norm_q.eps,
        turns,
        attention.heads,
    )
    return gated_sum(x, gate, attention.to_out(made))


def _everywhere(values: Tensor, latents: Tensor) -> Tensor:
    """Values of a patch at every patch of latents, in their type."""
    return values.to(latents).repeat(1, latents.shape[-2] // PATCH, latents.shape[-1] // PATCH)


def _shift(words: int, steps: int) -> float:
    """The logarithm of the shift of a picture of so many patches that is drawn in so many steps, which the model's
    makers measured: a line by patches at 10 steps and one at 200, and lines by steps between them."""
    at_200 = 0.00016927 * words + 0.45666666
    if words > 4300:
        return at_200
    at_10 = 8.73809524e-05 * words + 1.89833333
    return at_200 + (at_10 - at_200) * (200 - steps) / 190


FAMILY = Flux2()
