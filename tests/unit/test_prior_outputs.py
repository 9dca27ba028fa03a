"""prior=output: the base model's own predictions stand in for class images."""

from __future__ import annotations

import copy
import io
import threading
from pathlib import Path

import pytest
import torch

from dreambooth_sm.data.assemble import encode_training_set
from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.objectives import Diffusion
from dreambooth_sm.planning.cards import find_card
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.planning.memory import OUTPUTS_PER_IMAGE
from dreambooth_sm.report import Reporter
from dreambooth_sm.training.loop import Trainer, TrainingSet
from dreambooth_sm.training.schedule import Schedule
from tests.helpers.training import CPU, SEED, attach, cpu_plan, hyperparameters, paint_pictures

VALUES = {"prior": "output", "class_prompt": "photo of a toy", "with_prior_preservation": True, "num_class_images": 2}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_latents_and_noise_explain_what_was_seen_and_said(prediction_type: str) -> None:
    generator = torch.Generator().manual_seed(0)
    seen, prediction = (torch.randn(5, 4, 8, 8, generator=generator) for _ in range(2))
    objective, times = Diffusion(prediction_type, torch.tensor([0.999, 0.9, 0.5, 0.1, 0.005])), torch.arange(5)
    latents, noise = objective.invert(seen, prediction, times)
    assert torch.allclose(objective.noised(latents, noise, times), seen, atol=1e-4)
    assert torch.allclose(objective.target(latents, noise, times), prediction, atol=1e-4)


def subject_in(root: Path, pictures: int, size: tuple[int, int] = (80, 64)) -> Subject:
    paths = tuple(paint_pictures(root / "instance", pictures, size=size, seed=1))
    return Subject(paths, "photo of zwx toy", "photo of a toy", root / "class", ())


def training_set(base: PretrainedModel, root: Path, **values: object) -> TrainingSet:
    h = hyperparameters(**(VALUES | values))
    subject = subject_in(root, 3)
    return encode_training_set(base, (subject,), h, cpu_plan(h), device=CPU, seed=SEED)


def trainer(base: PretrainedModel, root: Path, **values: object) -> Trainer:
    h = hyperparameters(**(VALUES | values))
    return Trainer(
        attach(base, h, cpu_plan(h)),
        training_set(base, root, **values),
        cpu_plan(h),
        h,
        Schedule(4, 0, h.learning_rate),
        device=CPU,
        identity={"seed": SEED},
        report=Reporter(io.StringIO()),
    )


def test_the_untrained_model_has_no_prior_loss(base: PretrainedModel, tmp_path: Path) -> None:
    """What is kept is what the base model says: before the first update there is nothing to correct."""
    first = trainer(copy.deepcopy(base), tmp_path).optimizer_step(0.0)
    assert first.prior is not None
    assert float(first.prior) < 1e-6 < float(first.instance)


@pytest.mark.slow
def test_it_pulls_back_what_drifts(base: PretrainedModel, tmp_path: Path) -> None:
    def drift(weight: float) -> float:
        made = trainer(copy.deepcopy(base), tmp_path / str(weight), prior_loss_weight=weight, learning_rate=1e-3)
        for _ in range(12):
            loss = made.optimizer_step(1e-3)
        assert loss.prior is not None
        return float(loss.prior)

    assert drift(5.0) < 0.7 * drift(0.0)


@pytest.mark.slow
def test_outputs_repeat_for_a_seed(base: PretrainedModel, tmp_path: Path) -> None:
    one, other = (training_set(copy.deepcopy(base), tmp_path / name) for name in ("one", "other"))
    assert len(one.batch_sampler.classes) >= OUTPUTS_PER_IMAGE * VALUES["num_class_images"]  # type: ignore[operator]
    batches = [data.batch_sampler.batch(3, 2) for data in (one, other)]
    assert torch.equal(batches[0].noise, batches[1].noise)
    assert torch.equal(one.latents(batches[0]), other.latents(batches[1]))
    assert {sample.timestep for sample in one.batch_sampler.classes} <= set(range(1000))


@pytest.mark.slow
def test_every_shape_has_outputs(base: PretrainedModel, tmp_path: Path) -> None:
    h = hyperparameters(**VALUES, center_crop=False, aspect_ratio_buckets=True, bucket_step=8)
    wide = subject_in(tmp_path, 2, (192, 96))
    tall = subject_in(tmp_path / "tall", 2, (96, 192))
    data = encode_training_set(base, (wide, tall), h, cpu_plan(h), device=CPU, seed=SEED)
    assert len(data.batch_sampler.shapes) == 2
    assert {sample.shape for sample in data.batch_sampler.classes} == set(data.batch_sampler.shapes)
    for number in range(4):
        assert data.latents(data.batch_sampler.batch(number, 1)).shape[0] == 2


@pytest.mark.slow
def test_masks_weigh_the_subject_alone(base: PretrainedModel, tmp_path: Path) -> None:
    data = training_set(base, tmp_path, background_weight=0.5)
    assert data.weights is not None
    weights = data.weights(data.batch_sampler.batch(0, 1))
    assert torch.equal(weights[1], torch.ones_like(weights[1]))


def test_the_plan_counts_them() -> None:
    prompts = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy", "num_class_images": 200}
    images, outputs = (
        make_plan(Hyperparameters.parse({**prompts, "prior": prior}), find_card("T4")) for prior in ("images", "output")
    )
    assert 0.05 < outputs.predicted_peak_gb - images.predicted_peak_gb < 0.2


def test_a_whole_job_makes_no_class_images(base: PretrainedModel, tmp_path: Path) -> None:
    from dreambooth_sm.data.prior import make_class_images
    from dreambooth_sm.distributed import World

    h = hyperparameters(**VALUES)
    subject = subject_in(tmp_path, 1)
    made = make_class_images(
        base,
        {},
        (subject,),
        h,
        cpu_plan(h),
        tmp_path / "shown",
        report=Reporter(io.StringIO()),
        stop=threading.Event(),
        world=World(),
    )
    assert made == (subject,)
