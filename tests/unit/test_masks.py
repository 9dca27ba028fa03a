"""Masks: where they come from, crops that keep the subject, and what the parts of a picture weigh in the loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreambooth_sm.data.check import check_folder
from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.data.masks import keep_subject, read_mask, subject_box
from dreambooth_sm.data.pictures import View, crop
from dreambooth_sm.data.training_set import subject_weights
from dreambooth_sm.errors import UserError
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.training.losses import dreambooth_loss
from tests.helpers.training import Run, hyperparameters, paint_pictures, same, weights
from tests.unit.test_fast_plans import PLANS


def mask_of(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def test_a_mask_beside_the_picture_or_its_alpha_channel(tmp_path: Path) -> None:
    Image.new("RGB", (80, 40), "red").save(tmp_path / "a.jpg")
    assert read_mask(tmp_path / "a.jpg") is None
    mask_of((160, 80), (20, 40, 60, 80)).save(tmp_path / "a-mask.png")
    found = read_mask(tmp_path / "a.jpg")
    assert found is not None
    assert subject_box(found) == (0.125, 0.5, 0.375, 1.0)

    layers = Image.new("RGBA", (80, 40), "red")
    layers.save(tmp_path / "b.png")
    assert read_mask(tmp_path / "b.png") is None, "an alpha channel that is opaque throughout shows nothing"
    layers.putalpha(mask_of((80, 40), (0, 0, 20, 10)))
    layers.save(tmp_path / "b.png")
    found = read_mask(tmp_path / "b.png")
    assert found is not None
    assert subject_box(found) == (0.0, 0.0, 0.25, 0.25)


def test_masks_that_can_not_be_used_are_named(tmp_path: Path) -> None:
    for path in paint_pictures(tmp_path, 3, size=(80, 64)):
        assert read_mask(path) is None
    (tmp_path / "00-mask.png").write_text("no picture")
    Image.new("L", (64, 80), 255).save(tmp_path / "01-mask.png")
    Image.new("L", (80, 64), 60).save(tmp_path / "02-mask.png")
    for name, said in (("00", "is not a picture"), ("01", "make a mask of the same shape"), ("02", "shows no subject")):
        with pytest.raises(UserError, match=said):
            read_mask(tmp_path / f"{name}.png")
    found = check_folder(tmp_path, hyperparameters())
    assert [f"{name}-mask.png" in line for name, line in zip(("00", "01", "02"), found.errors, strict=True)] == [
        True
    ] * 3


# Crops

shares = st.floats(0, 1)
boxes = st.tuples(shares, shares, shares, shares).map(
    lambda s: (min(s[0], s[2]), min(s[1], s[3]), max(s[0], s[2]), max(s[1], s[3]))
)


@given(
    st.builds(View, shares, shares, st.booleans()),
    boxes,
    st.tuples(st.integers(20, 900), st.integers(20, 900)),
    st.sampled_from([(64, 64), (80, 48), (48, 80)]),
)
def test_the_subject_is_seen_as_far_as_it_can_be(
    view: View, box: tuple[float, ...], size: tuple[int, int], shape: tuple[int, int]
) -> None:
    kept = keep_subject(view, box, size, shape)
    assert kept.mirrored == view.mirrored
    scale = min(size[0] / shape[0], size[1] / shape[1])
    for axis, (before, after) in enumerate(((view.left, kept.left), (view.top, kept.top))):
        assert 0 <= after <= 1
        seen = shape[axis] * scale / size[axis]
        start, end = box[axis], box[axis + 2]
        window = (after * (1 - seen), after * (1 - seen) + seen)
        if end - start <= seen:
            assert window[0] <= start + 1e-9
            assert window[1] >= end - 1e-9
        if before * (1 - seen) <= start and before * (1 - seen) + seen >= end:
            assert after == pytest.approx(before, abs=1e-6) or seen > 1 - 1e-6, "a view that has it all is left alone"


def test_a_subject_at_the_edge_is_in_the_square(tmp_path: Path, base: PretrainedModel) -> None:
    (path,) = paint_pictures(tmp_path, 1, size=(128, 64))
    mask_of((128, 64), (100, 0, 128, 64)).save(tmp_path / "00-mask.png")
    subject = Subject((path,), "photo of zwx toy", None, tmp_path, ())
    for random in (False, True):
        run = Run(base, tmp_path, subject=subject, center_crop=not random, aspect_ratio_buckets=False)
        seen = run.data.latents._views[0]
        assert all(view.left == pytest.approx(1.0) for view in seen)


# Weights


def test_weights_are_the_subjects_share_of_each_element() -> None:
    mask = mask_of((64, 64), (0, 0, 24, 64))
    found = subject_weights(mask, (4, 4), View(), 0.2)
    assert found.shape == (4, 4)
    expected = torch.tensor([1.0, 0.6, 0.2, 0.2])
    torch.testing.assert_close(found, (expected / expected.mean()).expand(4, 4), atol=5e-3, rtol=0)  # 8-bit masks
    mirrored = subject_weights(mask, (4, 4), View(mirrored=True), 0.2)
    assert torch.equal(mirrored, found.flip(1))
    assert torch.equal(subject_weights(mask, (4, 4), View(), 1.0), torch.ones(4, 4))
    # A view without the subject, whose background has no weight, counts as a whole.
    wide = mask_of((128, 64), (0, 0, 24, 64))
    assert torch.equal(subject_weights(wide, (4, 4), View(left=1.0), 0.0), torch.ones(4, 4))


@given(st.integers(0, 2**31), shares, st.builds(View, shares, shares, st.booleans()))
def test_the_mean_weight_is_one(seed: int, background: float, view: View) -> None:
    random = np.random.default_rng(seed)
    mask = Image.fromarray(random.integers(0, 256, (50, 70), dtype=np.uint8))
    for grid in ((8, 8), (10, 6), (6, 10)):
        found = subject_weights(mask, grid, view, background)
        assert found.shape == (grid[1], grid[0])
        assert found.mean().item() == pytest.approx(1, rel=1e-4)
        assert found.min() >= 0
        # Where the crop lies is where the picture's own lies.
        same_place = np.asarray(crop(mask, grid, view, Image.Resampling.BOX)).astype(float)
        order = np.argsort(same_place.ravel())
        assert (np.diff(found.numpy().ravel()[order]) >= -1e-6).all()


def test_the_loss_counts_elements_by_their_weights() -> None:
    prediction, target = torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2)
    prediction[0, :, 0, 0], prediction[1] = 2.0, 1.0
    element_weights = torch.ones(2, 1, 2, 2)
    element_weights[0, 0] = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    loss = dreambooth_loss(prediction, target, prior_loss_weight=0.5, element_weights=element_weights)
    assert [value.item() for value in loss if value is not None] == [4.0 + 0.5, 4.0, 1.0]


@pytest.fixture
def masked(tmp_path: Path) -> Subject:
    """Three pictures in two shapes, two of them with a mask, and class pictures."""
    pictures = paint_pictures(tmp_path / "wide", 2, size=(120, 80)) + paint_pictures(
        tmp_path / "square", 1, size=(90, 90)
    )
    for path in pictures[1:]:
        with Image.open(path) as picture:
            mask_of(picture.size, (10, 10, 50, 60)).save(path.with_name(f"{path.stem}-mask.png"))
    classes = paint_pictures(tmp_path / "class", 3, size=(64, 64), seed=5)
    return Subject(tuple(pictures), "photo of zwx toy", "photo of a toy", tmp_path / "class", tuple(classes))


@pytest.mark.slow
def test_the_trainer_weighs_the_subject(masked: Subject, base: PretrainedModel, tmp_path: Path) -> None:
    values: dict[str, object] = {
        "center_crop": False,
        "bucket_step": 8,
        "with_prior_preservation": True,
        "gradient_accumulation_steps": 2,
    }
    plain = Run(base, tmp_path, subject=masked, **values)
    whole = Run(base, tmp_path, subject=masked, background_weight=1.0, **values)
    half = Run(base, tmp_path, subject=masked, background_weight=0.1, **values)
    assert plain.data.weights is None
    assert half.data.weights is not None
    for step in range(6):
        batch = half.data.batch_sampler.batch(step, 2)
        found = half.data.weights(batch)
        assert found.shape == (4, 1, *batch.noise.shape[2:])
        torch.testing.assert_close(found.mean(dim=(1, 2, 3)), torch.ones(4))
        for row, sample in enumerate(batch.pictures.tolist()):
            assert (found[row] == 1).all() == (sample not in (1, 2))
    assert whole.train().losses == plain.train().losses
    assert same(weights(whole.base.unet), weights(plain.base.unet))
    assert half.train().losses != plain.losses
    fast = Run(base, tmp_path, subject=masked, background_weight=0.1, plan=PLANS["roomy"], **values).train()
    assert len(fast.losses) == len(half.losses)
