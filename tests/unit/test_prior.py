"""Class images: those that are missing are drawn, each from its own seed."""

from __future__ import annotations

import dataclasses
import io
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.data.pictures import list_pictures
from dreambooth_sm.data.prior import complete_class_images
from dreambooth_sm.errors import StopRequested
from dreambooth_sm.models import BaseModel
from dreambooth_sm.report import Reporter
from dreambooth_sm.sampling import draw
from tests.helpers.training import make_subject

WANTED = 3


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreambooth_sm.sampling.STEPS", 2)
    monkeypatch.setattr(draw, "__kwdefaults__", {**draw.__kwdefaults__, "steps": 2})


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    made = make_subject(tmp_path, pictures=1)
    return dataclasses.replace(made, class_prompt="photo of a toy", class_directory=tmp_path / "new" / "class")


def complete(
    subject: Subject, base: BaseModel, tmp_path: Path, *, batch_size: int = 1, seed: int = 5, stop: bool = False
) -> Subject:
    asked = threading.Event()
    if stop:
        asked.set()
    return complete_class_images(
        subject,
        base.pipeline(),
        wanted=WANTED,
        resolution=64,
        batch_size=batch_size,
        guidance=7.5,
        seed=seed,
        scratch=tmp_path / "scratch",
        report=Reporter(io.StringIO()),
        stop=asked,
    )


def pixels(paths: tuple[Path, ...]) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)).astype(int) for path in paths]


def test_missing_pictures_are_drawn_beside_the_others(base: BaseModel, subject: Subject, tmp_path: Path) -> None:
    made = complete(subject, base, tmp_path).class_pictures
    assert [path.parent for path in made] == [subject.class_directory] * WANTED
    assert list_pictures(subject.class_directory) == sorted(made)
    seen = pixels(made)
    assert {picture.shape for picture in seen} == {(64, 64, 3)}
    assert not np.array_equal(seen[0], seen[1])


def test_each_picture_depends_on_its_own_seed_alone(base: BaseModel, subject: Subject, tmp_path: Path) -> None:
    one_by_one = pixels(complete(subject, base, tmp_path).class_pictures)
    elsewhere = dataclasses.replace(subject, class_directory=tmp_path / "other")
    together = pixels(complete(elsewhere, base, tmp_path, batch_size=2).class_pictures)
    for ours, theirs in zip(one_by_one, together, strict=True):
        assert np.abs(ours - theirs).max() <= 1  # sums of a batch may round differently
    again = dataclasses.replace(subject, class_directory=tmp_path / "again")
    other_seed = pixels(complete(again, base, tmp_path, seed=6).class_pictures)
    assert np.array_equal(other_seed[0], one_by_one[1])
    assert np.array_equal(other_seed[1], one_by_one[2])


def test_only_what_is_missing_is_drawn(base: BaseModel, subject: Subject, tmp_path: Path) -> None:
    whole = complete(subject, base, tmp_path).class_pictures
    kept = whole[:2]
    whole[2].unlink()
    before = [path.stat().st_mtime_ns for path in kept]
    last = np.asarray(
        pixels(complete(dataclasses.replace(subject, class_pictures=kept), base, tmp_path).class_pictures)[2]
    )
    assert [path.stat().st_mtime_ns for path in kept] == before
    elsewhere = dataclasses.replace(subject, class_directory=tmp_path / "other")
    assert np.array_equal(last, pixels(complete(elsewhere, base, tmp_path).class_pictures)[2])


def test_nothing_is_drawn_that_is_not_needed(subject: Subject, tmp_path: Path) -> None:
    nothing_to_draw_with: BaseModel = None  # type: ignore[assignment]
    for done in (
        dataclasses.replace(subject, class_prompt=None),
        dataclasses.replace(subject, class_pictures=tuple(tmp_path / f"{n}.png" for n in range(WANTED))),
    ):
        untouched = complete_class_images(
            done,
            nothing_to_draw_with,  # type: ignore[arg-type]
            wanted=WANTED,
            resolution=64,
            batch_size=1,
            guidance=7.5,
            seed=0,
            scratch=tmp_path / "scratch",
            report=Reporter(io.StringIO()),
            stop=threading.Event(),
        )
        assert untouched == done


def test_a_directory_that_can_not_be_written_gives_way_to_scratch(
    base: BaseModel, subject: Subject, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    blocked = dataclasses.replace(subject, class_directory=tmp_path / "file" / "class")
    made = complete(blocked, base, tmp_path).class_pictures
    assert {path.parent for path in made} == {tmp_path / "scratch"}


def test_a_stop_between_batches_keeps_what_is_done(base: BaseModel, subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(StopRequested, match="2 of 3"):
        complete(subject, base, tmp_path, batch_size=2, stop=True)
    assert len(list_pictures(subject.class_directory)) == 2


def test_drawing_leaves_the_pipelines_scheduler_as_it_was(base: BaseModel) -> None:
    pipeline = base.pipeline()
    before = pipeline.scheduler
    next(draw(pipeline, "a toy", [1], resolution=64)).clear()
    for _ in draw(pipeline, "a toy", [1], resolution=64):
        assert pipeline.scheduler is not before
    assert pipeline.scheduler is before
