"""Steps that ask the base model, with what is trained switched off."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch.nn import functional as F

from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.errors import StopRequested, UserError
from dreambooth_sm.methods import METHODS, Removable
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.cards import CARDS
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.training.checkpoint import latest_checkpoint
from tests.helpers.marks import slow_except
from tests.helpers.training import Run, attach, cpu_plan, hyperparameters, paint_pictures, same

LIVE = [name for name, method in METHODS.items() if method.has_live_base]
VALUES: dict[str, Any] = {
    "class_prompt": "photo of a toy",
    "with_prior_preservation": True,
    "prior": "output",
    "prior_loss_weight": 0.5,
    "max_train_steps": 3,
    "learning_rate": 1e-2,
    "model_name": "zwx",
}
TEXT = {"method": "lora", "lora_targets": "linear", "train_text_encoder": True}


def subject_in(root: Path, pictures: int = 3) -> Subject:
    return Subject(
        tuple(paint_pictures(root / "instance", pictures, seed=1)), "photo of zwx toy", "photo of a toy", root, ()
    )


def run_of(base: PretrainedModel, root: Path, **values: Any) -> Run:
    plan = values.pop("plan", {})
    return Run(base, root, subject=values.pop("subject", None) or subject_in(root), plan=plan, **VALUES | values)


def values_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.trainable.parameters.items()}


def test_methods_that_say_so_can_be_left_out(base: PretrainedModel) -> None:
    assert LIVE
    for name in METHODS:
        h = hyperparameters(method=name, class_prompt="photo of a toy")
        assert isinstance(attach(base, h, cpu_plan(h)), Removable) == (name in LIVE), name


@pytest.mark.parametrize(
    "values",
    slow_except([{"method": "lora"}], [{"method": name} for name in LIVE] + [TEXT]),
    ids=[*LIVE, "text_encoder"],
)
def test_classes_are_trained_towards_what_the_base_says(
    base: PretrainedModel, tmp_path: Path, values: dict[str, Any]
) -> None:
    """By a second model: the losses of each step are those of the step's batch, computed with it."""
    run = run_of(copy.deepcopy(base), tmp_path, snr_gamma=5.0, **values)
    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    encoder = run.base.text_encoder
    for number in range(3):
        batch = run.data.batch_sampler.batch(number, 1)
        latents = run.data.latents(batch)
        noised = scheduler.add_noise(latents, batch.noise, batch.timesteps)
        with torch.no_grad():
            prompt = base.tokenizer("photo of a toy", padding="max_length", return_tensors="pt").input_ids
            of_class = base.text_encoder(prompt).last_hidden_state
            wanted = base.unet(noised[1:], batch.timesteps[1:], of_class).sample
            shown = of_class if not run.plan.train_text_encoder else encoder(prompt).last_hidden_state
            said = run.base.unet(noised[1:], batch.timesteps[1:], shown).sample
        signal = scheduler.alphas_cumprod[batch.timesteps[1]]
        snr = float(signal / (1 - signal))
        expected = float(F.mse_loss(said, wanted)) * min(snr, 5.0) / snr
        loss = run.trainer.optimizer_step(1e-2)
        assert loss.prior is not None
        assert float(loss.prior) == pytest.approx(expected, rel=1e-4, abs=1e-9)
        assert float(loss.total) == pytest.approx(float(loss.instance) + 0.5 * float(loss.prior), rel=1e-6)
        assert (float(loss.prior) < 1e-9) == (number == 0), "an untrained model is the base"


def test_rows_of_the_class_show_the_subject_with_noise_of_their_own(base: PretrainedModel, tmp_path: Path) -> None:
    run = run_of(base, tmp_path, method="lora", background_weight=0.5, not_cache_latents=True, center_crop=False)
    sampler = run.data.batch_sampler
    assert [row.picture for row in sampler.classes] == [row.picture for row in sampler.instances]
    assert all(row.noise is None for row in sampler.classes)
    batches = [sampler.batch(number, 1) for number in range(6)]
    shown = {int(batch.pictures[1]) - len(sampler.instances) for batch in batches}
    assert shown == set(range(3))
    assert not any(torch.equal(*batch.noise) for batch in batches)
    assert len({int(batch.timesteps[1]) for batch in batches}) > 3
    # The table's further rows are the same pictures.
    batch = batches[0]
    batch.pictures[0], batch.views[0] = batch.pictures[1] - 3, batch.views[1]
    batch.latent_noise[0] = batch.latent_noise[1]
    torch.testing.assert_close(*run.data.latents(batch))


