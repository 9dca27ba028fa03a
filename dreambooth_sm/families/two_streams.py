"""What families share whose transformers have blocks of two streams, a picture's patches and a prompt's words, before
blocks of both in one, and whose prompts T5 reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from dreambooth_sm.families.facts import MakersName
from dreambooth_sm.families.family import LossKnobs, Pair
from dreambooth_sm.families.file_rules import is_number
from dreambooth_sm.families.flow import TAKES, chosen_shift, read_texts, shift_by_words

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dreambooth_sm.objectives import Objective

PATCH, TIMES = 2, 1000
# Numbers of blocks that no model comes near.
_BLOCKS = range(64)
# Ends of layers' names that adapters lie beside.
STREAM_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
STREAM_LINEAR = (
    *STREAM_ATTENTION,
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    *(f"single_transformer_blocks.{number}.proj_out" for number in _BLOCKS),
)
OWN_TAKES = {**TAKES, "mixed_precision": (("auto", "bf16", "no"), "its values are beyond the range of fp16")}
_SIDES = (
    ("img", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff", "norm1"),
    ("txt", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "ff_context", "norm1_context"),
)
_SCALES = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def makers_names(*, modulated: bool) -> Iterator[MakersName]:
    """What the makers call the blocks' layers.

    Args:
        modulated: whether each block has a layer that makes its modulations.
    """
    for side, *thirds, out, net, norm in _SIDES:
        ours, theirs = "transformer_blocks.{}.", f"double_blocks.{{}}.{side}_"
        for number, layer in enumerate(thirds):
            yield MakersName(ours + layer, f"{theirs}attn.qkv", (number, 1, 3))
        yield MakersName(ours + out, f"{theirs}attn.proj")
        yield MakersName(f"{ours}{net}.net.0.proj", f"{theirs}mlp.0")
        yield MakersName(f"{ours}{net}.net.2", f"{theirs}mlp.2")
        if modulated:
            yield MakersName(f"{ours}{norm}.linear", f"{theirs}mod.lin")
    ours, theirs = "single_transformer_blocks.{}.", "single_blocks.{}."
    for number, layer in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
        yield MakersName(ours + layer, f"{theirs}linear1", (number, 1, 7))
    yield MakersName(f"{ours}proj_mlp", f"{theirs}linear1", (3, 4, 7))
    yield MakersName(f"{ours}proj_out", f"{theirs}linear2")
    if modulated:
        yield MakersName(f"{ours}norm.linear", f"{theirs}modulation.lin")


def scale_problems(config: Mapping[str, Any], where: str, usual: Mapping[str, float] = _SCALES) -> list[str]:
    """What is wrong with how a VAE's configuration says that latents are scaled and shifted."""
    return [
        f"{where}: {key} is {value!r:.60} and should be a number such as {example}"
        for key, example in usual.items()
        if not is_number(value := config.get(key)) or (key == "scaling_factor" and value <= 0)
    ]


def side_problems(transformer: Any, vae: Any, reader: Any) -> list[str]:
    """What keeps configurations of the transformer, the VAE and T5 from belonging together."""
    problems = []
    if PATCH**2 * vae.latent_channels != transformer.in_channels:
        problems.append(
            f"the VAE makes latents of {vae.latent_channels} channels, and the transformer takes "
            f"{transformer.in_channels}, which is not {PATCH**2} times as many"
        )
    if reader.d_model != transformer.joint_attention_dim:
        problems.append(
            f"T5's states are {reader.d_model} wide, and the transformer takes {transformer.joint_attention_dim}"
        )
    return problems


def read_with_t5(tokenizer: Any, prompts: Sequence[str], title: str, *, max_tokens: int | None) -> dict[str, Tensor]:
    """What T5 takes of prompts, see :func:`dreambooth_sm.families.flow.read_texts`."""
    return read_texts(tokenizer, prompts, prompts, title, max_tokens=max_tokens)


