"""Directories of a job that the platform keeps in S3 while the job runs."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from dreambooth_sm.storage import S3Uri, download_directory, list_objects
from launcher.aws.clients import Clients


class SyncedDirectory:
    """A directory whose files are sent when they are new or changed.

    Args:
        directory: made if missing.
        target: where they go.
        deletes: whether what is deleted here is deleted there.
    """

    def __init__(self, directory: Path, target: S3Uri, clients: Clients, *, deletes: bool) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._target, self._clients, self._deletes = directory, target, clients, deletes
        self._sent: dict[str, tuple[int, int]] = {}

    def fetch(self) -> None:
        """Brings what an earlier instance left."""
        s3 = self._clients("s3")
        if list_objects(self._target, client=s3):
            download_directory(self._target, self._directory, client=s3)
        self._sent = file_states(self._directory)

    def sync(self) -> None:
        """Sends what is new."""
        s3, target, now = self._clients("s3"), self._target, file_states(self._directory)
        for name in [name for name in now if now[name] != self._sent.get(name)]:
            path = self._directory / name
            try:
                s3.upload_file(str(path), target.bucket, (target / name).prefix)
            except Exception:
                # Deleted meanwhile: what boto3 raises then depends on how far it was.
                if path.exists():
                    raise
        for name in self._sent.keys() - now.keys() if self._deletes else ():
            s3.delete_object(Bucket=target.bucket, Key=(target / name).prefix)
        self._sent = now


def file_states(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file below a directory by its relative path; SageMaker's own marks left out."""
    found = {}
    # Path.rglob fails where a directory is deleted while it looks.
    for path in (Path(folder, name) for folder, _, names in os.walk(directory) for name in names):
        with suppress(FileNotFoundError):  # deleted meanwhile
            if path.is_file() and not path.name.endswith((".sagemaker-uploading", ".sagemaker-uploaded")):
                stat = path.stat()
                found[path.relative_to(directory).as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return found
