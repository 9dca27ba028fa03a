"""Prompts as the denoiser is told of them, and those that were told lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from dreambooth_sm.data.conditioning import embed
from dreambooth_sm.families import Conditioning
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.serving.bank import AdapterUse
from dreambooth_sm.serving.host_adapter import HostAdapter
from dreambooth_sm.serving.served_model import with_words
from dreambooth_sm.serving.slots import AdapterSlots

# Of a language model, one may take 4 MB.
_KEPT = 64


class PromptEncoder:
    """Encodes prompts one at a time, so that what comes of one does not depend on the others.

    Args:
        model: with its text encoders where they compute.
        slots: with the adapters beside their layers.
    """

    def __init__(self, model: PretrainedModel, slots: AdapterSlots) -> None:
        self._model, self._slots = model, slots
        # diffusers looks at all modules for these.
        self._device, self._dtype = model.denoiser.device, model.denoiser.dtype
        self._kept: OrderedDict[tuple[Any, ...], Conditioning] = OrderedDict()

    def forget(self) -> None:
        """Encodes all prompts again: text encoders have other values."""
        self._kept.clear()

    def conditions(
        self,
        prompt: str,
        negative: str,
        size: tuple[int, int],
        guidance: float,
        adapters: Sequence[tuple[HostAdapter, float]] = (),
        uses: Sequence[AdapterUse] = (),
    ) -> Conditioning:
        """What the denoiser is told of a picture: of the prompt in the last row and, where guidance is classifier-free,
        of the negative prompt in the row before it.

        Args:
            adapters: that draw the picture, with their strengths.
            uses: of the slots that they lie in.
        """
        family = self._model.family
        encoding = _Encoding(self._model, self._slots, self._device, self._kept, adapters, uses)
        told_guidance = family.facts.drawing.told
        is_guided = guidance > 1 and told_guidance is None
        text = encoding.pair(negative, prompt) if is_guided else encoding.encoded(prompt)
        told = dict(family.extras(size, (0, 0), size))  # a whole picture
        if told_guidance:
            told[told_guidance] = [guidance]
        extras = {name: torch.tensor([row] * len(text), dtype=torch.float32) for name, row in told.items()}
        return text.beside(extras).to(self._device, self._dtype)


class _Encoding:
    """Prompts of one picture, with its adapters."""

    def __init__(
        self,
        model: PretrainedModel,
        slots: AdapterSlots,
        device: torch.device,
        kept: OrderedDict[tuple[Any, ...], Conditioning],
        adapters: Sequence[tuple[HostAdapter, float]],
        uses: Sequence[AdapterUse],
    ) -> None:
        self._model, self._slots, self._device, self._kept, self._uses = model, slots, device, kept, uses
        texts = {*model.text_parts}
        # Adapters of the denoiser alone leave prompts as they are.
        reading = [(each, strength) for each, strength in adapters if each.words or texts & each.parts.keys()]
        self._key = tuple((each.number, strength) for each, strength in reading)
        self._words = {word: vectors for each, _ in reading for word, vectors in each.words.items()}

    def pair(self, negative: str, prompt: str) -> Conditioning:
        """Both, one after the other."""
        one, other = self.encoded(negative), self.encoded(prompt)
        shapes = [{name: value.shape for name, value in each.text.items()} for each in (one, other)]
        if shapes[0] == shapes[1]:
            return side_by_side([one, other])
        return self.encoded(negative, prompt)  # as long as the longer one

    @torch.no_grad()
    def encoded(self, *prompts: str) -> Conditioning:
        key = (self._key, *prompts)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        model = with_words(self._model, self._words)
        self._slots.rows.set([self._uses], self._device)
        found = embed(model.family, model, prompts, max_tokens=None)
        self._kept[key] = found
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found


def side_by_side(conditions: Sequence[Conditioning]) -> Conditioning:
    """The rows of several, one after another; of the same names and shapes."""
    first = conditions[0]
    if len(conditions) == 1:
        return first
    return Conditioning(
        {name: torch.cat([each.text[name] for each in conditions]) for name in first.text},
        {name: torch.cat([each.extras[name] for each in conditions]) for name in first.extras},
    )
