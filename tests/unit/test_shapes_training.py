"""Training on pictures of several shapes: the same whatever it is spread over, cached or not, and in every plan."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from dreambooth_sm.data.concepts import Subject, shapes_of
from dreambooth_sm.models import PretrainedModel
from tests.helpers.training import Run, hyperparameters, paint_pictures, same, weights
from tests.unit.test_fast_plans import PLANS

SIZES = [(120, 80), (120, 80), (80, 120), (100, 100)]
VALUES: dict[str, object] = {
    "center_crop": False,
    "bucket_step": 8,
    "with_prior_preservation": True,
    "caption_dropout": 0.2,
    "max_train_steps": 6,
}


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """Four pictures in three shapes, each with its own prompt, and fewer class pictures than shapes."""
    pictures = [
        path
        for number, size in enumerate(SIZES)
        for path in paint_pictures(tmp_path / str(number), 1, size=size, seed=number)
    ]
    return Subject(
        pictures=tuple(pictures),
        prompt="photo of zwx toy",
        class_prompt="photo of a toy",
        class_directory=tmp_path / "class",
        class_pictures=tuple(paint_pictures(tmp_path / "class", 2, size=(64, 64), seed=9)),
        prompts=tuple(f"photo of zwx toy, {word}" for word in ("red", "blue", "tall", "square")),
    )


def test_shapes_of_a_subject(subject: Subject) -> None:
    (shapes,) = shapes_of([subject], hyperparameters(**VALUES, class_prompt="photo of a toy"))
    assert shapes == [(80, 48), (80, 48), (48, 80), (64, 64)]
    for values in ({"center_crop": True}, {"aspect_ratio_buckets": False}):
        h = hyperparameters(**{**VALUES, **values}, class_prompt="photo of a toy")
        assert shapes_of([subject], h) == [[(64, 64)] * 4]


@pytest.mark.slow
def test_all_shapes_and_prompts_are_trained_on(base: PretrainedModel, subject: Subject, tmp_path: Path) -> None:
    run = Run(base, tmp_path, subject=subject, **VALUES)
    batch_sampler = run.data.batch_sampler
    assert batch_sampler.shapes == [(64, 64), (48, 80), (80, 48)]
    latents = Counter(tuple(run.data.latents(batch_sampler.batch(step, 1)).shape) for step in range(8))
    assert latents == {(2, 4, 12, 20): 4, (2, 4, 20, 12): 2, (2, 4, 16, 16): 2}
    # Four prompts of pictures, one of the class, and the empty one.
    assert len(run.data.prompts["states"]) == 6
    assert run.train().losses == Run(base, tmp_path, subject=subject, **VALUES).train().losses


@pytest.mark.slow
def test_accumulated_batches_are_one_large_batch(base: PretrainedModel, subject: Subject, tmp_path: Path) -> None:
    values = {**VALUES, "adam_epsilon": 1.0, "learning_rate": 0.1, "max_grad_norm": None}
    runs = [
        Run(
            base, tmp_path, subject=subject, train_batch_size=size, gradient_accumulation_steps=4 // size, **values
        ).train()
        for size in (4, 2, 1)
    ]
    for other in runs[1:]:
        for ours, theirs in zip(runs[0].losses, other.losses, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_cached_or_not_the_model_is_the_same(base: PretrainedModel, subject: Subject, tmp_path: Path) -> None:
    runs = [Run(base, tmp_path, subject=subject, not_cache_latents=n, **VALUES).train() for n in (True, False)]
    assert runs[0].losses == runs[1].losses
    assert same(weights(runs[0].base.unet), weights(runs[1].base.unet))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["medium", "tiny"])
def test_plans_for_gpus_take_shapes_as_they_come(
    name: str, base: PretrainedModel, subject: Subject, tmp_path: Path
) -> None:
    run = Run(base, tmp_path, subject=subject, plan=PLANS[name], train_text_encoder=True, **VALUES).train()
    assert len(run.losses) == 6
    assert all(torch.isfinite(torch.tensor(loss)).all() for loss in run.losses)


@pytest.mark.slow
def test_captions_of_more_than_75_tokens_are_encoded_whole(
    base: PretrainedModel, subject: Subject, tmp_path: Path
) -> None:
    """The end of a long caption reaches the model, with the text encoder trained or not."""
    for trained in (False, True):
        tables = []
        for end in ("one", "two"):
            prompts = (subject.prompts[0], "toy " * 80 + end, *subject.prompts[2:])
            long = Subject(**{**vars(subject), "prompts": prompts})
            values = {**VALUES, "max_token_length": 150, "train_text_encoder": trained, "max_train_steps": 1}
            run = Run(base, tmp_path, subject=long, **values).train()
            tables.append(run.data.prompts["ids" if trained else "states"])
            width = run.base.text_encoder.config.hidden_size
            assert tables[-1].shape == ((6, 2, 77) if trained else (6, 2 * 77, width))
        differing = [row for row in range(6) if not torch.equal(tables[0][row], tables[1][row])]
        assert differing == [1]
