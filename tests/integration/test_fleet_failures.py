"""Fleets that fail for reasons that are not their subjects', and processes that plan the same subjects again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_FAILURE
from dreambooth_sm.fleet.outcome import FAILURE_NAME, Failure
from dreambooth_sm.fleet.subjects import FleetSubject
from dreambooth_sm.storage import S3Options, S3Uri, create_object, get_object, list_objects, put_object
from launcher.aws.clients import Clients
from launcher.fleets.fleet import Fleet
from launcher.fleets.state import FleetState, write_state
from launcher.local.clients import EmbeddedClients
from launcher.local.s3 import EmbeddedS3
from launcher.local.services import EmbeddedServices, embedded_services
from tests.helpers.jobs import JobTree
from tests.helpers.services import Workplace
from tests.helpers.training import paint_pictures

OPTIONS = S3Options()


def subjects_of(*names: str) -> tuple[FleetSubject, ...]:
    return tuple(FleetSubject(name, f"s3://pictures/{name}", None, {}) for name in names)


def state_in(root: S3Uri, clients: Clients, request: dict[str, Any] | None = None, **lists: Any) -> FleetState:
    facts = {
        "name": "toys",
        "request": request or {"HyperParameters": {"instance_prompt": "x"}},
        "parallel": 1,
        "models": str(root),
    }
    named = {name.replace("_", "-"): subjects for name, subjects in lists.items()}
    write_state(root, {**facts, "alternatives": []}, named, OPTIONS, clients)
    return known(root, clients)


def known(root: S3Uri, clients: Clients) -> FleetState:
    state = FleetState(root, clients)
    state.look()
    return state


def fail(root: S3Uri, clients: Clients, job: str, **reasons: str) -> None:
    for subject, reason in reasons.items():
        place = root / "jobs" / job / "outcomes" / subject / FAILURE_NAME
        put_object(place, Failure(subject, reason, False, job).to_json().encode(), client=clients("s3"))


# The same list, by two processes


def test_of_two_processes_one_plans_subjects_again(s3: EmbeddedS3, target: S3Uri) -> None:
    clients = EmbeddedClients(s3, with_s3=True)
    one = state_in(target, clients, toys_0001=subjects_of("duck", "cat", "dog"))
    fail(target, clients, "toys-0001", duck="x", cat="y")
    one.look()
    other = known(target, clients)
    assert one.plan_again(["duck", "cat"])
    assert not other.plan_again(["cat", "dog"]), "the first list of this round is there"
    for state in (one, other, known(target, clients)):
        state.look()
        assert {subject.id for subject in state.lists["toys-r01-0001"]} == {"duck", "cat"}
        assert state.job_of == {"duck": "toys-r01-0001", "cat": "toys-r01-0001", "dog": "toys-0001"}
        assert not state.ended
    assert other.plan_again(["dog"]), "the next round is free"
    assert known(target, clients).job_of["dog"] == "toys-r02-0001"


def test_an_object_is_created_once(target: S3Uri, s3: EmbeddedS3) -> None:
    client = s3.client()
    assert create_object(target / "a", b"one", client=client)
    assert create_object(target / "a", b"one", client=client), "as after a lost answer"
    assert not create_object(target / "a", b"two", client=client)
    assert get_object(target / "a", client=client) == b"one"


@pytest.mark.parametrize("code", ["NotImplemented", "InvalidArgument"])
def test_servers_without_conditional_writes_are_asked_before(
    code: str, target: S3Uri, s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = s3.client()
    put = client.put_object

    def refusing(**request: Any) -> Any:
        if "IfNoneMatch" in request:
            raise ClientError({"Error": {"Code": code, "Message": "no such header"}}, "PutObject")
        return put(**request)

    monkeypatch.setattr(client, "put_object", refusing)
    assert create_object(target / "a", b"one", client=client)
    assert not create_object(target / "a", b"two", client=client)
    assert get_object(target / "a", client=client) == b"one"


# The same failure, of all subjects


def test_a_fleet_whose_subjects_all_fail_alike_starts_no_more_jobs(services: EmbeddedServices) -> None:
    workplace = Workplace(services)
    clients, root = workplace.clients, workplace.bucket / "fleets" / "toys"
    request = workplace.request(hyperparameters={"instance_prompt": "photo of zwx"})
    request["CheckpointConfig"] = {"S3Uri": "s3://unused"}
    lists = {f"toys_{n:04d}": subjects_of(f"a{n}", f"b{n}") for n in (1, 2, 3)}
    state_in(root, clients, request, **lists)
    fleet = Fleet(root, clients)
    fail(root, clients, "toys-0001", a1="no disk", b1="no disk")
    fleet.status()
    assert fleet._waiting() == ["toys-0002", "toys-0003"], "two may be chance"
    fail(root, clients, "toys-0002", a2="no disk", b2="no disk")
    lines: list[str] = []
    fleet.wait(lines.append)
    (said,) = [line for line in lines if line.startswith("nothing more is started")]
    assert "no disk; put that right, then retry()" in said
    assert not services.sagemaker.jobs
    fail(root, clients, "toys-0002", a2="another reason")
    again = Fleet(root, clients)
    again.status()
    assert again._waiting() == ["toys-0003"]


def test_why_a_whole_job_failed_is_told(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text("raise SystemExit('no disk')")
    with embedded_services(entrypoint=program) as services:
        workplace = Workplace(services)
        root = workplace.bucket / "fleets" / "toys"
        put_object(root / "pictures" / "duck.txt", b"quack", client=workplace.clients("s3"))
        request = workplace.request({"images": str(root / "pictures")}, {"instance_prompt": "photo of zwx"})
        request["CheckpointConfig"] = {"S3Uri": str(root / "checkpoints")}
        state_in(root, workplace.clients, request, toys_0001=subjects_of("duck"))
        lines: list[str] = []
        Fleet(root, workplace.clients).wait(lines.append)
        reason = services.sagemaker.named("toys-0001").describe()["FailureReason"]
    assert "AlgorithmError" in reason
    assert lines[-2:] == [f"failed: toys-0001: {reason}", "without an end: duck; retry() tries them again"]


@pytest.mark.slow
def test_a_job_whose_subjects_all_fail_alike_ends_early(tiny_base: Path, s3: EmbeddedS3, tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(6)]
    channel = tmp_path / "channel"
    for number, name in enumerate(names):
        paint_pictures(channel / name, 2, seed=number)
    rows = [{"id": name, "images": name, "instance_prompt": "photo of zwx toy"} for name in names]
    (channel / "fleet.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    values = {
        "fleet": "/opt/ml/input/data/fleet/fleet.jsonl",
        "class_prompt": "None",
        "max_train_steps": "1",
        "validation_prompt": "a toy",
        "fidelity_encoders": "dino=/opt/nothing-here",
    }
    tree = JobTree.lay_out(tmp_path / "fleet", values, {"fleet": channel, "model": tiny_base}, s3.environment())
    ended = tree.run("train")
    assert ended.code == EXIT_FAILURE, ended.log
    assert (tree.failure or "").startswith("the first 3 of 6 subjects failed alike, and 3 were not tried")
    assert sorted(path.parent.name for path in tree.model.glob(f"*/{FAILURE_NAME}")) == names[:3]


@pytest.mark.slow
def test_places_that_all_share_are_tried_before_the_first_subject(
    tiny_base: Path, s3: EmbeddedS3, target: S3Uri, tmp_path: Path
) -> None:
    channel = tmp_path / "channel"
    paint_pictures(channel / "duck", 2)
    (channel / "fleet.jsonl").write_text(json.dumps({"id": "duck", "images": "duck"}))
    values = {
        "fleet": "/opt/ml/input/data/fleet/fleet.jsonl",
        "instance_prompt": "photo of zwx",
        "manual_upload_model_path": "s3://no-such-bucket-of-anybody/models",
        "fleet_outcomes": "s3://no-such-bucket-of-theirs/outcomes",
    }
    tree = JobTree.lay_out(tmp_path / "fleet", values, {"fleet": channel, "model": tiny_base}, s3.environment())
    ended = tree.run("train")
    assert ended.code == EXIT_BAD_INPUT, ended.log
    for bucket in ("no-such-bucket-of-anybody", "no-such-bucket-of-theirs"):
        assert bucket in (tree.failure or "")
    assert "subject=duck" not in ended.log
    assert not list_objects(target, client=s3.client())
