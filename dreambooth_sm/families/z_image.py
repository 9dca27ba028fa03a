"""Z-Image (Alibaba 2025, "Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion
Transformer")."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dreambooth_sm.families.conditioning import Conditioning
from dreambooth_sm.families.facts import AdaptedLayers, Drawing, Facts, ModelFootprint
from dreambooth_sm.families.family import LossKnobs, Pair
from dreambooth_sm.families.file_rules import is_number
from dreambooth_sm.families.flow import TAKES, WINDOW, chosen_shift, read_prompts, reader_problems, shift_by_words

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dreambooth_sm.objectives import Objective

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_LINEAR = (*_ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
# The transformer's sequences are multiples of this; words of its own fill them up.
_MULTIPLE = 32
_PATCH, _TIMES = 2, 1000


class _Files:
    """Pipeline directories as the hub has them."""

    classes = MappingProxyType(
        {
            "transformer": "ZImageTransformer2DModel",
            "vae": "AutoencoderKL",
            "text_encoder": "Qwen3Model",
            "tokenizer": "Qwen2Tokenizer",
        }
    )

    def config_problems(self, part: str, config: Mapping[str, Any], where: str) -> list[str]:
        if part == "vae":
            usual = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
            return [
                f"{where}: {key} is {json.dumps(value, default=str):.60} and should be a number such as {number}"
                for key, number in usual.items()
                if not is_number(value := config.get(key)) or (key == "scaling_factor" and value <= 0)
            ]
        if part != "transformer":
            return []
        problems = []
        if config.get("siglip_feat_dim") is not None:
            problems.append(
                f"{where}: siglip_feat_dim is set: it takes pictures beside prompts; name a model that does not"
            )
        for key, wanted in (("all_patch_size", [_PATCH]), ("all_f_patch_size", [1]), ("t_scale", float(_TIMES))):
            value = config.get(key, wanted)
            if (list(value) if isinstance(value, tuple) else value) != wanted:
                problems.append(f"{where}: {key} is {value!r:.60}, and this project trains models with {wanted}")
        return problems

    def fit_problems(self, pipeline: Any) -> list[str]:
        transformer, vae, text = pipeline.transformer.config, pipeline.vae.config, pipeline.text_encoder.config
        problems = reader_problems(pipeline.tokenizer, text)
        if vae.latent_channels != transformer.in_channels:
            problems.append(
                f"the VAE makes latents of {vae.latent_channels} channels, and the transformer takes "
                f"{transformer.in_channels}"
            )
        if text.hidden_size != transformer.cap_feat_dim:
            problems.append(
                f"the text encoder's states are {text.hidden_size} wide, and the transformer takes "
                f"{transformer.cap_feat_dim}"
            )
        if text.num_hidden_layers < 2:
            problems.append("the text encoder has one layer, and its last but one is read")
        return problems


class ZImage:
    """A transformer on one sequence of a picture's patches and a prompt's words.

    Text: ``states`` ``(rows, words, width)`` of a language model's last layer but one, filled up to a multiple of 32;
    ``lengths``, int64 ``(rows,)``, of each prompt's own; ``kept`` ``(rows, words)``, those that are looked at, where
    prompts are not filled up to the same length.
    """

    facts = Facts(
        name="z_image",
        title="Z-Image",
        short="Z-Image",
        article="a",
        listed="Z-Image",
        resolution=1024,
        footprint=ModelFootprint(
            denoiser=6154.9,
            text_encoder=4022.5,
            vae=83.8,
            text_width=2560,
            denoiser_coded=6153.9,
            text_coded=3633.3,
            largest_coded=39.3,
            trains_text_encoder=False,
        ),
        pipeline="ZImagePipeline",
        drawing=Drawing(
            manner="Euler steps of flow matching",
            steps=28,
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
            "attention": AdaptedLayers(_ATTENTION, (), width=1_044_480, text_width=0),
            "linear": AdaptedLayers(_LINEAR, (), width=2_480_640, text_width=0),
        },
        tensor=b"layers.0.adaLN_modulation.0.weight",
        has_single_file=False,
        adapters="comfyui",
        scale_option="joint_attention_kwargs",
        files=_Files(),
        tags=("z-image",),
        licences={"Tongyi-MAI/Z-Image": "apache-2.0"},
        names=re.compile(r"z[-_ ]?image", re.IGNORECASE),
        distilled=re.compile(r"turbo", re.IGNORECASE),
        hint="z-image",
        overflows=True,
        multiple=16,
        longest_prompt=WINDOW,
        matches_flow=True,
        takes={
            **TAKES,
            "mixed_precision": (("auto", "bf16", "no"), "its values are beyond the range of fp16"),
        },
    )

    def tokenize(
        self, model: Any, prompts: Sequence[str], *, max_tokens: int | None = 75, pad: bool = True
    ) -> dict[str, Tensor]:
        return read_prompts(model.tokenizer, prompts, self.facts.title, thinking=True, max_tokens=max_tokens)

    def encode(self, model: Any, tokens: Mapping[str, Tensor]) -> Conditioning:
        import torch

        words = []
        for ids, mask in zip(tokens["ids"], tokens["mask"], strict=True):  # one by one: all layers' states are kept
            read = model.text_encoder(input_ids=ids[None], attention_mask=mask[None], output_hidden_states=True)
            words.append(read.hidden_states[-2][0][mask])
        counts = [len(each) for each in words]
        filled = [-(-count // _MULTIPLE) * _MULTIPLE for count in counts]
        states = torch.stack([torch.nn.functional.pad(each, (0, 0, 0, max(filled) - len(each))) for each in words])
        text = {"states": states, "lengths": torch.tensor(counts, device=states.device)}
        if len(set(filled)) > 1:
            text["kept"] = torch.arange(max(filled), device=states.device) < torch.tensor(
                filled, device=states.device
            ).unsqueeze(1)
        return Conditioning(text)

    def extras(self, size: Pair, crop: Pair, target: Pair) -> Mapping[str, Sequence[float]]:
        return {}

    def predict(self, denoiser: Any, noised: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Computes what the transformer's own forward does, without a step for each row: nothing here waits for the
        device, so that it can be captured. The model tells how to go from noise to the picture, and is asked for the
        other way."""
        import torch

        from dreambooth_sm.training.recomputation import recomputed

        run = functools.partial(recomputed, _run) if denoiser.gradient_checkpointing else _run
        text = conditioning.text
        rows, channels, height, width = noised.shape
        high, wide = height // _PATCH, width // _PATCH
        count = high * wide
        told = denoiser.t_embedder((_TIMES - times.expand(rows)) / _TIMES * denoiser.t_scale).type_as(noised)
        filled = (text["lengths"] + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE

        patches = noised.reshape(rows, channels, high, _PATCH, wide, _PATCH)
        patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(rows, count, -1)
        more = -count % _MULTIPLE
        picture = denoiser.all_x_embedder[f"{_PATCH}-1"](torch.nn.functional.pad(patches, (0, 0, 0, more)))
        if more:
            is_more = torch.arange(count + more, device=noised.device) >= count
            picture = torch.where(is_more[:, None], denoiser.x_pad_token, picture)
        turns = _turns(denoiser, _places_of_picture(filled, high, wide, more))
        for block in denoiser.noise_refiner:
            picture = run(block, picture, None, turns, told)

        words = denoiser.cap_embedder(text["states"])
        numbers = torch.arange(words.shape[1], device=words.device)
        words = torch.where((numbers >= text["lengths"][:, None])[..., None], denoiser.cap_pad_token, words)
        turns_of_words = _turns(denoiser, _places_of_words(numbers, rows))
        kept = text.get("kept")
        for block in denoiser.context_refiner:
            words = run(block, words, kept, turns_of_words)

        together = torch.cat([picture, words], dim=1)
        turns = torch.cat([turns, turns_of_words], dim=1)
        if kept is not None:
            kept = torch.nn.functional.pad(kept, (picture.shape[1], 0), value=True)
        for block in denoiser.layers:
            together = run(block, together, kept, turns, told)
        made = denoiser.all_final_layer[f"{_PATCH}-1"](together, c=told)[:, :count]
        made = made.reshape(rows, high, wide, _PATCH, _PATCH, channels)
        result: Tensor = -made.permute(0, 5, 1, 3, 2, 4).reshape(noised.shape)
        return result

    def sampler(self, model: Any, steps: int, size: Pair, device: torch.device) -> Any:
        import torch

        scheduler = type(model.scheduler).from_config(model.scheduler.config)
        pixels = _PATCH * 2 ** (len(model.vae.config.block_out_channels) - 1)
        shift = shift_by_words(scheduler.config, size[0] // pixels * (size[1] // pixels))
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=shift, device=device)
        scheduler.set_begin_index(0)
        return scheduler

    def guide(self, predicted: Tensor, without: Tensor, guidance: float) -> Tensor:
        """The pipeline's ``guidance_scale`` is what is added to the prompt's own: one less."""
        return predicted + (guidance - 1) * (predicted - without)

    def objective(self, model: Any, h: LossKnobs) -> Objective:
        """With the shift that pictures are drawn with, where no other is asked for."""
        import math

        from dreambooth_sm.objectives import FlowMatching

        config = model.scheduler.config
        pixels = _PATCH * 2 ** (len(model.vae.config.block_out_channels) - 1)
        by_size = math.exp(shift_by_words(config, (h.resolution // pixels) ** 2))
        return FlowMatching.of(chosen_shift(h, config, by_size), h.time_sampling, _TIMES)

    def scale(self, vae: Any) -> tuple[float, float]:
        return float(vae.config.shift_factor), float(vae.config.scaling_factor)

    def normalise(self, scale: tuple[float, float], latents: Tensor) -> Tensor:
        shift, factor = scale
        return (latents - shift) * factor

    def denormalise(self, scale: tuple[float, float], latents: Tensor) -> Tensor:
        shift, factor = scale
        return latents / factor + shift

    def vae_dtype(self, vae: Any) -> torch.dtype:
        import torch

        return torch.bfloat16


def _run(block: Any, hidden: Tensor, kept: Tensor | None, turns: Tensor, told: Tensor | None = None) -> Tensor:
    """A block as the library computes it; on cards with kernels in fewer passes over its activations."""
    from dreambooth_sm.training.rms_norm import norms_serve

    if block._compiled_call_impl is None and norms_serve(hidden, *_frozen(block)):
        return run_in_fewer_passes(block, hidden, kept, turns, told)
    result: Tensor = block(hidden, kept, turns, told)
    return result


def _frozen(block: Any) -> list[Tensor]:
    attention = block.attention
    norms = (block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2)
    modulations = block.adaLN_modulation.parameters() if block.modulation else ()
    return [*(norm.weight for norm in (*norms, attention.norm_q, attention.norm_k)), *modulations]


def run_in_fewer_passes(
    block: Any, hidden: Tensor, kept: Tensor | None, turns: Tensor, told: Tensor | None = None
) -> Tensor:
    """What a ZImageTransformerBlock computes, but for rounding: norms, modulations and rotations in one pass each.

    Args:
        hidden: ``(rows, words, width)``.
        kept: ``(rows, words)``, those that are looked at; None: all.
        turns: rotary embeddings, complex ``(rows, words, pairs)``.
        told: the time's embedding, ``(rows, width of it)``, where the block is modulated by it.
    """
    import torch

    from dreambooth_sm.training.rms_norm import scaled_norm, swiglu, turned_norm

    attention, feed_forward = block.attention, block.feed_forward
    scales: list[Tensor | None] = [None, None]
    gates: list[Tensor | None] = [None, None]
    if block.modulation:
        changes = block.adaLN_modulation(told).chunk(4, dim=1)
        scales, gates = [1 + change for change in changes[::2]], [change.tanh() for change in changes[1::2]]

    def norm(layer: Any, x: Tensor, factor: Tensor | None, added: Tensor | None = None) -> Tensor:
        return scaled_norm(x, layer.weight, layer.eps, factor, added)

    asked = norm(block.attention_norm1, hidden, scales[0])
    query, key, value = (
        project(asked).unflatten(-1, (attention.heads, -1))
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    query, key = (
        turned_norm(heads, layer.weight, layer.eps, turns)
        for heads, layer in ((query, attention.norm_q), (key, attention.norm_k))
    )
    seen = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if kept is None else kept[:, None, None],
    )
    seen = attention.to_out[0](seen.transpose(1, 2).flatten(2))
    hidden = norm(block.attention_norm2, seen, gates[0], hidden)
    asked = norm(block.ffn_norm1, hidden, scales[1])
    made = feed_forward.w2(swiglu(feed_forward.w1(asked), feed_forward.w3(asked)))
    return norm(block.ffn_norm2, made, gates[1], hidden)


def _places_of_picture(filled: Tensor, high: int, wide: int, more: int) -> Tensor:
    """Where patches are: behind the words of their row, by rows and columns; those that fill up at the start. int64
    ``(rows, patches, 3)``."""
    import torch

    grid = torch.cartesian_prod(*(torch.arange(side, device=filled.device) for side in (high, wide)))
    behind = (filled + 1)[:, None, None].expand(-1, len(grid), 1)
    places = torch.cat([behind, grid.expand(len(filled), -1, -1)], dim=-1)
    return torch.nn.functional.pad(places, (0, 0, 0, more))


def _places_of_words(numbers: Tensor, rows: int) -> Tensor:
    """Where words are: one behind the other, from 1 on."""
    import torch

    return torch.nn.functional.pad((numbers + 1)[:, None], (0, 2)).expand(rows, -1, -1)


def _turns(denoiser: Any, places: Tensor) -> Tensor:
    """The rotary embedding of places, complex ``(rows, words, numbers)``."""
    turns: Tensor = denoiser.rope_embedder(places.flatten(0, 1))
    return turns.view(*places.shape[:2], -1)


FAMILY = ZImage()
