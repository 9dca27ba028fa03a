"""Shapes that are found at once are those that torch finds, and what does not fit is refused as torch refuses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dreambooth_sm.stored.quick_shapes import QuickShapes


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


FITTING: dict[str, Callable[[], Tensor]] = {
    "linear": lambda: F.linear(meta(2, 5, 8), meta(3, 8), meta(3)),
    "linear of a vector": lambda: F.linear(meta(8), meta(3, 8)),
    "layer_norm": lambda: F.layer_norm(meta(2, 5, 8), (5, 8), meta(5, 8), meta(5, 8)),
    "group_norm": lambda: F.group_norm(meta(1, 8, 4, 4), 2, meta(8), meta(8), 1e-6),
    "attention": lambda: F.scaled_dot_product_attention(meta(1, 2, 7, 8), meta(1, 2, 5, 8), meta(1, 2, 5, 6)),
    "causal": lambda: F.scaled_dot_product_attention(*[meta(1, 2, 7, 8)] * 3, is_causal=True, scale=0.5),
}
OTHERS: dict[str, Callable[[], Tensor]] = {
    "linear: width": lambda: F.linear(meta(2, 7), meta(3, 8), meta(3)),
    "linear: bias": lambda: F.linear(meta(2, 8), meta(3, 8), meta(4)),
    "linear: types": lambda: F.linear(meta(2, 8), meta(3, 8, dtype=torch.float16)),
    "layer_norm: shape": lambda: F.layer_norm(meta(2, 5, 8), (6,), meta(6), meta(6)),
    "layer_norm: weight": lambda: F.layer_norm(meta(2, 5, 8), (8,), meta(7)),
    "layer_norm: eps": lambda: F.layer_norm(meta(2, 5, 8), (8,), eps=cast(Any, None)),
    "layer_norm: integers": lambda: F.layer_norm(meta(2, 8, dtype=torch.int64), (8,)),
    "group_norm: eps": lambda: F.group_norm(meta(1, 8, 4, 4), 2, eps=cast(Any, "small")),
    "group_norm: no groups": lambda: F.group_norm(meta(1, 8, 4, 4), 0),
    "group_norm: negative": lambda: F.group_norm(meta(1, 8, 4, 4), -2),
    "group_norm: groups": lambda: F.group_norm(meta(1, 8, 4, 4), 3, meta(8), meta(8)),
    "group_norm: weight": lambda: F.group_norm(meta(1, 8, 4, 4), 2, meta(4), meta(8)),
    "group_norm: one value": lambda: F.group_norm(meta(1, 8, 1, 1), 8),
    "attention: width": lambda: F.scaled_dot_product_attention(meta(1, 2, 7, 8), meta(1, 2, 5, 9), meta(1, 2, 5, 9)),
    "attention: values": lambda: F.scaled_dot_product_attention(meta(1, 2, 7, 8), meta(1, 2, 5, 8), meta(1, 2, 6, 8)),
    "attention: mask": lambda: F.scaled_dot_product_attention(*[meta(1, 2, 7, 8)] * 3, attn_mask=meta(7, 6)),
    "attention: scale": lambda: F.scaled_dot_product_attention(*[meta(1, 2, 7, 8)] * 3, scale=cast(Any, "half")),
    "attention: causal": lambda: F.scaled_dot_product_attention(*[meta(1, 2, 7, 8)] * 3, is_causal=cast(Any, None)),
    "attention: dropout": lambda: F.scaled_dot_product_attention(*[meta(1, 2, 7, 8)] * 3, dropout_p=cast(Any, None)),
    "attention: one head of keys": lambda: F.scaled_dot_product_attention(
        meta(1, 2, 7, 8), meta(1, 1, 5, 8), meta(1, 1, 5, 8), enable_gqa=True
    ),
}


def told(compute: Callable[[], Tensor]) -> Any:
    try:
        found = compute()
    except Exception as error:
        return type(error), str(error)
    return found.shape, found.dtype, found.device


class Computed(TorchDispatchMode):
    """Keeps the names of what torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FITTING)
def test_what_fits_is_answered_at_once(name: str) -> None:
    wanted = told(FITTING[name])
    with Computed() as computed, QuickShapes():
        assert told(FITTING[name]) == wanted
    assert computed.names <= {"empty", "empty_like", "new_empty"} | {"empty.memory_format"}


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_plainly_fit_is_left_to_torch(name: str) -> None:
    wanted = told(OTHERS[name])
    with QuickShapes():
        assert told(OTHERS[name]) == wanted
