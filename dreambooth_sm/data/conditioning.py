"""What a UNet is told of each row beside its noised latents and time step: the prompt, and with SDXL more than that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreambooth_sm.data.prompts import encode, encode_two, tokenize_for


@dataclass(frozen=True)
class Conditioning:
    """The rows of all tensors belong together.

    Attributes:
        states: ``(rows, tokens, width)``, the text encoder's; of both side by side where there are two.
        pooled: ``(rows, width)``, the second text encoder's; None where there is one.
        sizes: ``(rows, 6)`` where there are two; see :func:`size_numbers`.
    """

    states: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    def of(self, rows: Tensor) -> Conditioning:
        """Some rows, by their numbers."""
        return Conditioning(
            self.states[rows],
            None if self.pooled is None else self.pooled[rows],
            None if self.sizes is None else self.sizes[rows],
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """Sizes stay in full precision: they are embedded as angles."""
        return Conditioning(
            self.states.to(device, dtype),
            None if self.pooled is None else self.pooled.to(device, dtype),
            None if self.sizes is None else self.sizes.to(device),
        )

    def arguments(self) -> dict[str, Any]:
        """For the UNet's forward pass."""
        added = None if self.pooled is None else {"text_embeds": self.pooled, "time_ids": self.sizes}
        return {"encoder_hidden_states": self.states, "added_cond_kwargs": added}


def size_numbers(original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> tuple[int, ...]:
    """What SDXL is told of a picture (Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution
    Image Synthesis", section 2.2): ``(height, width, top, left, height, width)``.

    Args:
        original: width and height before it was scaled.
        crop: left and top edge of what is shown, in the scaled picture.
        target: width and height of what is shown.
    """
    return (*reversed(original), *reversed(crop), *reversed(target))


def tokenizers_in(model: Any) -> list[Any]:
    """The tokenizers of a :class:`~dreambooth_sm.models.PretrainedModel` or a pipeline, one for each text encoder."""
    return [t for t in (model.tokenizer, getattr(model, "tokenizer_2", None)) if t is not None]


@torch.no_grad()
def embed(
    model: Any, prompts: list[str], *, max_tokens: int | None = 75, pad: bool = True, zeros_for_empty: bool = False
) -> Conditioning:
    """Prompts as the model's text encoders see them, without sizes; on the encoders' device. Whoever trains and whoever
    draws asks here: both see all of a prompt that is longer than the encoders' window.

    Args:
        model: a :class:`~dreambooth_sm.models.PretrainedModel` or a pipeline.
        max_tokens, pad: see :func:`~dreambooth_sm.data.prompts.tokenize`.
        zeros_for_empty: embeds the empty prompt as zeros where there are two text encoders.
    """
    device = model.text_encoder.device
    ids = [rows.to(device) for rows in tokenize_for(tokenizers_in(model), prompts, max_tokens=max_tokens, pad=pad)]
    if len(ids) == 1:
        return Conditioning(encode(model.text_encoder, ids[0]))
    states, pooled = encode_two((model.text_encoder, model.text_encoder_2), ids)
    if zeros_for_empty:
        empty = torch.tensor([not prompt for prompt in prompts], device=device)
        states[empty], pooled[empty] = 0, 0
    return Conditioning(states, pooled)
