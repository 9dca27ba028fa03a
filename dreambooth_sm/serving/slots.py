"""The slots of a model: which adapter lies in which, and which is let go of for another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence, Set

import torch
from torch import nn

from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.serving.bank import AdapterUse, BankedLayer, BatchRows, SlotBank
from dreambooth_sm.serving.host_adapter import HostAdapter
from dreambooth_sm.stored.model import MAKING


class AdapterSlots:
    """Slots for adapters beside the layers of a model. Layers get a bank once an adapter wants it.

    Args:
        model: with its parts where they compute; layers of these are replaced.
        count: adapters that can be drawn with at a time.

    Attributes:
        rows: which row of a batch has which adapters.
        layers: with a bank, by part and name.
        changes: how often layers got a bank, or banks another size.
    """

    def __init__(self, model: PretrainedModel, count: int) -> None:
        self._model, self._count, self._rank = model, count, 0
        self.rows = BatchRows()
        self.layers: dict[tuple[str, str], BankedLayer] = {}
        self.changes = 0
        # The one that was used least lately comes first.
        self._slots: OrderedDict[int, HostAdapter | None] = OrderedDict.fromkeys(range(1, count + 1))

    def take(self, adapters: Sequence[tuple[HostAdapter, float]], busy: Set[int]) -> tuple[AdapterUse, ...] | None:
        """Brings adapters into slots.

        Args:
            adapters: with their strengths.
            busy: slots that pictures are drawn with.

        Returns:
            their slots; None where all are busy.
        """
        wanted = {adapter.number for adapter, _ in adapters}
        places = {each.number: slot for slot, each in self._slots.items() if each is not None}
        free = [
            slot for slot, each in self._slots.items() if slot not in busy and (not each or each.number not in wanted)
        ]
        missing = [adapter for adapter, _ in adapters if adapter.number not in places]
        if len(missing) > len(free):
            return None
        for adapter, slot in zip(missing, sorted(free, key=lambda slot: self._slots[slot] is not None), strict=False):
            self._load(adapter, slot)
            places[adapter.number] = slot
        for adapter, _ in adapters:
            self._slots.move_to_end(places[adapter.number])
        return tuple(AdapterUse(places[adapter.number], strength) for adapter, strength in adapters)

    def has(self, adapter: HostAdapter) -> bool:
        """Whether an adapter lies in a slot."""
        return any(each is adapter for each in self._slots.values())

    @torch.no_grad()
    def _load(self, adapter: HostAdapter, slot: int) -> None:
        if adapter.rank > self._rank:
            self._rank, self.changes = adapter.rank, self.changes + 1
            for layer in self.layers.values():
                layer.bank.grow(self._rank)
        wanted = {(part, name): layer for part, layers in adapter.parts.items() for name, layer in layers.items()}
        for part, name in wanted.keys() - self.layers.keys():
            self.changes += 1
            self.layers[part, name] = self._replaced(getattr(self._model, part), name)
        for place, layer in self.layers.items():
            layer.bank.put(slot, wanted.get(place))
        self._slots[slot] = adapter

    def _replaced(self, module: nn.Module, name: str) -> BankedLayer:
        base = module.get_submodule(name)
        assert isinstance(base, nn.Linear | nn.Conv2d), name
        with MAKING:
            layer = BankedLayer(base, SlotBank(base, self._count, self._rank), self.rows)
            module.set_submodule(name, layer)
        return layer


def busy_slots(uses: Iterable[Sequence[AdapterUse]]) -> set[int]:
    """Slots of all of these."""
    return {use.slot for each in uses for use in each}
