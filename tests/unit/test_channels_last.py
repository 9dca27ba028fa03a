"""A UNet that keeps channels_last computes what it did, and copies no image into another layout."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dreambooth_sm.training import channels_last, group_norm
from dreambooth_sm.training.channels_last import keep_channels_last
from dreambooth_sm.training.placement import speed_up
from dreambooth_sm.training.quantised import QuantisedConv2d, QuantisedLayer, quantise_layers
from dreambooth_sm.training.recomputation import checkpoint_activations
from tests.helpers.training import cpu_plan, hyperparameters


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout decides who serves, as it does there; the reference stands for the kernels."""

    def serve(x: Tensor, *_: Any) -> bool:
        return x.is_contiguous(memory_format=torch.channels_last)

    for module in (group_norm, channels_last):
        monkeypatch.setattr(module, "serves", serve)


def unet(**options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
    }
    model = UNet2DConditionModel(**shape | options)
    return model.to(memory_format=torch.channels_last).train()


def prediction(model: UNet2DConditionModel, layout: torch.memory_format = torch.channels_last) -> Tensor:
    random = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 12, generator=random).contiguous(memory_format=layout)
    result: Tensor = model(sample, torch.tensor([3, 700]), torch.randn(2, 7, 16, generator=random), return_dict=False)[
        0
    ]
    return result


