"""Which samples a step uses, and what of them lies on the device."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_sm.data.pictures import View, crop, open_picture
from dreambooth_sm.data.training_set import (
    VIEWS,
    Batch,
    BatchSampler,
    Latents,
    TrainingRow,
    mix,
    random_views,
    to_tensor,
    views_of,
)
from dreambooth_sm.models import PretrainedModel
from tests.helpers.training import Run, cpu_plan, hyperparameters, make_set, make_subject, paint_pictures

TENSORS = ("pictures", "views", "prompts", "latent_noise", "noise", "timesteps")


def make_batch_sampler(
    *, instances: int = 5, classes: int = 0, seed: int = 3, views: int = 8, timesteps: int = 1000
) -> BatchSampler:
    """Instance k may be shown with prompts 10k and 10k + 1, class picture k with 1000 + k."""
    return BatchSampler(
        [TrainingRow(Path(f"i{k}"), (10 * k, 10 * k + 1), (2, 2)) for k in range(instances)],
        [TrainingRow(Path(f"c{k}"), (1000 + k,), (2, 2)) for k in range(classes)],
        views=views,
        channels=4,
        latent_scale=1,
        timesteps=timesteps,
        seed=seed,
    )


def equal(left: Batch, right: Batch) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in TENSORS)


def rows(batch: Batch, at: slice) -> Batch:
    return Batch(**{name: getattr(batch, name)[at] for name in TENSORS})


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(0, 2**31), st.integers(1, 3))
def test_a_batch_is_a_function_of_seed_and_number(drawn_before: list[int], seed: int, size: int) -> None:
    used = make_batch_sampler(seed=seed, classes=3)
    for number in drawn_before:
        torch.rand(1)
        used.batch(number, size)
    assert equal(used.batch(17, size), make_batch_sampler(seed=seed, classes=3).batch(17, size))


def test_drawing_touches_no_global_generator() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    make_batch_sampler().batch(0, 4)
    assert torch.equal(torch.rand(3), expected)


@given(st.integers(0, 20), st.sampled_from([1, 2, 4, 8]))
def test_small_batches_are_the_rows_of_a_large_one(number: int, size: int) -> None:
    batch_sampler = make_batch_sampler(classes=3)
    large = batch_sampler.batch(number, 8)
    small = [batch_sampler.batch(number * (8 // size) + part, size) for part in range(8 // size)]
    for half, first in ((slice(0, size), 0), (slice(size, None), 8)):
        joined = [rows(batch, half) for batch in small]
        for name in TENSORS:
            together = torch.cat([getattr(batch, name) for batch in joined])
            assert torch.equal(together, getattr(large, name)[first : first + 8])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_epoch_shows_every_picture_once(size: int) -> None:
    batch_sampler = make_batch_sampler(instances=6, classes=6)
    orders: set[tuple[int, ...]] = set()
    for epoch in range(5):
        batches = [batch_sampler.batch(epoch * (6 // size) + number, size) for number in range(6 // size)]
        order = torch.cat([batch.pictures[:size] for batch in batches]).tolist()
        assert sorted(order) == [0, 1, 2, 3, 4, 5]
        assert sorted(torch.cat([batch.pictures[size:] for batch in batches]).tolist()) == [6, 7, 8, 9, 10, 11]
        orders.add(tuple(order))
    assert len(orders) > 1


def test_pictures_are_shown_equally_often_whatever_the_batch_size() -> None:
    batch_sampler = make_batch_sampler(instances=5, classes=3)
    shown = Counter(sample for number in range(15) for sample in batch_sampler.batch(number, 4).pictures.tolist())
    assert shown == Counter({**dict.fromkeys(range(5), 12), **dict.fromkeys((5, 6, 7), 20)})


def test_the_first_half_is_the_subject_and_the_second_the_class() -> None:
    batch_sampler = make_batch_sampler(instances=5, classes=3)
    for number in range(10):
        batch = batch_sampler.batch(number, 4)
        assert (batch.pictures[:4] < 5).all()
        assert (batch.pictures[4:] >= 5).all()
        assert batch.noise.shape == batch.latent_noise.shape == (8, 4, 2, 2)
    assert len(make_batch_sampler(instances=5).batch(0, 4).pictures) == 4


def test_prompts_belong_to_their_picture() -> None:
    batch_sampler = make_batch_sampler(instances=5, classes=3)
    seen: set[int] = set()
    for number in range(40):
        batch = batch_sampler.batch(number, 2)
        for sample, prompt in zip(batch.pictures.tolist(), batch.prompts.tolist(), strict=True):
            assert prompt == 1000 + sample - 5 if sample >= 5 else prompt // 10 == sample
            seen.add(prompt)
    assert seen == {*(10 * k + o for k in range(5) for o in (0, 1)), 1000, 1001, 1002}


def test_seeds_positions_and_halves_draw_different_things() -> None:
    draws = [make_batch_sampler(seed=seed, classes=5).batch(number, 2) for seed in (0, 1, 2**31) for number in (0, 1)]
    noises = [row for batch in draws for row in (*batch.noise, *batch.latent_noise)]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == len(noises)


def test_time_steps_views_and_noise_are_spread_as_they_should_be() -> None:
    batch_sampler = make_batch_sampler(timesteps=100, classes=1)
    batches = [batch_sampler.batch(number, 8) for number in range(125)]
    timesteps = torch.cat([batch.timesteps for batch in batches])
    assert (timesteps.min(), timesteps.max()) == (0, 99)
    tenths = torch.bincount(timesteps // 10, minlength=10)  # 2000 draws: 200 each, deviation 13
    assert ((tenths - 200).abs() < 60).all()
    views = torch.bincount(torch.cat([batch.views for batch in batches]), minlength=8)
    assert ((views - 250).abs() < 75).all()
    for name in ("noise", "latent_noise"):
        noise = torch.cat([getattr(batch, name) for batch in batches])
        assert abs(noise.mean()) < 0.03
        assert abs(noise.std() - 1) < 0.03
    instance, prior = (torch.cat([b.timesteps[half] for b in batches]) for half in (slice(0, 8), slice(8, None)))
    assert (instance == prior).float().mean() < 0.05


@given(st.lists(st.integers(-(2**31), 2**31), min_size=2, max_size=3))
def test_mixed_seeds_are_seeds_and_tell_their_numbers_apart(numbers: list[int]) -> None:
    assert 0 <= mix(*numbers) < 2**63
    assert mix(*numbers) == mix(*numbers)
    assert len({mix(*numbers), mix(*numbers[:-1], numbers[-1] + 1), mix(numbers[0] + 1, *numbers[1:])}) == 3


# Shapes


def make_bucketed(
    counts: dict[tuple[int, int], int], *, classes: bool = True, seed: int = 3, **values: float
) -> BatchSampler:
    """So many instances of each shape, and one class picture less (but one at least)."""
    shapes = [shape for shape, count in counts.items() for _ in range(count)]
    others = [shape for shape, count in counts.items() for _ in range(max(1, count - 1))]
    return BatchSampler(
        [TrainingRow(Path(f"i{k}"), (k,), shape) for k, shape in enumerate(shapes)],
        [TrainingRow(Path(f"c{k}"), (1000 + k,), shape) for k, shape in enumerate(others)] if classes else [],
        views=8,
        channels=4,
        latent_scale=2,
        timesteps=1000,
        seed=seed,
        **values,
    )


def shape_of(batch_sampler: BatchSampler, batch: Batch) -> tuple[int, int]:
    (shape,) = {[*batch_sampler.instances, *batch_sampler.classes][row].shape for row in batch.pictures.tolist()}
    width, height = shape
    assert batch.noise.shape[1:] == batch.latent_noise.shape[1:] == (4, height // 2, width // 2)
    return shape


counts = st.dictionaries(st.sampled_from([(8, 8), (16, 4), (4, 16), (6, 10)]), st.integers(1, 6), min_size=1)


@given(counts, st.integers(0, 2**31), st.integers(0, 30), st.sampled_from([(1, 8), (2, 4), (4, 2), (8, 1)]))
def test_a_step_has_one_shape_and_the_same_samples_however_it_is_spread(
    counts: dict[tuple[int, int], int], seed: int, step: int, spread: tuple[int, int]
) -> None:
    """Over gradient accumulation and processes: 8 samples as `together` batches of `size`."""
    size, together = spread
    batch_sampler = make_bucketed(counts, seed=seed)
    assert set(batch_sampler.shapes) == counts.keys()
    assert [w * h for w, h in batch_sampler.shapes] == sorted((w * h for w, h in counts), reverse=True)
    batches = [batch_sampler.batch(step * together + part, size, together) for part in range(together)]
    whole = make_bucketed(counts, seed=seed).batch(step, 8, 1)
    assert {shape_of(batch_sampler, batch) for batch in batches} == {shape_of(batch_sampler, whole)}
    for half, start in ((slice(0, size), 0), (slice(size, None), 8)):
        for name in TENSORS:
            joined = torch.cat([getattr(rows(batch, half), name) for batch in batches])
            assert torch.equal(joined, getattr(whole, name)[start : start + 8])


@given(counts, st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 2))
def test_pictures_of_all_shapes_are_shown_equally_often(
    counts: dict[tuple[int, int], int], seed: int, size: int, together: int
) -> None:
    batch_sampler = make_bucketed(counts, seed=seed)
    instances = len(batch_sampler.instances)
    for epoch in range(2):
        steps = range(epoch * instances, (epoch + 1) * instances)
        batches = [
            batch_sampler.batch(step * together + part, size, together) for step in steps for part in range(together)
        ]
        shown = Counter(row for batch in batches for row in batch.pictures[:size].tolist())
        assert shown == dict.fromkeys(range(instances), size * together)
        assert all((batch.pictures[size:] >= instances).all() for batch in batches)


def test_the_order_of_shapes_is_random() -> None:
    orders = {
        tuple(shape_of(batch_sampler, batch_sampler.batch(step, 1)) for step in range(8))
        for batch_sampler in (make_bucketed({(8, 8): 4, (4, 16): 4}, seed=seed) for seed in range(5))
    }
    assert len(orders) > 1


# Caption dropout


def test_prompts_are_dropped_as_often_as_asked_and_nothing_else_changes() -> None:
    shapes = {(8, 8): 3, (4, 16): 2}
    whole, dropping = (make_bucketed(shapes, empty_prompt=77, caption_dropout=share) for share in (0.0, 0.3))
    pairs = [(whole.batch(number, 8), dropping.batch(number, 8)) for number in range(60)]
    for name in TENSORS:
        if name != "prompts":
            assert all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs)
    prompts = torch.cat([b.prompts for _, b in pairs])
    dropped = prompts == 77
    assert 0.25 < dropped.float().mean() < 0.35  # 960 draws, deviation 0.015
    assert torch.equal(prompts[~dropped], torch.cat([a.prompts for a, _ in pairs])[~dropped])
    instance, prior = (torch.cat([(b.prompts == 77)[half] for _, b in pairs]) for half in (slice(8), slice(8, None)))
    assert instance.any()
    assert prior.any()
    assert not torch.equal(instance, prior)


# Views and latents


def test_views() -> None:
    assert random_views(0, 0, random_crop=False, mirror=False) == [View()]
    cropped = random_views(0, 0, random_crop=True, mirror=False)
    assert len({(view.left, view.top) for view in cropped}) == VIEWS
    assert not any(view.mirrored for view in cropped)
    flipped = [view for sample in range(50) for view in random_views(0, sample, random_crop=False, mirror=True)]
    assert {(view.left, view.top) for view in flipped} == {(0.5, 0.5)}
    assert 0.4 < sum(view.mirrored for view in flipped) / len(flipped) < 0.6
    both = [view for sample in range(50) for view in random_views(0, sample, random_crop=True, mirror=True)]
    assert 0.4 < sum(view.left for view in both) / len(both) < 0.6
    assert len({view.left for view in both}) == len(both)
    assert random_views(0, 1, random_crop=True, mirror=True) == random_views(0, 1, random_crop=True, mirror=True)
    assert random_views(1, 1, random_crop=True, mirror=True) != random_views(0, 1, random_crop=True, mirror=True)


def test_pixels_as_the_vae_takes_them(tmp_path: Path) -> None:
    (path,) = paint_pictures(tmp_path, 1, size=(6, 4))
    picture = open_picture(path)
    pixels = to_tensor(picture)
    assert pixels.shape == (3, 4, 6)
    for x, y in ((0, 0), (5, 1), (2, 3)):
        assert pixels[:, y, x].tolist() == pytest.approx(
            [value / 127.5 - 1 for value in picture.getpixel((x, y))], abs=1e-6
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"hflip": True}, {"center_crop": False}, {"center_crop": False, "hflip": True}]
)
def test_cached_or_not_the_latents_are_the_same(
    base: PretrainedModel, tmp_path: Path, options: dict[str, object]
) -> None:
    subject = make_subject(tmp_path, pictures=2, class_pictures=1)
    found = []
    for not_cached in (True, False):
        h = hyperparameters(not_cache_latents=not_cached, **options)
        data = make_set(base, [subject], h, cpu_plan(h))
        batches = [data.batch_sampler.batch(number, 2) for number in range(4)]
        found.append(torch.cat([data.latents(batch) for batch in batches]))
        if options:
            assert len({view for batch in batches for view in batch.views.tolist()}) > 1
    assert torch.equal(*found)


def test_latents_are_a_draw_from_the_vaes_posterior_of_the_view(base: PretrainedModel, tmp_path: Path) -> None:
    pictures = paint_pictures(tmp_path, 2)
    views = [[View(), View(left=1.0, mirrored=True)], [View(left=0.0), View(left=0.3)]]
    latents = Latents(pictures, [(64, 64)] * 2, views, base.vae, base.family, cached=True)
    batch = Batch(
        pictures=torch.tensor([0, 1, 0]),
        views=torch.tensor([1, 0, 0]),
        prompts=torch.zeros(3, dtype=torch.int64),
        latent_noise=torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        noise=torch.zeros(3, 4, 16, 16),
        timesteps=torch.zeros(3, dtype=torch.int64),
    )
    ours = latents(batch)
    assert ours.dtype == torch.float32
    for row, (sample, view) in enumerate(((0, 1), (1, 0), (0, 0))):
        pixels = to_tensor(crop(open_picture(pictures[sample]), (64, 64), views[sample][view]))[None]
        posterior = base.vae.encode(pixels).latent_dist
        expected = (posterior.mean + posterior.std * batch.latent_noise[row]) * base.vae.config.scaling_factor
        torch.testing.assert_close(ours[row], expected[0].detach(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(ours[0], ours[2])


def test_cached_latents_need_neither_the_files_nor_the_vae(base: PretrainedModel, tmp_path: Path) -> None:
    pictures = paint_pictures(tmp_path, 2)
    latents = Latents(pictures, [(64, 64)] * 2, [[View()]] * 2, base.vae, base.family, cached=True)
    for path in pictures:
        path.unlink()
    samples = [TrainingRow(path, (0,), (64, 64)) for path in pictures]
    batch_sampler = BatchSampler(samples, [], views=1, channels=4, latent_scale=4, timesteps=9, seed=0)
    assert latents(batch_sampler.batch(0, 2)).shape == (2, 4, 16, 16)
    assert latents._vae is None


def test_an_offset_is_one_number_a_channel_and_changes_nothing_else() -> None:
    plain, moved = (make_bucketed({(8, 8): 3}, noise_offset=offset) for offset in (0.0, 0.1))
    shifts = []
    for number in range(200):
        one, other = plain.batch(number, 2), moved.batch(number, 2)
        for name in TENSORS:
            if name != "noise":
                assert torch.equal(getattr(one, name), getattr(other, name)), name
        shift = other.noise - one.noise
        torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), rtol=1e-4, atol=1e-6)
        shifts.append(shift[:, :, 0, 0])
    drawn = torch.cat(shifts)
    assert drawn.std().item() == pytest.approx(0.1, rel=0.1)
    assert abs(drawn.mean().item()) < 0.01


def test_rows_with_noise_of_their_own_keep_it() -> None:
    noise = torch.randn(4, 4, 4)
    row = TrainingRow(Path("i"), (0,), (8, 8), noise, 3)
    sampler = BatchSampler([row], [], views=1, channels=4, latent_scale=2, timesteps=9, seed=0, noise_offset=0.5)
    assert torch.equal(sampler.batch(0, 1).noise[0], noise)


def test_embeddings_or_token_ids(base: PretrainedModel, tmp_path: Path) -> None:
    fixed = Run(base, tmp_path / "a", with_prior_preservation=True)
    trained = Run(base, tmp_path / "b", with_prior_preservation=True, train_text_encoder=True)
    assert fixed.data.prompts["states"].shape == (2, 77, 32)
    assert trained.data.prompts["ids"].shape == (2, 1, 77)
    assert trained.data.prompts["ids"].dtype == torch.int64


def test_a_square_picture_has_nothing_to_crop_and_is_encoded_once(tmp_path: Path, loaded_base: PretrainedModel) -> None:
    wide, square = paint_pictures(tmp_path / "a", 1), paint_pictures(tmp_path / "b", 1, size=(64, 64))
    pictures = [*wide, *square]
    views = views_of(pictures, [(64, 64)] * 2, [None] * 2, 0, random_crop=True, mirror=False)
    assert [len(row) for row in views] == [VIEWS, VIEWS]
    assert len(set(views[0])) == VIEWS
    assert set(views[1]) == {View()}
    assert views_of(square, [(64, 64)], [None], 0, random_crop=True, mirror=False) == [[View()]]
    assert len(set(views_of(square, [(64, 64)], [None], 0, random_crop=True, mirror=True)[0])) == 2

    encoded: list[int] = []

    class Counting:
        config, device, dtype = loaded_base.vae.config, loaded_base.vae.device, loaded_base.vae.dtype

        def encode(self, pixels: torch.Tensor) -> Any:
            encoded.append(len(pixels))
            return loaded_base.vae.encode(pixels)

    Latents(pictures, [(64, 64)] * 2, views, Counting(), loaded_base.family, cached=True)
    assert sum(encoded) == VIEWS + 1
