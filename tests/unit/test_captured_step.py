"""What a captured step does around its graphs, on the CPU: updates that can't be captured follow each replay."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.training import loop
from dreambooth_sm.training.step import WARM_UP_STEPS, CapturedStep
from dreambooth_sm.training.train import Bench
from tests.helpers.training import Run, paint_pictures, same

VALUES: dict[str, Any] = {"method": "hypernetwork", "max_train_steps": 6, "center_crop": False, "bucket_step": 8}

# What a step computes beside its forward pass, of its own rows.
MASKED: dict[str, Any] = {
    "method": "lora",
    "prior": "dco",
    "lora_dropout": 0.2,
    "lora_min_rank": 2,
    "distance_penalty": 0.1,
    "learning_rate": 1e-3,
}


class Graph:
    """Computes once more what was captured, into the same tensors, as a replay does."""

    def __init__(self, step: CapturedStep, shape: torch.Size, written: list[Tensor]) -> None:
        self.step, self.shape, self.written = step, shape, written

    def replay(self) -> None:
        parameters = self.step.updater.parameters
        assert all(parameter.grad is None for parameter in parameters)
        loss = self.step._backward(self.step._inputs[self.shape])
        for old, new in zip(self.written, [loss.total, loss.instance, *(p.grad for p in parameters)], strict=True):
            old.copy_(new)
        self.step.updater.drop_gradients()


class StepWithoutCard(CapturedStep):
    def _capture(self) -> None:
        super()._capture()
        for shape, (_, loss) in self._graphs.items():
            self._graphs[shape] = Graph(self, shape, [loss.total, loss.instance, *self._gradients[shape]]), loss


@pytest.fixture
def _no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    for name in ("synchronize", "empty_cache", "graph_pool_handle", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(loop, "CapturedStep", StepWithoutCard)


@pytest.mark.usefixtures("_no_card")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "parts", "values"),
    [("lion", 1, VALUES), ("schedule_free", 2, VALUES), ("lion", 2, VALUES | MASKED)],
    ids=["lion", "schedule_free", "masked"],
)
def test_an_update_follows_the_graph(
    base: PretrainedModel, tmp_path: Path, optimizer: str, parts: int, values: dict[str, Any]
) -> None:
    """To the bit as without one, with pictures of two shapes, an average, and masters."""
    sizes = [(120, 80), (80, 120), (120, 80)]
    pictures = [paint_pictures(tmp_path / str(n), 1, size=size, seed=n)[0] for n, size in enumerate(sizes)]
    subject = Subject(tuple(pictures), "photo of zwx toy", None, tmp_path / "class", ())
    plan = {"precision": "bf16", "weights": "master", "optimizer": optimizer, "ema": "device"}
    runs = [
        Run(
            base,
            tmp_path,
            subject=subject,
            plan=plan | {"cuda_graph": graph},
            gradient_accumulation_steps=parts,
            **values,
        )
        for graph in (False, True)
    ]
    eager, captured = (run.train() for run in runs)
    assert captured.losses == eager.losses
    assert same(*({name: p.detach() for name, p in run.trainable.parameters.items()} for run in (eager, captured)))
    step = captured.trainer.make_step
    assert isinstance(step, StepWithoutCard)
    assert step._eager_steps == WARM_UP_STEPS


@pytest.mark.usefixtures("_no_card")
@pytest.mark.slow
def test_graphs_serve_for_later_trainings_of_the_same_shapes(base: PretrainedModel, tmp_path: Path) -> None:
    """And are made again where a shape is new; to the bit as without them."""
    wide, tall = (120, 80), (80, 120)
    subjects = [
        Subject(tuple(paint_pictures(tmp_path / str(n), 2, size=size, seed=n)), "zwx", None, tmp_path / "class", ())
        for n, size in enumerate([wide, wide, tall])
    ]
    values = VALUES | {"method": "lora", "learning_rate": 1e-2, "max_train_steps": WARM_UP_STEPS + 2}
    plan = {"precision": "bf16", "weights": "master", "optimizer": "lion"}
    runs, alone = (
        [Run(base, tmp_path / name, subject=each, plan=plan | {"cuda_graph": graph}, **values) for each in subjects]
        for name, graph in (("graphs", True), ("eager", False))
    )
    begins = [runs[0].trainer.updater.read(p).clone() for p in runs[0].trainer.parameters]
    bench, graphs = Bench(), []
    for run in runs:
        for parameter, value in zip(runs[0].trainable.parameters.values(), begins, strict=True):
            parameter.data = value
        runs[0].train_on(bench, run)
        assert bench._trainer is not None
        step = bench._trainer.make_step
        assert isinstance(step, StepWithoutCard)
        graphs.append(dict(step._graphs))
    assert graphs[0] == graphs[1]
    assert len(graphs[1]) == len(graphs[2]) == 1
    assert not graphs[1].keys() & graphs[2].keys()
    assert [run.losses for run in runs] == [run.train().losses for run in alone]
