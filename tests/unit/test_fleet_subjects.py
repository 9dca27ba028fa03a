"""The list of a fleet."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_sm.errors import UserError
from dreambooth_sm.fleet.outcome import Failure, states
from dreambooth_sm.fleet.subjects import FleetSubject, own_knobs, read_list, write_list
from dreambooth_sm.hyperparameters import Hyperparameters

_ENDS = st.sampled_from(string.ascii_letters + string.digits)
IDS = st.builds(lambda a, b, c: a + b + c, _ENDS, st.text(string.ascii_letters + "0123456789._-", max_size=62), _ENDS)
TEXTS = st.text(min_size=1).filter(lambda text: "\ud800" not in text)
SUBJECTS = st.builds(
    FleetSubject,
    IDS,
    st.just("s3://pictures/toys") | TEXTS.filter(lambda text: not text.startswith("s3:")),
    st.none(),
    st.fixed_dictionaries(
        {"instance_prompt": TEXTS}, optional={"seed": st.integers(0, 99), "learning_rate": st.floats(0, 1)}
    ),
)


@given(st.lists(SUBJECTS, min_size=1, unique_by=lambda subject: subject.id))
def test_what_is_written_is_read(subjects: list[FleetSubject]) -> None:
    text = write_list(subjects)
    assert text.count("\n") == len(subjects)
    assert list(read_list(text, "list")) == subjects


LINES = st.text() | st.dictionaries(st.text(), st.none() | st.text() | st.lists(st.none())).map(json.dumps)


@given(st.lists(LINES))
def test_whatever_a_list_holds_is_refused_by_line(lines: list[str]) -> None:
    with pytest.raises(UserError, match=r"list, line \d+|is empty"):
        read_list("\n".join(lines), "list")


def test_every_problem_of_every_line_is_told_by_its_subject() -> None:
    lines = [
        '{"id": "duck", "images": "duck"}',
        "[1]",
        "{",
        '{"id": "a/b", "images": 3, "output": "bucket/x"}',
        '{"id": "cat", "images": "s3:/x", "max_train_step": 3, "lora_rank": 4}',
        '{"id": "duck", "images": "other"}',
        "",
    ]
    with pytest.raises(UserError) as caught:
        read_list("\n".join(lines), "fleet.jsonl")
    told = caught.value.problems
    assert [problem.partition(" is not a subject")[0] for problem in told[:2]] == [
        "fleet.jsonl, line 2",
        "fleet.jsonl, line 3",
    ]
    for start, words in (
        ("line 4 (a/b): id: ", "letters"),
        ("line 4 (a/b): images", "text"),
        ("line 4 (a/b): output", "s3://bucket/prefix"),
        ("line 5 (cat): images", "s3://bucket/prefix"),
        ("line 5 (cat): 'max_train_step'", "did you mean max_train_steps?"),
        ("line 5 (cat): lora_rank", "the same for all subjects"),
        ("id: duck", "that of 2 subjects"),
    ):
        assert sum(start in problem and words in problem for problem in told) == 1, start
    with pytest.raises(UserError, match="is empty"):
        read_list("\n", "list")


def test_a_subject_has_the_hyperparameters_of_a_job_of_its_own() -> None:
    fleet = Hyperparameters.parse(
        {"fleet": "/opt/ml/input/data/fleet/fleet.jsonl", "class_prompt": "a toy", "lora_rank": 2, "method": "lora"}
    )
    values = {"instance_prompt": "zwx toy", "max_train_steps": "30"}
    found = FleetSubject("duck", "duck", None, values).hyperparameters(fleet, {}, instance_data_dir="/duck")
    alone = {"class_prompt": "a toy", "lora_rank": 2, "method": "lora", "instance_data_dir": "/duck", **values}
    assert found == Hyperparameters.parse(alone)
    assert found.model_fields_set == Hyperparameters.parse(alone).model_fields_set
    beside = FleetSubject("duck", "duck").hyperparameters(fleet, {"instance_prompt": "zwx duck"})
    assert beside.instance_prompt == "zwx duck"
    with pytest.raises(UserError, match="instance_prompt is missing"):
        FleetSubject("duck", "duck").hyperparameters(fleet, {})


def test_no_place_and_nothing_that_a_plan_or_a_model_depends_on_is_a_subjects_own() -> None:
    own = set(own_knobs())
    assert {"instance_prompt", "class_prompt", "seed", "learning_rate", "max_train_steps"} <= own
    assert not own & set(Hyperparameters.names_where(lambda knob: knob.path or bool(knob.methods)))
    assert not own & {"resolution", "optimizer", "train_batch_size", "method", "prior", "prior_loss_weight"}


def test_a_listing_tells_what_has_ended() -> None:
    names = ["b/failure.json", "a/unet/manifest.json", "b/manifest.json", "c/failure.json", "d/x.png", "manifest.json"]
    assert states(names) == {"b": True, "c": False}


def test_a_failure_is_read_as_it_was_written() -> None:
    failure = Failure("duck", "pictures: none", True, "job-1")
    assert Failure.from_json(failure.to_json()) == failure
    for other in ("[]", "{}", "x", '{"subject": 1}'):
        with pytest.raises(ValueError, match=r"."):
            Failure.from_json(other)