def in_patches(latents: Tensor) -> Tensor:
    """Latents ``(rows, channels, height, width)`` patch by patch, ``(rows, patches, 4 * channels)``."""
    rows, channels, height, width = latents.shape
    patches = latents.reshape(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(rows, height // PATCH * (width // PATCH), -1)


def of_patches(patches: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`in_patches`.

    Args:
        shape: of the latents.
    """
    rows, channels, height, width = shape
    latents = patches.reshape(rows, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return latents.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels, height, width)


def places(latents: Tensor) -> Tensor:
    """Where patches are, by rows and columns: int64 ``(patches, 3)``. Words are all at the origin."""
    import torch

    sides = (torch.arange(side // PATCH, device=latents.device) for side in latents.shape[-2:])
    return torch.nn.functional.pad(torch.cartesian_prod(*sides), (1, 0))


def frozen_norms(denoiser: Any) -> Iterator[Tensor]:
    """Weights of the norms of heads, which kernels give no gradients to."""
    for block in (*denoiser.transformer_blocks, *getattr(denoiser, "single_transformer_blocks", ())):
        for name, weight in block.attn.named_parameters():
            if name.startswith("norm"):
                yield weight


def runs_in_fewer_passes(denoiser: Any, given: Tensor, *frozen: Tensor) -> bool:
    """Whether kernels compute the blocks: where none was compiled, and `norms_serve` says so."""
    from dreambooth_sm.training.rms_norm import norms_serve

    blocks = (*denoiser.transformer_blocks, *getattr(denoiser, "single_transformer_blocks", ()))
    is_compiled = any(block._compiled_call_impl is not None for block in blocks)
    return not is_compiled and norms_serve(given, *frozen, *frozen_norms(denoiser))


def runner(denoiser: Any) -> Callable[..., Any]:
    """Calls a function of a block, whose activations are recomputed where the transformer's are to be."""
    from dreambooth_sm.training.recomputation import recomputed

    def run(function: Callable[..., Any], *given: Any) -> Any:
        return recomputed(function, *given) if denoiser.gradient_checkpointing else function(*given)

    return run


def turns_of(denoiser: Any, places: Tensor, rows: int) -> Tensor:
    """The rotary embedding of places, complex ``(rows, words, pairs)``."""
    import torch

    cosine, sine = denoiser.pos_embed(places)  # each stands twice, for both numbers of a pair
    return torch.complex(cosine[:, ::2], sine[:, ::2]).expand(rows, -1, -1)


def heads_of(project: Any, x: Tensor, width: int) -> Tensor:
    """``(rows, words, heads, width)``."""
    heads: Tensor = project(x).unflatten(-1, (-1, width))
    return heads


def attend_together(
    attention: Any, words: Tensor, picture: Tensor, turns: Tensor, mask: Tensor | None = None
) -> tuple[Any, Tensor]:
    """Attention of words and a picture, which look at each other, in one pass each for norms and rotations.

    Args:
        attention: a block's, with projections of its own for words; without one for what they have seen, that is None.
        words, picture: ``(rows, words, width)``.
        turns: of words, then those of the picture, complex ``(rows, words, pairs)``.
        mask: of words, then the picture, as `dreambooth_sm.training.parallel_block.attend` takes it.
    """
    import torch

    from dreambooth_sm.training.parallel_block import attend
    from dreambooth_sm.training.rms_norm import turned_norms

    width = len(attention.norm_q.weight)
    query, key = (
        turned_norms(
            [(heads_of(one, words, width), norm.weight), (heads_of(other, picture, width), norm_2.weight)],
            norm.eps,
            turns,
        )
        for one, norm, other, norm_2 in (
            (attention.add_q_proj, attention.norm_added_q, attention.to_q, attention.norm_q),
            (attention.add_k_proj, attention.norm_added_k, attention.to_k, attention.norm_k),
        )
    )
    values = heads_of(attention.add_v_proj, words, width), heads_of(attention.to_v, picture, width)
    seen = attend(query, key, torch.cat(values, dim=1), mask).flatten(2)
    cut, told = words.shape[1], attention.to_add_out
    return None if told is None else told(seen[:, :cut]), attention.to_out[0](seen[:, cut:])


def attend_alone(attention: Any, x: Tensor, turns: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention within one sequence ``(rows, words, width)``, as :func:`attend_together`."""
    return cast("Tensor", attention.to_out[0](_seen_alone(attention, x, turns, mask)))


def _seen_alone(attention: Any, x: Tensor, turns: Tensor, mask: Tensor | None) -> Tensor:
    from dreambooth_sm.training.parallel_block import attend
    from dreambooth_sm.training.rms_norm import turned_norm

    width = len(attention.norm_q.weight)
    query, key = (
        turned_norm(heads_of(project, x, width), norm.weight, norm.eps, turns)
        for project, norm in ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k))
    )
    return attend(query, key, heads_of(attention.to_v, x, width), mask).flatten(2)


def changed_by(
    x: Tensor, seen: Tensor, changes: Sequence[Tensor], eps: float, net: Callable[[Tensor], Tensor]
) -> Tensor:
    """What a stream becomes by what it has seen, and by its feed-forward net.

    Args:
        x, seen: ``(rows, words, width)``.
        changes: the gate of what was seen; a shift and a scale before the net, and its gate; each ``(rows, width)``.
        eps: of the norm before the net.
    """
    from dreambooth_sm.training.modulation import gated_sum, modulated_norm

    gate, shift, scale, gate_of_net = changes
    asked, x = modulated_norm(gated_sum(x, gate, seen), scale, shift, eps)
    return gated_sum(x, gate_of_net, net(asked))


def side_by_side(
    block: Any,
    words: Tensor,
    picture: Tensor,
    of_words: Sequence[Tensor],
    of_picture: Sequence[Tensor],
    turns: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a FluxTransformerBlock computes, but for rounding.

    Args:
        words, picture: ``(rows, words, width)``.
        of_words, of_picture: a shift, a scale and a gate of attention and those of the feed-forward net, each
            ``(rows, width)``.
        turns, mask: as `attend_together` takes them.
    """
    from dreambooth_sm.training.modulation import modulated_norm

    asked, words = modulated_norm(words, of_words[1], of_words[0], block.norm1_context.norm.eps)
    shown, picture = modulated_norm(picture, of_picture[1], of_picture[0], block.norm1.norm.eps)
    seen_by_words, seen_by_picture = attend_together(block.attn, asked, shown, turns, mask)
    words = changed_by(words, seen_by_words, of_words[2:], block.norm2_context.eps, block.ff_context)
    picture = changed_by(picture, seen_by_picture, of_picture[2:], block.norm2.eps, block.ff)
    return words, picture


def in_one_sequence(
    block: Any, x: Tensor, changes: Sequence[Tensor], turns: Tensor, mask: Tensor | None = None
) -> Tensor:
    """What a FluxSingleTransformerBlock computes of words and a picture, but for rounding.

    Args:
        x: ``(rows, words, width)``.
        changes: a shift, a scale and a gate, each ``(rows, width)``.
        turns, mask: as `attend_together` takes them.
    """
    import torch

    from dreambooth_sm.training.modulation import gated_sum, modulated_norm

    shift, scale, gate = changes
    asked, x = modulated_norm(x, scale, shift, block.norm.norm.eps)
    seen = _seen_alone(block.attn, asked, turns, mask)
    made = torch.cat([seen, block.act_mlp(block.proj_mlp(asked))], dim=-1)
    return gated_sum(x, gate, block.proj_out(made))


class TwoStreams:
    """What such families do in the same way: times, noise, and the latents of a VAE that scales and shifts them."""

    def sampler(self, model: Any, steps: int, size: Pair, device: torch.device) -> Any:
        import numpy as np

        scheduler = type(model.scheduler).from_config(model.scheduler.config)
        pixels = PATCH * 2 ** (len(model.vae.config.block_out_channels) - 1)
        shift = shift_by_words(scheduler.config, size[0] // pixels * (size[1] // pixels))
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift, device=device)
        scheduler.set_begin_index(0)
        return scheduler

    def guide(self, predicted: Tensor, without: Tensor, guidance: float) -> Tensor:
        return without + guidance * (predicted - without)

    def objective(self, model: Any, h: LossKnobs) -> Objective:
        """With the shift that pictures are drawn with, where no other is asked for."""
        import math

        from dreambooth_sm.objectives import FlowMatching

        config = model.scheduler.config
        pixels = PATCH * 2 ** (len(model.vae.config.block_out_channels) - 1)
        by_size = math.exp(shift_by_words(config, (h.resolution // pixels) ** 2))
        return FlowMatching.of(chosen_shift(h, config, by_size), h.time_sampling, TIMES)

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
