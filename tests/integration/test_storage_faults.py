"""200 schedules of faults on the way to S3: each ends in a verified model, or in a clear failure that costs nothing."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import boto3.session
import pytest

from dreambooth_sm import storage
from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import (
    MANIFEST_NAME,
    S3Uri,
    TransferError,
    download_directory,
    list_objects,
    s3_client,
    upload_directory,
    verify,
)
from launcher.local.s3 import EmbeddedS3
from tests.helpers.faulty_s3 import KINDS, FaultySchedule, faulty

BUCKET = "faults"
PART = 5 * 2**20
SCHEDULES = 200
SMALL = {f"part-{number}/config.json": bytes([number]) * (40 * number) for number in range(6)}
# Two parts; S3 takes none that are smaller, so that few schedules can have them.
LARGE = {"unet/weights.safetensors": bytes(range(256)) * (PART // 256) + b"end"}


@pytest.fixture(scope="module")
def account(s3: EmbeddedS3) -> boto3.session.Session:
    return s3.session()


@pytest.fixture(scope="module")
def clean(s3: EmbeddedS3, account: boto3.session.Session) -> storage.S3Client:
    """A client that meets no faults."""
    client = s3_client(account, endpoint_url=s3.endpoint_url)
    client.create_bucket(Bucket=BUCKET)
    return client


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once."""
    immediately = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("botocore.endpoint.time", immediately)
    monkeypatch.setattr("dreambooth_sm.s3.time", immediately)


def write(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def read(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


class Schedules:
    """Transfers under each schedule of faults: what came of them, and which faults they met.

    Args:
        seen: directory in which all processes that run these tests leave what they saw.
    """

    def __init__(self, s3: EmbeddedS3, clean: storage.S3Client, account: boto3.session.Session, seen: Path) -> None:
        self._s3, self._clean, self._account, self._seen = s3, clean, account, seen

    def seen(self, seed: int, directory: Path) -> Counter[str]:
        there = self._seen / f"{seed}.json"
        if not there.exists():
            found = self._run(seed, directory)
            whole = there.with_suffix(f".{os.getpid()}")
            whole.write_text(json.dumps(found))
            whole.replace(there)
        return Counter(json.loads(there.read_text()))

    def _run(self, seed: int, directory: Path) -> Counter[str]:
        clean, seen = self._clean, Counter[str]()
        target = S3Uri(BUCKET, f"schedule-{seed}")
        schedule = FaultySchedule(seed, checksums=seed % 4 != 3)
        files = SMALL | (LARGE if seed % 10 == 0 else {})
        model = write(directory / "model", files)
        with faulty(self._s3, schedule) as url:
            client = s3_client(self._account, endpoint_url=url, attempts=4, timeout=5)
            failure = ""
            try:
                manifest = upload_directory(model, target, part_size=PART, client=client, workers=2)
            except (TransferError, UserError) as error:
                failure = str(error)
                seen["upload failed"] += 1
            else:
                assert [entry.path for entry in manifest.files] == sorted(files)
                assert MANIFEST_NAME in list_objects(target, client=clean)
                seen["uploaded"] += 1
            assert not failure or str(target) in failure, "it says where"
            assert read(model) == files, "the files are still there"

            # A manifest is never over anything but the whole model, whatever the upload said.
            if MANIFEST_NAME in list_objects(target, client=clean):
                try:
                    assert verify(target, client=clean).whole
                except UserError as error:
                    # One that a server without checksums took in with a flipped bit, and that could not be removed.
                    assert failure and not schedule.checksums and "damaged" in str(error), error  # noqa: PT017, PT018
                    return seen
                for name, content in files.items():
                    body = clean.get_object(Bucket=target.bucket, Key=(target / name).prefix)["Body"].read()
                    assert body == content, name

                copy = directory / "copy"
                try:
                    download_directory(target, copy, client=client, workers=2)
                except (TransferError, UserError):
                    seen["download failed"] += 1
                    assert read(copy).items() <= files.items(), "what has its name is whole"
                else:
                    assert read(copy) == files
                    seen["downloaded"] += 1
        return seen + schedule.met


@pytest.fixture(scope="module")
def schedules(
    s3: EmbeddedS3,
    clean: storage.S3Client,
    account: boto3.session.Session,
    tmp_path_factory: pytest.TempPathFactory,
) -> Schedules:
    own = tmp_path_factory.getbasetemp()
    seen = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "schedules-of-faults"
    seen.mkdir(exist_ok=True)
    return Schedules(s3, clean, account, seen)


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_a_schedule_of_faults(seed: int, schedules: Schedules, tmp_path: Path) -> None:
    assert schedules.seen(seed, tmp_path)


def test_the_schedules_were_hard_and_could_be_met(schedules: Schedules, tmp_path: Path) -> None:
    # Those that no process has run yet are run here.
    seen = sum((schedules.seen(seed, tmp_path / str(seed)) for seed in range(SCHEDULES)), Counter[str]())
    for outcome in ("uploaded", "upload failed", "downloaded", "download failed"):
        assert seen[outcome] >= SCHEDULES / 20, seen
    for kind in KINDS:
        assert seen[kind] >= 10, seen
