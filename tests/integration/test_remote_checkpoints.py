"""Checkpoints that travel to S3 while training continues."""

from __future__ import annotations

import io
import shutil
import threading
from pathlib import Path
from typing import Any

import torch

from dreambooth_sm.report import Reporter
from dreambooth_sm.storage import S3Options, S3Uri, list_objects, put_object, s3_client, upload_directory, verify
from dreambooth_sm.training.checkpoint import Checkpoint, all_checkpoints, save_checkpoint, undamaged_checkpoints
from dreambooth_sm.training.remote_checkpoints import RemoteCheckpoints
from launcher.local.s3 import EmbeddedS3
from tests.helpers.s3_proxy import Answer, Request, s3_proxy

JOB, OTHER = {"seed": 7, "resolution": 512}, {"seed": 7, "resolution": 768}


def owns(checkpoint: Checkpoint) -> bool:
    return checkpoint.belongs_to(JOB)


def write_checkpoint(directory: Path, step: int, identity: dict[str, Any] = JOB) -> Path:
    tensors = {"weights": {"w": torch.full((9,), float(step))}}
    return save_checkpoint(directory, step, identity, tensors, keep=9).directory


def test_on_a_slow_network_the_newest_checkpoint_goes_next(tmp_path: Path, target: S3Uri, s3: EmbeddedS3) -> None:
    under_way, may_go_on = threading.Event(), threading.Event()
    written: list[str] = []

    def wait(request: Request) -> Answer | None:
        if request.method == "PUT":
            written.append(request.target)
            under_way.set()
            may_go_on.wait(60)
        return None

    log = io.StringIO()
    with s3_proxy(s3.endpoint_url, wait) as url:
        client = s3_client(s3.session(), endpoint_url=url)
        with RemoteCheckpoints(target, S3Options(), client, Reporter(log), owns) as remote:
            for step in (1, 2, 3):
                checkpoint = write_checkpoint(tmp_path, step)
                remote.send(checkpoint)
                assert under_way.wait(60)
                shutil.rmtree(checkpoint)  # as for a newer one, while it is on its way
            may_go_on.set()
    assert log.getvalue() == ""
    assert any("step-00000001" in path for path in written)
    assert not any("step-00000002" in path for path in written), "gave way to the newer one"
    assert {key.split("/")[1] for key in list_objects(target, client=s3.client())} == {"step-00000003"}
    assert verify(target / "checkpoints" / "step-00000003", client=s3.client()).whole
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_sent_is_a_warning_and_the_next_one_goes(
    tmp_path: Path, target: S3Uri, s3: EmbeddedS3
) -> None:
    refused = threading.Event()

    def refuse(request: Request) -> Answer | None:
        if request.method == "PUT" and "step-00000001" in request.target:
            refused.set()
            return Answer.error(403, "AccessDenied")
        return None

    log = io.StringIO()
    with s3_proxy(s3.endpoint_url, refuse) as url:
        client = s3_client(s3.session(), endpoint_url=url)
        with RemoteCheckpoints(target, S3Options(), client, Reporter(log), owns) as remote:
            remote.send(write_checkpoint(tmp_path, 1))
            assert refused.wait(60)
            remote.send(write_checkpoint(tmp_path, 2))
    assert log.getvalue().count("warning: the checkpoint step-00000001 is not in S3") == 1
    assert "step-00000002" not in log.getvalue()
    assert verify(target / "checkpoints" / "step-00000002", client=s3.client()).whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_damaged_checkpoint_is_fetched_again(tmp_path: Path, target: S3Uri, s3: EmbeddedS3) -> None:
    """Whole in S3, cut on this disk: the older ones are not what the job goes back to."""
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    newest = tmp_path / "step-00000002"
    log = io.StringIO()
    remote = RemoteCheckpoints(target, S3Options(), s3.client(), Reporter(log), owns)
    with remote:
        remote.send(newest)
    remote.fetch(tmp_path)
    assert "came from" not in log.getvalue()  # it is there
    content = (newest / "tensors.pt").read_bytes()
    (newest / "tensors.pt").write_bytes(bytes(len(content)))
    remote.fetch(tmp_path)
    assert f"checkpoint step-00000002 came from {target}" in log.getvalue()
    assert (newest / "tensors.pt").read_bytes() == content
    assert [checkpoint.step for checkpoint in undamaged_checkpoints(tmp_path)] == [2, 1]


def send(directory: Path, target: S3Uri, s3: EmbeddedS3) -> RemoteCheckpoints:
    with RemoteCheckpoints(target, S3Options(), s3.client(), Reporter(io.StringIO()), owns) as remote:
        remote.send(directory)
    return remote


def steps(target: S3Uri, s3: EmbeddedS3) -> set[str]:
    return {key.split("/")[0] for key in list_objects(target / "checkpoints", client=s3.client())}


def test_what_another_job_has_beside_the_model_stays(tmp_path: Path, target: S3Uri, s3: EmbeddedS3) -> None:
    """Whole ones, of the same steps and of others, and what nobody can read."""
    place, client = target / "checkpoints", s3.client()
    for step in (1, 2, 9):
        name = f"step-{step:08}"
        upload_directory(write_checkpoint(tmp_path / "other", step, OTHER), place / name, client=client)
    put_object(place / "step-00000005" / "tensors.pt", b"half", client=client)
    theirs = list_objects(place, client=client)
    remote = send(write_checkpoint(tmp_path / "own", 1), target, s3)
    assert steps(target, s3) == {*(f"step-{n:08}" for n in (1, 2, 5, 9)), "step-00000001-2"}
    send(write_checkpoint(tmp_path / "own", 2), target, s3)  # by the next start of the job
    assert steps(target, s3) == {*(f"step-{n:08}" for n in (1, 2, 5, 9)), "step-00000002-2"}
    assert verify(place / "step-00000002-2", client=client).whole
    remote.fetch(tmp_path / "new")
    (fetched,) = all_checkpoints(tmp_path / "new")
    assert (fetched.step, fetched.identity) == (2, JOB)
    remote.clear()
    assert list_objects(place, client=client) == theirs
    assert all(verify(place / f"step-{step:08}", client=client).whole for step in (1, 2, 9))


def test_what_is_fetched_takes_no_other_jobs_place(tmp_path: Path, target: S3Uri, s3: EmbeddedS3) -> None:
    remote = send(write_checkpoint(tmp_path / "own", 3), target, s3)
    other = write_checkpoint(tmp_path / "here", 3, OTHER)
    before = (other / "tensors.pt").read_bytes()
    for _ in range(2):
        remote.fetch(tmp_path / "here")
        assert [c.identity for c in all_checkpoints(tmp_path / "here")] == [OTHER, JOB]
    assert (other / "tensors.pt").read_bytes() == before


def test_without_one_of_its_own_a_job_is_told_of_anothers(tmp_path: Path, target: S3Uri, s3: EmbeddedS3) -> None:
    upload_directory(
        write_checkpoint(tmp_path / "other", 4, OTHER), target / "checkpoints" / "step-00000004", client=s3.client()
    )
    RemoteCheckpoints(target, S3Options(), s3.client(), Reporter(io.StringIO()), owns).fetch(tmp_path / "here")
    assert [c.identity for c in all_checkpoints(tmp_path / "here")] == [OTHER]
