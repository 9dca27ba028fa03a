"""One adapter in the host's memory, ready for a slot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dreambooth_sm.adapters.adapter import Adapter, check_fit
from dreambooth_sm.adapters.layers import LowRank
from dreambooth_sm.adapters.read import read_adapter
from dreambooth_sm.errors import UserError
from dreambooth_sm.serving.served_model import adapter_file, learned_words, read_report, subject_prompts

# By part and name, the shapes of a model's weights.
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class HostAdapter:
    """An adapter that a batch can hold beside others.

    Attributes:
        name: that requests call it by.
        parts: its layers, by part and name.
        words: that were learned with it, ``(vectors, width)`` by word and text encoder.
        prompt: of its subject; empty where nothing says it.
        number: no other has it: an adapter that is read again is another one.
    """

    name: str
    parts: Mapping[str, Mapping[str, LowRank]]
    words: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    prompt: str = ""
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def rank(self) -> int:
        """The largest of any layer."""
        return max((layer.rank for layers in self.parts.values() for layer in layers.values()), default=0)

    @property
    def size(self) -> int:
        """In bytes."""
        tensors = [t for layers in self.parts.values() for layer in layers.values() for t in (layer.down, layer.up)]
        tensors += [vectors for of_parts in self.words.values() for vectors in of_parts.values()]
        return sum(tensor.nbytes for tensor in tensors)


def read_host_adapter(name: str, path: Path, shapes: Shapes, base: str) -> HostAdapter:
    """Reads an adapter that lies on this machine.

    Args:
        path: a file, or what a job left.
        shapes: of the model that it is to lie beside, and ``base``, what messages call that.

    Raises:
        UserError: where it is damaged, for another model, or of a kind that needs weights of its own.
    """
    found = path if path.is_file() else adapter_file(path)
    report = read_report(path if path.is_dir() else path.parent)
    words = learned_words(path, report) if path.is_dir() else {}
    if found is None and not words:
        raise UserError(f"{path} holds no adapter, or several")
    adapter = read_adapter(found) if found else Adapter({})
    check_fit(adapter, shapes, base)
    parts = {
        part: {key: _plain(layer, path) for key, layer in layers.items()} for part, layers in adapter.parts.items()
    }
    prompt = next(iter(subject_prompts(report).values()), adapter.notes.get("modelspec.trigger_phrase", ""))
    return HostAdapter(name, parts, {**adapter.words, **words}, prompt)


def _plain(layer: object, path: Path) -> LowRank:
    if not isinstance(layer, LowRank) or layer.magnitude is not None or layer.middle is not None:
        kind = getattr(layer, "kind", "adapter") if getattr(layer, "middle", None) is None else "LoRA with a core"
        raise UserError(
            f"{path} is a {kind}, which changes weights as a whole and can't be drawn beside others; serve it as the "
            "model itself, or merge it (dreambooth-sm convert)"
        )
    return layer
