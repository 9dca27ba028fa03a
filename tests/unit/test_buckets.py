"""The planner of aspect-ratio buckets, as a function of the pictures' sizes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_sm.data.buckets import (
    FEWEST_PIXELS,
    assign,
    class_shapes,
    enlargement,
    plan_buckets,
    shapes_for,
    shown,
)

LANDSCAPE, PORTRAIT, WIDE, SQUARE = (4032, 3024), (3024, 4032), (6000, 4000), (1440, 1440)

sizes = st.tuples(st.integers(1, 9000), st.integers(1, 9000))
folders = st.lists(sizes, min_size=1, max_size=25) | st.lists(
    st.sampled_from([LANDSCAPE, PORTRAIT, WIDE, SQUARE, (1920, 1080)]), min_size=1, max_size=40
)
resolutions = st.integers(8, 256).map(lambda n: n * 8)
steps = st.sampled_from([8, 64])


@given(resolutions, steps)
def test_shapes_have_the_pixels_of_the_resolution(resolution: int, step: int) -> None:
    shapes = shapes_for(resolution, step)
    assert (resolution, resolution) in shapes
    assert len(set(shapes)) == len(shapes)
    assert sorted((height, width) for width, height in shapes) == shapes
    for width, height in shapes:
        assert FEWEST_PIXELS * resolution**2 <= width * height <= resolution**2
        assert min(width, height) >= resolution / 2
        assert (width % step, height % step) == (0, 0) or width == height == resolution


@given(folders, resolutions, steps)
def test_every_picture_has_one_shape_and_is_enlarged_no_more_than_in_the_square(
    folder: list[tuple[int, int]], resolution: int, step: int
) -> None:
    planned = plan_buckets(folder, resolution, step)
    assert len(planned) == len(folder)
    assert set(planned) <= set(shapes_for(resolution, step))
    for size, shape in zip(folder, planned, strict=True):
        assert enlargement(size, shape) <= max(1, enlargement(size, (resolution, resolution)))
    # Equal pictures share a shape, and the order of the files has no part in it.
    assert len(set(zip(folder, planned, strict=True))) == len(set(folder))
    assert plan_buckets(folder[::-1], resolution, step) == planned[::-1]


@given(folders, resolutions, steps)
def test_shapes_are_kept_only_where_they_spare_pictures(
    folder: list[tuple[int, int]], resolution: int, step: int
) -> None:
    planned = plan_buckets(folder, resolution, step)
    square = (resolution, resolution)
    price = max(0.1, 0.01 * len(folder))
    spared = sum(shown(size, shape) for size, shape in zip(folder, planned, strict=True))
    for gone in set(planned):
        others = set(planned) - {gone}
        without = [
            max(
                (shown(s, o) for o in others if enlargement(s, o) <= max(1, enlargement(s, square))),
                default=float("-inf"),
            )
            for s in folder
        ]
        assert spared - sum(without) > price


@given(st.integers(1, 60), st.integers(1, 3000), resolutions, steps)
def test_squares_stay_square(count: int, side: int, resolution: int, step: int) -> None:
    assert set(plan_buckets([(side, side)] * count, resolution, step)) == {(resolution, resolution)}


@pytest.mark.parametrize(
    ("folder", "shapes"),
    [
        ([LANDSCAPE] * 3 + [PORTRAIT] * 2, [(576, 448)] * 3 + [(448, 576)] * 2),
        ([WIDE] * 4, [(640, 384)] * 4),
        # One of twenty that loses a seventh of itself is worth no graph of its own; one that would lose half is.
        ([WIDE] * 20 + [LANDSCAPE], [(640, 384)] * 21),
        ([WIDE] * 20 + [PORTRAIT], [(640, 384)] * 20 + [(448, 576)]),
        ([SQUARE] * 4 + [(1440, 1500)], [(512, 512)] * 5),
        ([(12000, 1000), SQUARE], [(1024, 256), (512, 512)]),
    ],
)
def test_what_real_folders_get(folder: list[tuple[int, int]], shapes: list[tuple[int, int]]) -> None:
    assert plan_buckets(folder, 512, 64) == shapes


def test_finer_steps_cut_off_less() -> None:
    folder = [LANDSCAPE, WIDE, PORTRAIT, (1920, 1080)] * 3
    seen = {
        step: sum(shown(size, shape) for size, shape in zip(folder, plan_buckets(folder, 512, step), strict=True))
        for step in (8, 64)
    }
    assert seen[8] > seen[64] > sum(shown(size, (512, 512)) for size in folder)


# Class pictures

in_use = st.lists(st.sampled_from(shapes_for(512, 64)), min_size=1, max_size=30)


@given(in_use, st.integers(0, 200))
def test_class_pictures_have_the_instances_shapes_in_proportion(instances: list[tuple[int, int]], count: int) -> None:
    shapes = class_shapes(instances, count)
    given_, share = Counter(shapes), Counter(instances)
    assert len(shapes) == count
    assert len(given_) == min(count, len(share))
    assert set(given_) <= set(share)
    for shape, number in given_.items():
        # Each shape has one at first, which the others go without.
        assert abs(number - count * share[shape] / len(instances)) < len(share) + 1
    assert class_shapes(instances, count + 7)[:count] == shapes


@given(in_use, st.lists(sizes, max_size=30))
def test_each_class_picture_gets_one_of_the_shapes(
    instances: list[tuple[int, int]], pictures: list[tuple[int, int]]
) -> None:
    shapes = class_shapes(instances, len(pictures))
    assert Counter(assign(pictures, shapes)) == Counter(shapes)
    # Pictures that were made in the right shapes keep them, in whatever order they are found.
    assert assign(shapes[::-1], shapes) == shapes[::-1]
