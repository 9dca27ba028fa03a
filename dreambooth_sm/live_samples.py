"""Validation pictures where people can look at them while training continues.

With a target in S3 they travel to ``TARGET/samples``, where the finished model's upload finds them and does not send
them again. They come before any manifest of this job, and replace nothing that an earlier job's manifest lists: a
picture's name depends on its content. Without a target they are put into the directory that SageMaker syncs.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from dreambooth_sm.background import Background
from dreambooth_sm.context import upload_client
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.report import Listener, Reporter, ValidationPicture
from dreambooth_sm.sagemaker import Contract
from dreambooth_sm.storage import S3Options, S3Uri, TransferError, put_object
from dreambooth_sm.validation import SAMPLES

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# Seconds that pictures may keep a job that ends.
_LONGEST_WAIT = 20.0


class RemoteSamples(Listener):
    """Sends pictures in the background, one request at a time. What fails is a warning: the model's upload brings it.

    As a context manager it leaves what still waits to the model's upload; on the way out of a job that failed or was
    stopped it sends that as well, as long as it works, and for 20 s at most.

    Args:
        target: where the model will be uploaded to.
        client: for every request; one that soon gives up.
    """

    def __init__(self, target: S3Uri, options: S3Options, client: S3Client, report: Reporter) -> None:
        self.place = target / SAMPLES
        self._options, self._client, self._report = options, client, report
        self._background = Background("pictures to S3", self._send)

    def __enter__(self) -> RemoteSamples:
        self._background.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._background.take_back()
        self._background.close(_LONGEST_WAIT)

    def drew(self, pictures: Sequence[ValidationPicture]) -> None:
        """Takes the pictures of a step and returns at once."""
        self._background.add(pictures)

    def _send(self, samples: Sequence[ValidationPicture]) -> None:
        try:
            for sample in samples:
                put_object(self.place / sample.path.name, sample.path.read_bytes(), self._options, client=self._client)
        except (TransferError, UserError, OSError) as error:
            self._report.warn(f"the pictures of step {samples[0].step} are not in S3 yet: {error}")
            if self._background.is_closing:
                self._background.take_back()


class SyncedSamples(Listener):
    """Puts pictures into ``samples`` below the directory that SageMaker syncs to S3 while the job runs."""

    def __init__(self, synced: Path) -> None:
        self.directory = synced / SAMPLES

    def drew(self, pictures: Sequence[ValidationPicture]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            shutil.copyfile(picture.path, self.directory / picture.path.name)


def live_samples(
    h: Hyperparameters,
    contract: Contract,
    target: S3Uri | None,
    background: contextlib.ExitStack,
    report: Reporter,
) -> RemoteSamples | SyncedSamples | None:
    """Chooses where validation pictures go while the job runs: the model's place in S3, or the synced directory."""
    if target is not None:
        client = upload_client(h, attempts=2, timeout=10)
        return background.enter_context(RemoteSamples(target, h.s3_options, client, report))
    synced = contract.checkpoint_directory
    return SyncedSamples(synced) if contract.keeps_checkpoints else None
