"""Steps of several shapes on a CUDA device: a graph for each, in one memory pool, with the losses of eager steps."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth_sm.data.assemble import encode_training_set
from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.models import PretrainedModel, load_base
from dreambooth_sm.planning.optimizers import ON_MASTERS
from dreambooth_sm.training.loop import Trainer
from dreambooth_sm.training.schedule import Schedule
from dreambooth_sm.training.step import WARM_UP_STEPS, CapturedStep, Inputs, Step
from tests.helpers.training import SEED, Recorder, attach, cpu_plan, hyperparameters, paint_pictures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 24
SIZES = [(120, 80), (120, 80), (80, 120), (100, 100), (90, 120)]
DEVICE = torch.device("cuda")


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> PretrainedModel:
    return load_base(hyperparameters(pretrained_model_name_or_path=str(tiny_base)))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Five pictures in three shapes."""
    root = tmp_path_factory.mktemp("pictures")
    pictures = [
        path
        for number, size in enumerate(SIZES)
        for path in paint_pictures(root / str(number), 1, size=size, seed=number)
    ]
    return Subject(tuple(pictures), "photo of zwx toy", None, root / "class", ())


FAST: dict[str, Any] = {"precision": "bf16", "weights": "residual", "optimizer": "blockwise", "state_bits": 8}
REFERENCE: dict[str, Any] = {"precision": "bf16", "weights": "fp32", "optimizer": "adamw", "state_bits": 32}
MASTER: dict[str, Any] = {"precision": "bf16", "weights": "master", "optimizer": "adamw", "state_bits": 32}
IN_BACKWARD: dict[str, Any] = {"update_in_backward": True, "max_grad_norm": None}


def make_trainer(
    base: PretrainedModel, subject: Subject, *, graph: bool, parts: int, method: str = "full", **choices: Any
) -> Trainer:
    h = hyperparameters(
        method=method,
        class_prompt="photo of a toy",
        center_crop=False,
        bucket_step=8,
        max_train_steps=STEPS,
        gradient_accumulation_steps=parts,
        pretrained_model_name_or_path="owner/base",
    )
    plan = dataclasses.replace(
        cpu_plan(h),
        device="cuda",
        cuda_graph=graph,
        **choices,
    )
    trainable = attach(copy.deepcopy(base), h, plan)
    return Trainer(
        trainable,
        encode_training_set(trainable.model, (subject,), h, plan, device=DEVICE, seed=SEED),
        plan,
        h,
        Schedule(STEPS, 0, 1e-4),
        device=DEVICE,
        identity={"seed": SEED},
        report=Recorder(),
    )


@pytest.mark.parametrize(
    ("choices", "parts"),
    [
        (FAST | IN_BACKWARD, 1),
        (FAST, 2),
        (REFERENCE, 1),
        (REFERENCE | {"ema": "device"}, 2),
        (REFERENCE | {"precision": "fp16"}, 2),
        (REFERENCE | {"precision": "fp16", "max_grad_norm": None}, 1),
        (REFERENCE | {"precision": "fp32"}, 1),
        (MASTER | {"ema": "device"}, 2),
        (MASTER | {"precision": "fp16"}, 1),
        *((MASTER | {"optimizer": optimizer, "ema": "device"}, 2) for optimizer in ON_MASTERS),
        (MASTER | {"optimizer": "lion", "precision": "fp16", "method": "hypernetwork"}, 1),
        (FAST | {"method": "hypernetwork"}, 1),
        (MASTER | {"method": "hypernetwork", "gradient_checkpointing": True}, 1),
        (FAST | {"method": "hypernetwork", "precision": "fp16", "gradient_checkpointing": True}, 1),
        (REFERENCE | {"method": "hypernetwork", "ema": "device"}, 2),
        (MASTER | {"method": "textual_inversion"}, 2),
        (MASTER | {"method": "textual_inversion", "precision": "fp16", "gradient_checkpointing": True}, 1),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_graphs_of_all_shapes_give_the_losses_of_eager_steps(
    base: PretrainedModel, subject: Subject, choices: dict[str, Any], parts: int
) -> None:
    losses, rates = [], []
    for graph in (False, True):
        trainer = make_trainer(base, subject, graph=graph, parts=parts, **choices)
        step = trainer.make_step
        assert isinstance(step, CapturedStep if graph else Step)
        assert step.shapes == 3
        graphs = []
        for _ in range(STEPS):
            loss = trainer.optimizer_step(1.0 if choices.get("optimizer") == "prodigy" else 1e-4)
            graphs.append(len(step._graphs) if isinstance(step, CapturedStep) else 0)
            losses.append(loss.total.item())
        # Eager until each shape was seen once, then all graphs at once.
        assert set(graphs) == ({0, 3} if graph else {0})
        assert graphs.count(0) >= max(WARM_UP_STEPS, 3) or not graph
        rates.append(float(trainer.updater.optimizer.param_groups[0]["lr"]))
        trainer.finish()
    eager, replayed = losses[:STEPS], losses[STEPS:]
    assert replayed == pytest.approx(eager, rel=2e-3)
    assert rates[0] == rates[1]


@pytest.mark.parametrize("choices", [FAST, MASTER | {"method": "hypernetwork"}], ids=["full", "hypernetwork"])
def test_steps_do_not_wait_for_the_device(base: PretrainedModel, subject: Subject, choices: dict[str, Any]) -> None:
    """The host draws a step while the device computes the one before it."""
    trainer = make_trainer(base, subject, graph=True, parts=2, **choices)
    for _ in range(STEPS // 2):
        trainer.optimizer_step(1e-4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS // 2):
            trainer.optimizer_step(1e-4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_reference_step_follows_its_learning_rate_and_resumes(
    base: PretrainedModel, subject: Subject
) -> None:
    """The rate is read from the device by the graph; a checkpoint of an eager job continues in a captured one."""
    eager, captured = (make_trainer(base, subject, graph=graph, parts=1, **REFERENCE) for graph in (False, True))
    for trainer in (eager, captured):
        for step in range(10):
            trainer.updater.optimizer.param_groups[0]["lr"] = 1e-4 if step < 8 else 0.0
            before = [p.detach().clone() for p in trainer.parameters]
            trainer.make_step(trainer_inputs(trainer, step))
            changed = any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
            assert changed == (step < 8)
    state = eager.state()
    captured.load_state(state, eager.step)
    for trainer in (eager, captured):
        trainer.updater.optimizer.param_groups[0]["lr"] = 1e-4
    losses = [trainer.make_step(trainer_inputs(trainer, 11)).total.item() for trainer in (eager, captured)]
    losses += [trainer.make_step(trainer_inputs(trainer, 12)).total.item() for trainer in (eager, captured)]
    assert losses[1::2] == pytest.approx(losses[::2], rel=2e-3)


def trainer_inputs(trainer: Trainer, number: int) -> list[Inputs]:
    return [trainer._inputs(number)]
