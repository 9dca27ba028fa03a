"""How subjects are spread over jobs, and where their lists come from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from launcher.estimates import estimate_on
from launcher.fleets.sources import read_subjects
from launcher.fleets.split import FleetEstimate, shared_minutes, split, subject_minutes, subjects_a_job
from launcher.instances import INSTANCES

ALONE = estimate_on(
    Hyperparameters.parse(
        {"instance_prompt": "zwx toy", "class_prompt": "toy", "method": "lora", "max_train_steps": 400}
    ),
    INSTANCES["ml.g5.xlarge"],
)
COUNTS = st.integers(1, 20_000)


@given(COUNTS, st.integers(1, 500))
def test_each_subject_is_in_one_of_few_jobs_of_like_size(count: int, largest: int) -> None:
    sizes = split(count, largest)
    assert sum(sizes) == count
    assert 1 <= min(sizes) <= max(sizes) <= min(largest, min(sizes) + 1)
    assert len(sizes) == -(-count // largest)


@given(COUNTS, st.integers(1, 100), st.sampled_from([1, 4, 8]), st.none() | st.floats(30, 1000))
def test_jobs_are_long_against_their_start_and_not_too_long(
    count: int, parallel: int, cards: int, limit: float | None
) -> None:
    largest = subjects_a_job(count, ALONE, parallel, cards=cards, limit=limit)
    minutes = shared_minutes(ALONE) + -(-largest // cards) * subject_minutes(ALONE)
    assert 1 <= largest <= count
    assert largest == 1 or minutes <= min(120, limit or 120)
    if largest < -(-count // parallel):  # cut for its length alone
        assert minutes + subject_minutes(ALONE) > min(120, limit or 120)


def test_a_fleet_is_cheaper_than_a_job_a_subject() -> None:
    largest = subjects_a_job(1000, ALONE, 10)
    estimate = FleetEstimate(split(1000, largest), 10, ALONE)
    assert shared_minutes(ALONE) < 0.1 * (estimate.job_minutes or 0)
    assert ALONE.usd
    assert estimate.usd
    assert estimate.usd < 0.5 * 1000 * ALONE.usd
    # As a sum over its jobs, on its own.
    billed = shared_minutes(ALONE) - ALONE.waiting_minutes
    each = sum(billed + size * subject_minutes(ALONE) for size in estimate.sizes) / 60
    assert estimate.usd == pytest.approx(each * 1.408)
    assert estimate.minutes == pytest.approx((estimate.job_minutes or 0) * -(-len(estimate.sizes) // 10))
    assert "1000 subjects" in "\n".join(estimate.lines())


def never() -> None:
    raise AssertionError("no list lies in S3")


def test_folders_tables_lists_and_objects_give_the_same_subjects(tmp_path: Path) -> None:
    for name in ("duck", "cat", ".hidden"):
        (tmp_path / "toys" / name).mkdir(parents=True)
    rows = [{"id": name, "images": str(tmp_path / "toys" / name)} for name in ("cat", "duck")]
    (tmp_path / "toys.csv").write_text("id,images,seed\ncat,toys/cat,\nduck,toys/duck,\n")
    (tmp_path / "toys.jsonl").write_text('{"id": "cat", "images": "toys/cat"}\n{"id": "duck", "images": "toys/duck"}\n')
    found = [read_subjects(each, never) for each in (tmp_path / "toys", tmp_path / "toys.csv", rows)]  # type: ignore[arg-type]
    found.append(read_subjects(str(tmp_path / "toys.jsonl"), never))  # type: ignore[arg-type]
    assert all(each == found[0] for each in found)
    assert [subject.id for subject in found[0]] == ["cat", "duck"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("toys.csv", b"id,images\na,b,c\n", "line 2 is not a subject"),
        ("toys.csv", b"id,images\n\xff,b\n", "not a text in UTF-8"),
        ("toys.csv", b'id,images\n"a,b\n', "can't be read as CSV"),
        ("toys.txt", b"", "is not a folder of folders"),
        ("toys", None, "holds no folders"),
        ("gone.jsonl", None, "can't be read"),
    ],
)
def test_what_is_no_list_is_told(name: str, content: bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    elif "." not in name:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=words):
        read_subjects(tmp_path / name, never)  # type: ignore[arg-type]
