"""Attention in a training step: gradients as its kernels get them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.training.attention import attention_context, gradients_as_results_lie, leave_out_rescaling
from tests.helpers.training import Run


def gradients(device: str, kind: torch.dtype, *, tokens: int, heads: int, width: int, first: bool) -> list[Tensor]:
    """Of queries, keys and values of two attentions one after the other; the result of one is put beside others.

    Args:
        first: whether that one's gradient comes first in the backward pass.
    """
    random = torch.Generator().manual_seed(0)
    size = (1, tokens, heads, width)
    inputs = [
        torch.randn(size, generator=random).to(device, kind).transpose(1, 2).detach().requires_grad_() for _ in range(5)
    ]
    beside = torch.randn(1, tokens, 4 * heads * width, generator=random).to(device, kind).requires_grad_()
    attention = torch.nn.functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, joined: bool) -> Tensor:
        result = attention(query, key, value).transpose(1, 2).flatten(2)
        return torch.cat([result, beside], dim=-1) if joined else result

    earlier = attend(*inputs[:3], joined=not first)
    query = earlier[..., : heads * width].unflatten(-1, (heads, width)).transpose(1, 2)
    later = attend(query, *inputs[3:], joined=first)
    weights = torch.randn(later.shape, generator=random).to(device, kind)
    (later * weights).sum().backward()
    return [each.grad for each in inputs if each.grad is not None]


@pytest.fixture
def strides(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of each result of attention, and of its gradient as its backward pass gets it."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def noted(*args: Any, **options: Any) -> Tensor:
        result = plain(*args, **options)
        if result.grad_fn is not None:
            result.grad_fn.register_prehook(lambda grads: found.append((result.stride(), grads[0].stride())))
        return result

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    return found


@pytest.mark.parametrize("first", [True, False])
def test_gradients_lie_as_results_do(first: bool, strides: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    plain = gradients("cpu", torch.float32, tokens=6, heads=2, width=8, first=first)
    assert any(result != grad for result, grad in strides)
    strides.clear()
    with gradients_as_results_lie():
        found = gradients("cpu", torch.float32, tokens=6, heads=2, width=8, first=first)
    assert len(strides) == 2
    assert all(result == grad for result, grad in strides)
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_so_they_do_in_a_step_on_a_card(
    loaded_flux1: PretrainedModel, tmp_path: Path, strides: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    """Of a model whose blocks put attention beside a feed-forward layer, also where it is computed again."""
    usual = {"method": "lora", "base_architecture": "flux1", "max_train_steps": 1, "gradient_checkpointing": True}
    run = Run(copy.deepcopy(loaded_flux1), tmp_path, **usual)
    on_card = attention_context(run.plan, run.base.denoiser, torch.device("cuda"), pytest.fail)
    run.trainer.make_step._attention = on_card
    run.train()
    assert strides
    assert all(result == grad for result, grad in strides)


class Divisions(TorchDispatchMode):
    """Counts them, of activations."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "aten.div" in str(function) and args[0].dim() == 3
        return function(*args, **(kwargs or {}))


def test_attention_without_its_rescaling_is_the_same_to_the_bit(base: PretrainedModel) -> None:
    """With masks as well, which the library's own attention computes."""
    random = torch.Generator().manual_seed(0)
    sample, states = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 7, 32, generator=random)
    states = states[..., : base.unet.config.cross_attention_dim]
    given: dict[str, Any] = {"sample": sample, "timestep": torch.tensor([3, 700]), "encoder_hidden_states": states}
    found = []
    for change in (False, True):
        unet = copy.deepcopy(base.unet).requires_grad_(True)
        if change:
            leave_out_rescaling(unet)
        with Divisions() as divisions:
            made = unet(**given).sample
        made.square().mean().backward()
        masked = unet(**given, encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0, 0]] * 2).bool()).sample
        found.append([made, masked, *(parameter.grad for parameter in unet.parameters())])
        assert (divisions.count == 0) == change
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.equal(found[0][0], found[0][1])