def test_it_needs_no_memory_of_its_own_and_no_class_images() -> None:
    prompts = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy", "method": "lora"}
    images, outputs = (
        make_plan(hyperparameters(**prompts, with_prior_preservation=True, prior=prior), CARDS["T4"])
        for prior in ("images", "output")
    )
    assert images.predicted_peak_gb == outputs.predicted_peak_gb


@pytest.mark.slow
@pytest.mark.parametrize("values", [TEXT, {"method": "hypernetwork"}], ids=["lora", "hypernetwork"])
def test_it_is_resumed_to_the_bit_and_recomputation_changes_nothing(
    base: PretrainedModel, tmp_path: Path, values: dict[str, Any]
) -> None:
    whole = run_of(base, tmp_path / "whole", **values).train()
    with pytest.raises(StopRequested):
        run_of(base, tmp_path / "stopped", **values).train(stop_at=1)
    checkpoint = latest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert checkpoint is not None
    resumed = run_of(base, tmp_path / "stopped", **values)
    resumed.trainer.resume(checkpoint)
    assert same(values_of(resumed.train()), values_of(whole))
    smaller = run_of(base, tmp_path / "smaller", plan={"gradient_checkpointing": True}, **values).train()
    for mine, theirs in zip(smaller.losses, whole.losses, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("values", [{"method": name} for name in LIVE] + [TEXT], ids=[*LIVE, "text_encoder"])
def test_direct_consistency_compares_with_the_base(
    base: PretrainedModel, tmp_path: Path, values: dict[str, Any]
) -> None:
    """By a second model; the second step's loss is that of what the first one made."""
    options = {"prior": "dco", "dco_beta": 0.2, "with_prior_preservation": "auto", "train_batch_size": 2}
    run = run_of(copy.deepcopy(base), tmp_path, **options, **values)
    assert not run.data.batch_sampler.classes
    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    prompt = base.tokenizer("photo of zwx toy", padding="max_length", return_tensors="pt").input_ids
    for number in range(3):
        batch = run.data.batch_sampler.batch(number, 2)
        noised = scheduler.add_noise(run.data.latents(batch), batch.noise, batch.timesteps)
        errors = []
        for model in (run.base, base):
            encoder = model.text_encoder if run.plan.train_text_encoder else base.text_encoder
            with torch.no_grad():
                states = encoder(prompt).last_hidden_state.expand(2, -1, -1)
                said = model.unet(noised, batch.timesteps, states).sample
            errors.append([float(F.mse_loss(*row)) for row in zip(said, batch.noise, strict=True)])
        odds = [-0.2 * 1000 * (ours - theirs) for ours, theirs in zip(*errors, strict=True)]
        expected = sum(-math.log(1 / (1 + math.exp(-odd))) for odd in odds) / 2
        loss = run.trainer.optimizer_step(1e-2)
        assert loss.prior is None
        assert float(loss.total) == pytest.approx(expected, rel=2e-3)
        if number == 0:
            assert float(loss.total) == pytest.approx(math.log(2), rel=1e-6)
        else:
            assert max(map(abs, odds)) > 1e-2


def test_direct_consistency_is_refused_where_nothing_keeps_the_base() -> None:
    for name, method in METHODS.items():
        h = hyperparameters(method=name, prior="dco", class_prompt="photo of a toy", with_prior_preservation="auto")
        if method.has_live_base:
            assert cpu_plan(h)
            continue
        with pytest.raises(UserError, match="set method to lora or hypernetwork, or prior to images or output"):
            cpu_plan(h)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"prior": "dco", "with_prior_preservation": True, "class_prompt": "toy"}, "leave with_prior_preservation out"),
        ({"prior": "output", "dco_beta": 2}, "dco_beta=2 is for prior=dco"),
    ],
)
def test_what_direct_consistency_can_not_go_with(values: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        hyperparameters(method="lora", **values)


@pytest.mark.slow
def test_sdxl_and_several_shapes(xl_base: PretrainedModel, tmp_path: Path) -> None:
    """Extras belong to rows: those of the class halves are the base's as well."""
    wide, tall = (
        paint_pictures(tmp_path / name, 1, size=size) for name, size in {"wide": (96, 64), "tall": (64, 96)}.items()
    )
    subject = Subject((*wide, *tall), "photo of zwx toy", "photo of a toy", tmp_path, ())
    values = {"base_architecture": "sdxl", "center_crop": False, "bucket_step": 8, "gradient_accumulation_steps": 1}
    run = run_of(xl_base, tmp_path, subject=subject, method="lora", **values).train()
    assert len(run.data.batch_sampler.shapes) == 2
    first, *later = [step[2] for step in run.losses]
    assert first < 1e-9 < min(later)
