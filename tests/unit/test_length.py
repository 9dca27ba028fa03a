"""The length of a training, of one process and of several."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.planning.length import length_of
from launcher.estimates import estimate_on
from launcher.instances import find_instance


def parse(**values: object) -> Hyperparameters:
    return Hyperparameters.parse({"instance_prompt": "photo of zwx toy", **values})


@given(
    processes=st.integers(1, 4),
    pictures=st.integers(1, 200),
    batch=st.integers(1, 8),
    length=st.sampled_from([{}, {"preset": "object"}, {"num_train_epochs": 30}]),
)
def test_several_processes_see_no_fewer_pictures_than_one_and_hardly_more(
    processes: int, pictures: int, batch: int, length: dict[str, object]
) -> None:
    h = parse(train_batch_size=batch, **length)
    alone, shared = length_of(h, pictures), length_of(h, pictures, processes)
    seen = shared.steps * processes * batch
    least = alone.steps * batch
    assert least <= seen < least + processes * batch
    assert (shared.note is None) == (shared.steps == alone.steps)
    assert shared.learning_rate * shared.steps == pytest.approx(alone.learning_rate * alone.steps)


def test_more_than_four_do_not_take_fewer_steps_at_rates_that_nobody_measured() -> None:
    found = length_of(parse(), 5, 32)
    assert (found.steps, found.learning_rate) == (200, pytest.approx(8e-6))


def test_steps_that_are_set_are_exact() -> None:
    for values in ({}, {"preset": "face"}, {"num_train_epochs": 3}):
        found = length_of(parse(max_train_steps=400, **values), 5, 4)
        assert (found.steps, found.learning_rate, found.note) == (400, 2e-6, None)


def test_rates_that_are_scaled_or_found_are_left_to_that() -> None:
    assert length_of(parse(scale_lr=True), 5, 4).learning_rate == pytest.approx(4 * 2e-6)
    assert length_of(parse(optimizer="prodigy"), 5, 4).learning_rate == 1
    assert length_of(parse(optimizer="prodigy"), 5, 4).steps == 200


def test_people_are_told_before_it_costs_money() -> None:
    instance = find_instance("ml.g5.12xlarge")
    estimate = estimate_on(parse(class_prompt="photo of a toy"), instance)
    (line,) = (line for line in estimate.lines() if line.startswith("length: "))
    assert line.startswith(
        "length: 4 processes take 200 steps where one takes 800, at 4 times its learning rate; set max_train_steps"
    )
    exact = estimate_on(parse(class_prompt="photo of a toy", max_train_steps=800), instance)
    assert not any("length" in line for line in exact.lines())
    assert exact.training_minutes == pytest.approx(4 * estimate.training_minutes)
