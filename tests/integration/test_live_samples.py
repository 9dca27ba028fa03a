"""Validation pictures while a job runs, and a report that covers all of a job's attempts."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreambooth_sm.errors import EXIT_OK, EXIT_STOPPED
from dreambooth_sm.storage import MANIFEST_NAME, S3Uri, download_directory, list_objects, read_manifest, verify
from launcher.local.s3 import EmbeddedS3
from tests.helpers.faulty_s3 import FaultySchedule, faulty
from tests.helpers.jobs import JobTree, end, read_until
from tests.helpers.services import eventually

DRAWING = {
    "class_prompt": "None",
    "use_ema": "false",
    "validation_prompt": "photo of zwx toy",
    "validation_guidance_scale": "1",
}


def samples_in(target: S3Uri, s3: EmbeddedS3) -> list[str]:
    return sorted(key for key in list_objects(target, client=s3.client()) if key.startswith("samples/"))


def test_pictures_are_in_s3_before_the_job_ends_and_are_sent_once(
    lay_out_job: Callable[..., JobTree], target: S3Uri, s3: EmbeddedS3
) -> None:
    client = s3.client()
    client.put_bucket_versioning(Bucket=target.bucket, VersioningConfiguration={"Status": "Enabled"})
    values = {**DRAWING, "manual_upload_model_path": str(target), "validation_steps": "1"}
    assert lay_out_job("earlier", **values, s3_tags="job=earlier").run().code == EXIT_OK
    earlier = read_manifest(target, client=client)
    there = samples_in(target, s3)
    assert len(there) == 3

    job = lay_out_job(**values | {"seed": "8", "max_train_steps": "1000"}, s3_tags="job=mine")
    process = job.start()
    log = read_until(process, "^validation=2 ")
    eventually(lambda: [key for key in samples_in(target, s3) if key not in there and "/step-000002" in key])
    assert process.poll() is None
    # An earlier model with pictures of the same steps, prompts and seeds is whole while this job's pictures come.
    assert verify(target, client=client).whole
    assert read_manifest(target, client=client) == earlier
    process.send_signal(signal.SIGTERM)
    ended = end(process, log)
    assert ended.code == EXIT_STOPPED, ended.log
    last = int(ended.steps[-1]["step"])
    assert sum(f"/step-{last:06}" in key for key in samples_in(target, s3)) == 1, "what is left is sent"

    # A new instance has nothing of this one's disk, but for the synced checkpoints.
    shutil.rmtree(job.model)
    job.model.mkdir()
    job.set(max_train_steps=str(last + 2))
    ended = job.run()
    assert ended.code == EXIT_OK, ended.log
    files = [entry.path for entry in read_manifest(target, client=client).files]
    mine = [name for name in files if name.startswith("samples/")]
    assert [int(name[13:19]) for name in mine] == list(range(last + 3))
    assert verify(target, client=client).whole
    versions = client.get_paginator("list_object_versions").paginate(Bucket=target.bucket)
    sent = Counter(version["Key"] for page in versions for version in page["Versions"])
    assert [sent[f"{target.prefix}/{name}"] for name in mine[-2:]] == [1, 1]
    tags = client.get_object_tagging(Bucket=target.bucket, Key=f"{target.prefix}/{mine[-1]}")["TagSet"]
    assert tags == [{"Key": "job", "Value": "mine"}]


class Outage(FaultySchedule):
    """A server that fails as long as it is told to."""

    def __init__(self) -> None:
        super().__init__(0, checksums=True)
        self.lasts = False

    def next(self) -> tuple[str | None, float]:
        return "internal error" if self.lasts else None, 0.5


def test_a_server_that_fails_only_warns_and_the_upload_brings_the_pictures(
    lay_out_job: Callable[..., JobTree], target: S3Uri, s3: EmbeddedS3
) -> None:
    outage = Outage()
    with faulty(s3, outage) as url:
        job = lay_out_job(**DRAWING, manual_upload_model_path=str(target), max_train_steps="60")
        process = JobTree(job.base, {**job.environment, "AWS_ENDPOINT_URL": url, "AWS_ENDPOINT_URL_S3": url}).start()
        log = read_until(process, "^phase=load_base state=started")
        outage.lasts = True
        log += read_until(process, "^warning: the pictures of step 0 are not in S3 yet")
        assert samples_in(target, s3) == []
        outage.lasts = False
        ended = end(process, log)
    assert ended.code == EXIT_OK, ended.log
    assert ended.log.count(" are not in S3 yet") == 1
    assert [name[:19] for name in samples_in(target, s3)] == ["samples/step-000000", "samples/step-000060"]
    assert verify(target, client=s3.client()).whole


# --- All attempts in one report ---------------------------------------------------------------------------------------

STEPS = 28
# Neither pictures nor checkpoints come where a metric line does.
INTERRUPTED = DRAWING | {
    "max_train_steps": str(STEPS),
    "logging_steps": "5",
    "validation_steps": "8",
    "save_steps": "7",
    "lr_scheduler": "cosine",
}


def curve(facts: dict[str, Any]) -> list[dict[str, float]]:
    """What of the metric lines has to be the same on every machine, at any speed."""
    return [{k: v for k, v in row.items() if k not in ("steps_per_s", "vram_gb")} for row in facts["steps"]]


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    base = tmp_path_factory.mktemp("uninterrupted") / "opt-ml"
    job = JobTree.lay_out(base, INTERRUPTED, {"images": pictures, "model": tiny_base}, {})
    ended = job.run()
    assert ended.code == EXIT_OK, ended.log
    return json.loads((job.model / "report.json").read_text()), job.model


@pytest.mark.parametrize(
    ("end_by", "synced"), [(signal.SIGTERM, True), (signal.SIGKILL, False)], ids=["SIGTERM, synced", "SIGKILL, in S3"]
)
def test_after_interruptions_the_report_covers_the_whole_training(
    end_by: signal.Signals,
    synced: bool,
    lay_out_job: Callable[..., JobTree],
    uninterrupted: tuple[dict[str, Any], Path],
    target: S3Uri,
    s3: EmbeddedS3,
) -> None:
    job = lay_out_job(**INTERRUPTED | ({} if synced else {"manual_upload_model_path": str(target)}))
    if not synced:
        (job.base / "checkpoints").rmdir()
    for drawn, saved in ((8, 7), (16, 14)):
        process = job.start()
        log = read_until(process, f"^validation={drawn} ")
        if end_by == signal.SIGKILL and not synced:  # only what has arrived outlives the instance
            manifest = f"checkpoints/step-{saved:08}/{MANIFEST_NAME}"
            eventually(lambda key=manifest: key in list_objects(target, client=s3.client()))
        process.send_signal(end_by)
        assert end(process, log).code == (EXIT_STOPPED if end_by == signal.SIGTERM else -signal.SIGKILL)
        shutil.rmtree(job.model)
        job.model.mkdir()
    ended = job.run()
    assert ended.code == EXIT_OK, ended.log

    if not synced:
        shutil.rmtree(job.model)
        download_directory(target, job.model, client=s3.client())
    facts = json.loads((job.model / "report.json").read_text())
    whole, whole_model = uninterrupted
    assert [row["step"] for row in facts["steps"]] == [1, *range(5, STEPS, 5), STEPS]
    assert curve(facts) == curve(whole)
    assert facts["samples"] == whole["samples"]
    for sample in facts["samples"]:
        assert (job.model / sample["file"]).read_bytes() == (whole_model / sample["file"]).read_bytes()
        with Image.open(job.model / sample["file"]) as picture:
            assert picture.text["prompt"] == sample["prompt"]  # type: ignore[attr-defined]
    steps_done = [(attempt["first_step"], attempt["last_step"]) for attempt in facts["attempts"]]
    (_, first), (_, second), _ = steps_done
    assert steps_done == [(0, first), (first, second), (second, STEPS)]
    assert 0 < first < second < STEPS
    trained = sum(attempt["seconds"]["train"] for attempt in facts["attempts"])
    assert facts["phases_seconds"]["train"] == pytest.approx(trained, abs=0.01)
    assert min(attempt["seconds"]["train"] for attempt in facts["attempts"]) > 0
    text = (job.model / "README.md").read_text()
    assert f"interrupted after steps {first}, {second}" in text
    assert re.findall(r"!\[step (\d+), seed \d+\]\(samples", text)[:2] == ["0", str(STEPS)]
