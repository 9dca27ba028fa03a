"""Masters of 16-bit weights on a CUDA device: under a graph as without one, and nothing waits for the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dreambooth_sm.training.optimizers import make_updater
from dreambooth_sm.training.updater import Updater
from tests.helpers.training import cpu_plan, hyperparameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# As many as an adapter has, small and of odd sizes.
SHAPES = [(16, 320), (320, 16), (7,), (16, 4, 3, 3)] * 60


def make(precision: str, x: Tensor) -> tuple[list[nn.Parameter], Updater, Callable[[], None]]:
    """Weights, their updater, and a step towards ``x``."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape).to("cuda", DTYPES[precision])) for shape in SHAPES]
    changes = {"device": "cuda", "precision": precision, "weights": "master", "max_grad_norm": 0.5}
    plan = dataclasses.replace(cpu_plan(hyperparameters()), **changes)  # type: ignore[arg-type]
    updater = make_updater([weights[::2], weights[1::2]], plan, OPTIONS, 0)

    def body() -> None:
        loss = torch.stack([(weight.float() - x).square().mean() for weight in weights]).sum()
        updater.scale(loss).backward()
        updater.update()

    return weights, updater, body


@pytest.mark.parametrize("precision", DTYPES)
def test_graph_replays_what_eager_steps_do(precision: str) -> None:
    """Learning rates change between the replays; with fp16 one step has a loss that is not finite, and is skipped."""

    def run(graph: bool) -> list[Tensor]:
        x = torch.zeros((), device="cuda")
        weights, updater, body = make(precision, x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        captured = None
        skipped = []
        for step in range(8):
            for factor, group in enumerate(updater.optimizer.param_groups, start=1):
                group["lr"] = factor * 1e-3 / (step + 1)
            with torch.cuda.stream(stream):
                x.fill_(float("nan") if precision == "fp16" and step == 6 else 0.1 * step)
                updater.prepare_step()
                if graph and step >= 3:
                    if captured is None:
                        captured = torch.cuda.CUDAGraph()
                        updater.prepare_capture()
                        with torch.cuda.graph(captured, stream=stream):
                            body()
                    captured.replay()
                else:
                    body()
            torch.cuda.current_stream().wait_stream(stream)
            skipped.append(updater.skipped())
        assert skipped[6:] == [precision == "fp16", False]
        assert all(torch.equal(weight, updater.read(weight).to(weight.dtype)) for weight in weights)
        return [updater.read(weight).clone() for weight in weights]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


@pytest.mark.parametrize("precision", DTYPES)
def test_nothing_waits_for_the_device(precision: str) -> None:
    _, updater, body = make(precision, torch.ones((), device="cuda"))
    updater.prepare_step()
    body()
    torch.cuda.set_sync_debug_mode("error")
    try:
        updater.prepare_step()
        body()
    finally:
        torch.cuda.set_sync_debug_mode("default")