class Layouts(TorchDispatchMode):
    """Counts copies of images, and keeps the names of operations that make images in another layout."""

    copies = 0
    strange: list[str]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = str(function)
        if isinstance(result, Tensor) and result.dim() == 4 and result.shape[1] > 4:  # not latents
            self.copies += "clone" in name
            if any(kind in name for kind in ("convolution", "add", "cat", "clone", "upsample")):
                self.strange += [name] * (not result.is_contiguous(memory_format=torch.channels_last))
        return result

    def __enter__(self) -> Layouts:
        self.strange = []
        super().__enter__()
        return self


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("linear", [False, True], ids=["sd1", "sdxl"])
def test_same_loss_and_gradients(linear: bool, checkpointing: bool) -> None:
    plain = unet(use_linear_projection=linear)
    ours = copy.deepcopy(plain)
    keep_channels_last(ours)
    if checkpointing:
        checkpoint_activations(ours)
    results = [prediction(model) for model in (plain, ours)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    for result in results:
        result.square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("linear", [False, True], ids=["sd1", "sdxl"])
def test_layers_in_fewer_bits_take_the_same_ways(linear: bool) -> None:
    """Prediction and gradient are those of a UNet that is made of the values that codes stand for."""
    coded = unet(use_linear_projection=linear, block_out_channels=(32, 64), time_embedding_dim=64).requires_grad_(False)
    quantise_layers(coded, "int8", torch.float32, torch.device("cpu"))
    whole = unet(use_linear_projection=linear, block_out_channels=(32, 64), time_embedding_dim=64).requires_grad_(False)
    modules = dict(coded.named_modules())
    for name, module in whole.named_modules():
        if isinstance(modules[name], QuantisedLayer):
            module.weight.data = modules[name].weight
    assert sum(type(module) is QuantisedConv2d for module in coded.modules()) > 5
    results = []
    for model in (whole, coded):
        model.conv_in.requires_grad_(True)
        keep_channels_last(model)
        result = prediction(model)
        result.square().mean().backward()
        results.append([result, model.conv_in.weight.grad])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("coded", [False, True], ids=["whole", "coded"])
@pytest.mark.parametrize("linear", [False, True], ids=["sd1", "sdxl"])
def test_no_image_is_copied_but_gradients_of_concatenations(
    linear: bool, coded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_norm, "reference_forward", kernel_like_forward)
    monkeypatch.setattr(group_norm, "reference_backward", lambda grad, *_: (grad.clone(), None, None, None))
    model = unet(use_linear_projection=linear, block_out_channels=(32, 64)).requires_grad_(False)
    if coded:
        quantise_layers(model, "nf4", torch.float32, torch.device("cpu"))
    model.conv_in.requires_grad_(True)
    keep_channels_last(model)
    with Layouts() as layouts:
        prediction(model).square().mean().backward()
    assert layouts.strange == []
    norms = 2 * sum(type(module).__name__ == "ResnetBlock2D" for module in model.modules()) + 1
    norms += sum(type(module).__name__ == "Transformer2DModel" for module in model.modules())
    # What comes into the four concatenations of the up blocks from a block before; one is an upsampler's.
    assert layouts.copies - norms == 3


def kernel_like_forward(x: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Like the kernels, makes nothing but its result in one operation."""
    return torch.empty_like(x).copy_(x), x.new_zeros(len(x), more[4]), x.new_ones(len(x), more[4])


def test_images_in_another_layout_are_right_as_well() -> None:
    plain = unet().to(memory_format=torch.contiguous_format)
    ours = copy.deepcopy(plain)
    keep_channels_last(ours)
    layout = torch.contiguous_format
    with torch.no_grad():
        torch.testing.assert_close(prediction(ours, layout), prediction(plain, layout), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_vae_draws_the_same_by_these_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the one of its attention, which sees tokens."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(16, 32), norm_num_groups=4, latent_channels=4)
    vae.requires_grad_(False).eval()
    latents, picture = torch.randn(2, 4, 6, 5), torch.randn(2, 3, 12, 10)
    before = vae.decode(latents).sample, vae.encode(picture).latent_dist.mean
    vae.to(memory_format=torch.channels_last)
    keep_channels_last(vae)
    normed: list[int] = []
    forward = group_norm.reference_forward
    monkeypatch.setattr(
        group_norm, "reference_forward", lambda x, *rest: normed.append(x.shape[1]) or forward(x, *rest)
    )
    after = vae.decode(latents).sample, vae.encode(picture).latent_dist.mean
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    norms = [name for name, module in vae.named_modules() if type(module) is torch.nn.GroupNorm]
    assert len(normed) == len([name for name in norms if "attentions" not in name])


@torch.no_grad()
def test_one_picture_keeps_the_layout_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its strides leave open what it is in: torch's upsampling then takes it for the other layout."""
    monkeypatch.setattr(group_norm, "reference_forward", kernel_like_forward)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(16, 32), norm_num_groups=4, latent_channels=4)
    vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)
    keep_channels_last(vae)
    with Layouts() as layouts:
        assert vae.decode(torch.randn(1, 4, 6, 5)).sample.is_contiguous(memory_format=torch.channels_last)
    assert layouts.strange == []


def test_copies_compute_with_their_own_modules() -> None:
    """A second time changes nothing; state and names are what they were."""
    model = unet()
    names = set(model.state_dict())
    with torch.no_grad():
        expected = prediction(model)
        for _ in range(2):
            keep_channels_last(model)
        torch.testing.assert_close(prediction(model), expected, rtol=1e-5, atol=1e-5)
        around_the_same = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})
        of_its_own = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert not prediction(around_the_same).any()
        torch.testing.assert_close(prediction(of_its_own), expected, rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == set(of_its_own.state_dict()) == names


@pytest.mark.parametrize(
    ("changes", "installed"),
    [
        ({}, False),
        ({"channels_last": True}, False),
        ({"channels_last": True, "device": "cuda"}, True),
        ({"device": "cuda"}, False),
        ({"channels_last": True, "device": "cuda", "compile": True}, False),
    ],
)
def test_only_for_channels_last_on_cuda(
    changes: dict[str, Any], installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    model = unet()
    speed_up(model, dataclasses.replace(cpu_plan(hyperparameters()), **changes))
    assert ("forward" in vars(model.mid_block.resnets[0])) == installed
    assert (type(model.conv_act) is torch.nn.Identity) == installed
