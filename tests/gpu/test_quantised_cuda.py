"""Frozen layers in 8 and 4 bits on a CUDA device: the kernel is the definition, and steps are captured with them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from dreambooth_sm.adapters.peft_layers import inject, parameters_of
from dreambooth_sm.training import quantised
from dreambooth_sm.training.quantised import CodeKind, QuantisedConv2d, dequantised, quantise, quantise_layers
from tests.helpers.training import hyperparameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(320, 768), (50, 192), (10240, 1280), (32, 66)])
def test_values_are_those_of_the_cpu(
    dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for kind in ("int8", "nf4"):
        codes, scales = quantise(weight, kind, dtype)
        found_codes, found_scales = (tensor.cpu() for tensor in quantise(weight.to(CUDA), kind, dtype))
        torch.testing.assert_close(found_scales, scales)
        assert (found_codes != codes).float().mean() < 1e-4  # divisions round otherwise, between two codes
        found = dequantised(codes.to(CUDA), scales.to(CUDA)).cpu()
        assert torch.equal(found, dequantised(codes, scales))
        assert quantised._kernels(CUDA) is not None
        with monkeypatch.context() as without:
            without.setattr(quantised, "_kernels", lambda device: None)
            assert torch.equal(dequantised(codes.to(CUDA), scales.to(CUDA)).cpu(), found)


@pytest.mark.parametrize(("kind", "variant"), itertools.product(["int8", "nf4"], ["lora", "dora", "lokr", "oft"]))
def test_graph_replays_what_eager_steps_compute(kind: CodeKind, variant: str) -> None:
    """Layers that wait for the device can't be captured."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(320, 640), nn.GELU(), nn.Linear(640, 320, bias=False)).to(torch.bfloat16)
    module.requires_grad_(False)
    quantise_layers(module, kind, torch.bfloat16, CUDA)
    inject(module, hyperparameters(method="lora", lora_rank=16, lora_variant=variant), ("0", "2"))
    module.to(CUDA, torch.bfloat16)
    parameters = list(parameters_of(module).values())
    for parameter in parameters:
        parameter.requires_grad_()
        nn.init.normal_(parameter, std=0.02)
    states = torch.randn(2, 77, 320, device=CUDA, dtype=torch.bfloat16, requires_grad=True)

    def step() -> list[Tensor]:
        result = module(states)
        return [result.detach(), *torch.autograd.grad(result.float().square().mean(), [states, *parameters])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
    with torch.no_grad():
        states.copy_(torch.randn_like(states))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, step(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("options", [{}, {"kernel_size": 1, "padding": 0}, {"stride": 2}])
def test_convolutions_in_channels_last(kind: CodeKind, options: dict[str, int]) -> None:
    """Those of a layer with the values that the codes stand for; in a graph as well."""
    torch.manual_seed(0)
    conv = nn.Conv2d(320, 640, **{"kernel_size": 3, "padding": 1} | options).requires_grad_(False)
    module = nn.Sequential(conv)
    quantise_layers(module, kind, torch.bfloat16, CUDA)
    module.to(CUDA, torch.bfloat16)
    assert type(module[0]) is QuantisedConv2d
    whole = conv.to(CUDA, torch.bfloat16, memory_format=torch.channels_last)
    whole.weight.data = module[0].weight
    image = torch.randn(2, 320, 24, 16, device=CUDA, dtype=torch.bfloat16)
    image = image.to(memory_format=torch.channels_last).requires_grad_()
    found = []
    for layer in (whole, module[0]):

        def step(layer: nn.Module = layer) -> list[Tensor]:
            result = layer(image)
            return [result.detach(), *torch.autograd.grad(result.float().square().mean(), [image])]

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        graph.replay()
        torch.cuda.synchronize()
        assert captured[0].is_contiguous(memory_format=torch.channels_last)
        found.append([tensor.clone() for tensor in captured])
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-4)
