"""An adapter from two whole models: the difference of their weights, by its largest singular values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.layers import LowRank
from dreambooth_sm.errors import UserError
from dreambooth_sm.families import DEFAULT, family_of
from dreambooth_sm.stored.model import StoredModel

# What is computed beside the values that are kept, and how often, for those to be exact (Halko et al. 2011, "Finding
# structure with randomness").
_BESIDE, _ROUNDS = 16, 4
# Tables of embeddings have no low rank that an adapter could be.
_TABLES = ("token_embedding.weight", "position_embedding.weight")


def extract(
    tuned: StoredModel, base: StoredModel, rank: int, progress: Callable[[int], object] = lambda done: None
) -> tuple[Adapter, list[str]]:
    """The LoRA that takes a base model nearest to one that was trained from it, in each layer.

    Args:
        rank: of all layers, or the largest that a smaller layer has.
        progress: is called with the number of weights that have been compared.

    Returns:
        the adapter, and remarks: how much of the difference it keeps, and what it can't.

    Raises:
        UserError: where both are not of one shape, or do not differ.
    """
    parts: dict[str, dict[str, LowRank]] = {}
    whole = kept = 0.0
    others: list[str] = []
    facts = family_of(base.pipeline).facts
    for part in adapted(base):
        if part not in tuned.tensors:
            raise UserError(f"{tuned.name} has no {part}, and {base.name} has; name the base that it was trained from")
        for name, before in base.tensors[part].items():
            after = tuned.tensors[part].get(name)
            if after is None or after.shape != before.shape:
                raise UserError(f"{name} of {part} differs in shape; name the base that {tuned.name} was trained from")
            difference = after.read().float() - before.read().float()
            progress(1)
            size = float(difference.square().sum())
            if not size:
                continue
            whole += size
            if not name.endswith(".weight") or difference.dim() < 2 or name.endswith(_TABLES):
                others.append(f"{part}.{name}")
                continue
            layer = low_rank(difference, rank)
            kept += size - float((difference - layer.change(difference)).square().sum())
            parts.setdefault(part, {})[name.removesuffix(".weight")] = layer
    if not parts:
        raise UserError(f"{tuned.name} and {base.name} do not differ in any layer; there is nothing to extract")
    count = sum(map(len, parts.values()))
    remarks = [
        f"{kept / whole:.1%} of the difference (of its square) is kept, in {count} layers of rank {rank} or less"
    ]
    if others:
        remarks.append(f"{len(others)} tensors that no LoRA has differ as well and are left out, such as {others[0]}")
    rest = [part for part in base.tensors if part not in adapted(base)]
    if changed := [part for part in rest if _differs(tuned, base, part)]:
        remarks.append(f"the {' and the '.join(changed)} differs as well, and no adapter has one")
    return Adapter(parts, family=facts.name if facts.name != DEFAULT else ""), remarks


def adapted(model: StoredModel) -> list[str]:
    """The parts of a model that adapters lie in: the denoiser, and text encoders but for language models."""
    facts = family_of(model.pipeline).facts
    has_text = any(layers.text_encoder for layers in facts.adapted.values())
    return [part for part in facts.parts if part == facts.denoiser or (has_text and part != "vae")]


def _differs(tuned: StoredModel, base: StoredModel, part: str) -> bool:
    one, other = tuned.tensors[part], base.tensors[part]
    return one is not other and any(
        not torch.equal(one[name].read().float(), other[name].read().float()) for name in one if name in other
    )


def low_rank(difference: Tensor, rank: int) -> LowRank:
    """The nearest LoRA to a difference of weights ``(out, in)`` or ``(out, in, height, width)``."""
    flat = difference.flatten(1)
    rank = min(rank, *flat.shape)
    if rank + _BESIDE >= min(flat.shape):
        left, values, right = torch.linalg.svd(flat, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, columns = torch.svd_lowrank(flat, rank + _BESIDE, _ROUNDS)
            right = columns.mT
    root = values[:rank].sqrt()
    kernel = difference.shape[2:]
    down = (root[:, None] * right[:rank]).reshape(rank, difference.shape[1], *kernel)
    return LowRank(down, (left[:, :rank] * root).reshape(-1, rank, *[1] * len(kernel)))
