"""Recomputed activations give the same loss and gradients as kept ones, and are fewer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from dreambooth_sm.training.recomputation import checkpoint_activations, recompute_gates


def unet(**options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        **options,
    ).train()


def loss_and_saved_bytes(model: UNet2DConditionModel, side: int = 16) -> tuple[torch.Tensor, int]:
    """The loss, after its backward pass, and the bytes that autograd kept for it beside the parameters."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, side, side, generator=generator)
    prompts = torch.randn(2, 7, 32, generator=generator)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(sample, torch.tensor([3, 700]), prompts, return_dict=False)[0].square().mean()
    loss.backward()
    return loss.detach(), sum(kept.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "side", "share"),
    [
        ({}, 16, 0.5),
        ({}, 18, 0.5),  # no multiple of the UNet's scale: the up blocks are told their size
        ({"use_linear_projection": True}, 16, 0.5),
        ({"transformer_layers_per_block": 2, "layers_per_block": 1}, 16, 0.5),
        ({"transformer_layers_per_block": (1, 4, 1), "layers_per_block": 1}, 16, 0.7),
    ],
    ids=["sd1", "odd size", "sd2", "two transformer layers", "units of their own"],
)
def test_same_gradients_and_less_memory(options: dict[str, Any], side: int, share: float) -> None:
    plain = unet(**options)
    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    checkpoint_activations(ours)
    theirs.enable_gradient_checkpointing()
    expected, everything = loss_and_saved_bytes(plain, side)
    loss, kept = loss_and_saved_bytes(ours, side)
    _, diffusers_kept = loss_and_saved_bytes(theirs, side)
    assert torch.equal(loss, expected)
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-8, msg=name)
    assert kept < share * diffusers_kept < share * everything


def test_without_gradients_nothing_is_recomputed() -> None:
    model = unet()
    with torch.no_grad():
        expected = model(torch.ones(1, 4, 16, 16), 5, torch.ones(1, 7, 32)).sample
        checkpoint_activations(model)
        assert torch.equal(model(torch.ones(1, 4, 16, 16), 5, torch.ones(1, 7, 32)).sample, expected)


@pytest.mark.slow
def test_gates_are_recomputed_with_the_same_gradients() -> None:
    plain = unet()
    ours = copy.deepcopy(plain)
    recompute_gates(ours)
    expected, everything = loss_and_saved_bytes(plain)
    loss, kept = loss_and_saved_bytes(ours)
    assert torch.equal(loss, expected)
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-8, msg=name)
    assert kept < 0.95 * everything


def test_gates_have_the_derivatives_of_their_definition() -> None:
    model = unet().double()
    recompute_gates(model)
    layer = next(module for module in model.modules() if type(module).__name__ == "GEGLU")
    assert torch.autograd.gradcheck(
        layer, torch.randn(3, layer.proj.in_features, dtype=torch.float64, requires_grad=True)
    )
