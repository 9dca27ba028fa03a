"""Checkpoints that travel to S3 while training goes on."""

from __future__ import annotations

import io
import shutil
import threading
from pathlib import Path

import torch

from dreambooth_sm.report import Reporter
from dreambooth_sm.storage import S3Options, S3Uri, list_objects, s3_client, verify
from dreambooth_sm.training.checkpoint import save_checkpoint, undamaged_checkpoints
from dreambooth_sm.training.remote_checkpoints import RemoteCheckpoints
from launcher.local.s3 import EmbeddedS3
from tests.helpers.s3_proxy import Answer, Request, s3_proxy


def write_checkpoint(directory: Path, step: int) -> Path:
    checkpoint = directory / f"step-{step:08}"
    checkpoint.mkdir()
    (checkpoint / "tensors.pt").write_bytes(bytes([step]) * 1000)
    (checkpoint / "state.json").write_text(f'{{"step": {step}}}')
    return checkpoint


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
        with RemoteCheckpoints(target, S3Options(), client, Reporter(log)) as remote:
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
        with RemoteCheckpoints(target, S3Options(), client, Reporter(log)) as remote:
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
        save_checkpoint(tmp_path, step, {"seed": 7}, {"weights": {"w": torch.full((9,), float(step))}}, keep=5)
    newest = tmp_path / "step-00000002"
    log = io.StringIO()
    remote = RemoteCheckpoints(target, S3Options(), s3.client(), Reporter(log))
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
