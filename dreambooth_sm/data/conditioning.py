"""Prompts as a model's text encoders see them, for whoever trains and whoever draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dreambooth_sm.families import Conditioning, Family


@torch.no_grad()
def embed(
    family: Family, model: Any, prompts: Sequence[str], *, max_tokens: int | None = 75, pad: bool = True
) -> Conditioning:
    """Prompts as the model's text encoders see them, without extras, on the encoders' device.

    Whoever trains and whoever draws asks here: both see all of a prompt that is longer than the encoders' window.

    Args:
        family: the model's.
        model: a :class:`~dreambooth_sm.models.PretrainedModel` or a pipeline.
        max_tokens, pad: see :meth:`~dreambooth_sm.families.Family.tokenize`.
    """
    tokens = family.tokenize(model, prompts, max_tokens=max_tokens, pad=pad)
    return family.encode(model, {name: value.to(model.text_encoder.device) for name, value in tokens.items()})
