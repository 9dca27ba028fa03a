"""Steps of several shapes on a CUDA device: a graph for each, in one memory pool, with the losses of eager steps."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.job import encode_training_set
from dreambooth_sm.models import BaseModel, load_base
from dreambooth_sm.training.loop import Schedule, Trainer
from dreambooth_sm.training.step import WARM_UP_STEPS, FastStep
from tests.helpers.training import SEED, Recorder, cpu_plan, hyperparameters, paint_pictures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 24
SIZES = [(120, 80), (120, 80), (80, 120), (100, 100), (90, 120)]
DEVICE = torch.device("cuda")


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> BaseModel:
    return load_base(hyperparameters(pretrained_model_name_or_path=str(tiny_base)))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Five pictures in four shapes."""
    root = tmp_path_factory.mktemp("pictures")
    pictures = [
        path
        for number, size in enumerate(SIZES)
        for path in paint_pictures(root / str(number), 1, size=size, seed=number)
    ]
    return Subject(tuple(pictures), "photo of zwx toy", None, root / "class", ())


def trained(base: BaseModel, subject: Subject, root: Path, *, graph: bool, in_backward: bool, parts: int) -> Trainer:
    h = hyperparameters(
        center_crop=False,
        bucket_step=8,
        max_train_steps=STEPS,
        gradient_accumulation_steps=parts,
        pretrained_model_name_or_path="base",
    )
    plan = dataclasses.replace(
        cpu_plan(h),
        device="cuda",
        precision="bf16",
        weights="residual",
        optimizer="blockwise",
        state_bits=8,
        update_in_backward=in_backward,
        max_grad_norm=None if in_backward else 1.0,
        cuda_graph=graph,
    )
    own = copy.deepcopy(base)
    return Trainer(
        own,
        encode_training_set(own, (subject,), h, plan, device=DEVICE, seed=SEED),
        plan,
        h,
        Schedule(STEPS, 0, 1e-4),
        device=DEVICE,
        identity={"seed": SEED},
        report=Recorder(),
    )


@pytest.mark.parametrize(("in_backward", "parts"), [(True, 1), (False, 2)])
def test_graphs_of_all_shapes_give_the_losses_of_eager_steps(
    base: BaseModel, subject: Subject, tmp_path: Path, in_backward: bool, parts: int
) -> None:
    losses = []
    for graph in (False, True):
        trainer = trained(base, subject, tmp_path, graph=graph, in_backward=in_backward, parts=parts)
        step = trainer.make_step
        assert isinstance(step, FastStep)
        assert step.shapes == 4
        graphs = []
        for _ in range(STEPS):
            loss = trainer.optimizer_step(1e-4)
            graphs.append(len(step._graphs))
            losses.append(loss.total.item())
        # Eager until each shape was seen once, then all graphs at once.
        assert set(graphs) == ({0, 4} if graph else {0})
        assert graphs.count(0) >= max(WARM_UP_STEPS, 4) or not graph
        trainer.finish()
    eager, replayed = losses[:STEPS], losses[STEPS:]
    assert replayed == pytest.approx(eager, rel=2e-3)
