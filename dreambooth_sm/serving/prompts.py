"""Prompts as the denoiser is told of them, and those that were told lately."""

from __future__ import annotations

from collections import OrderedDict

import torch

from dreambooth_sm.data.conditioning import embed
from dreambooth_sm.families import Conditioning
from dreambooth_sm.models import PretrainedModel

# Of a language model, one may take 4 MB.
_KEPT = 64


class PromptEncoder:
    """Encodes prompts one at a time, so that what comes of one does not depend on the others.

    Args:
        model: with its text encoders where they compute.
    """

    def __init__(self, model: PretrainedModel) -> None:
        self._model = model
        self._kept: OrderedDict[tuple[str, ...], Conditioning] = OrderedDict()

    def conditions(self, prompt: str, negative: str, size: tuple[int, int], guidance: float) -> Conditioning:
        """What the denoiser is told of a picture: of the prompt in the last row and, where guidance is classifier-free,
        of the negative prompt in the row before it."""
        family, denoiser = self._model.family, self._model.denoiser
        told_guidance = family.facts.drawing.told
        is_guided = guidance > 1 and told_guidance is None
        text = self._pair(negative, prompt) if is_guided else self._encoded(prompt)
        told = dict(family.extras(size, (0, 0), size))  # a whole picture
        if told_guidance:
            told[told_guidance] = [guidance]
        extras = {name: torch.tensor([row] * len(text), dtype=torch.float32) for name, row in told.items()}
        return text.beside(extras).to(denoiser.device, denoiser.dtype)

    def _pair(self, negative: str, prompt: str) -> Conditioning:
        one, other = self._encoded(negative), self._encoded(prompt)
        shapes = [{name: value.shape for name, value in each.text.items()} for each in (one, other)]
        if shapes[0] == shapes[1]:
            return side_by_side([one, other])
        return self._encoded(negative, prompt)  # as long as the longer one

    @torch.no_grad()
    def _encoded(self, *prompts: str) -> Conditioning:
        if prompts in self._kept:
            self._kept.move_to_end(prompts)
            return self._kept[prompts]
        found = embed(self._model.family, self._model, prompts, max_tokens=None)
        self._kept[prompts] = found
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found


def side_by_side(conditions: list[Conditioning]) -> Conditioning:
    """The rows of several, one after another; of the same names and shapes."""
    first = conditions[0]
    if len(conditions) == 1:
        return first
    return Conditioning(
        {name: torch.cat([each.text[name] for each in conditions]) for name in first.text},
        {name: torch.cat([each.extras[name] for each in conditions]) for name in first.extras},
    )
