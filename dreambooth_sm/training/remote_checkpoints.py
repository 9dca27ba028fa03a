"""Checkpoints in S3, of jobs whose checkpoint directory SageMaker does not sync.

They lie beside the model that is to come, in ``TARGET/checkpoints/step-N``, each with a manifest, and are removed once
the model is there. They travel while training goes on: one at a time, two requests at a time.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from dreambooth_sm.background import Background
from dreambooth_sm.errors import UserError
from dreambooth_sm.report import Reporter
from dreambooth_sm.storage import (
    MANIFEST_NAME,
    S3Options,
    S3Uri,
    TransferError,
    delete_directory,
    download_directory,
    list_objects,
    upload_directory,
)
from dreambooth_sm.training.checkpoint import all_checkpoints

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_WORKERS = 2


class RemoteCheckpoints:
    """Sends checkpoints in the background. What fails is a warning: training does not end for it.

    As a context manager it waits, on the way out, until the last checkpoint has arrived.

    Args:
        target: where the model will be uploaded to.
        client: for every request.
    """

    def __init__(self, target: S3Uri, options: S3Options, client: S3Client, report: Reporter) -> None:
        self.place = target / "checkpoints"
        self._options, self._client, self._report = options, client, report
        self._background = Background("checkpoints to S3", self._send)

    def __enter__(self) -> RemoteCheckpoints:
        self._background.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.close()

    def send(self, checkpoint: Path) -> None:
        """Takes a checkpoint's directory and returns at once; one that still waits gives way to it."""
        # Linked, because the checkpoint may be removed for a newer one while it is on its way.
        linked = checkpoint.with_name(f".sending-{checkpoint.name}")
        try:
            shutil.rmtree(linked, ignore_errors=True)
            shutil.copytree(checkpoint, linked, copy_function=os.link)
        except OSError as error:
            self._report.warn(f"the checkpoint {checkpoint.name} is not in S3: {error}")
            return
        for replaced in self._background.take_back():
            shutil.rmtree(replaced, ignore_errors=True)
        self._background.add(linked)

    def _send(self, directory: Path) -> None:
        name = directory.name.removeprefix(".sending-")
        try:
            upload_directory(directory, self.place / name, self._options, workers=_WORKERS, client=self._client)
            for other in self._steps():
                if other != name:
                    delete_directory(self.place / other, self._options, client=self._client)
        except (TransferError, UserError, OSError) as error:
            self._report.warn(f"the checkpoint {name} is not in S3: {error}")
        shutil.rmtree(directory, ignore_errors=True)

    def _steps(self) -> list[str]:
        """The checkpoints there, whole or not, newest first."""
        names = {key.partition("/")[0] for key in list_objects(self.place, self._options, client=self._client)}
        return sorted((name for name in names if re.fullmatch(r"step-\d+", name)), reverse=True)

    def fetch(self, root: Path) -> None:
        """Puts the newest whole checkpoint below ``root``, unless it is there undamaged."""
        listed = list_objects(self.place, self._options, client=self._client)
        here = {checkpoint.directory.name: checkpoint for checkpoint in all_checkpoints(root)}
        for name in self._steps():
            if f"{name}/{MANIFEST_NAME}" not in listed:
                continue
            if name in here and here[name].is_undamaged():
                return
            partial = root / f".partial-{name}"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                download_directory(self.place / name, partial, self._options, client=self._client)
                shutil.rmtree(root / name, ignore_errors=True)
                partial.rename(root / name)
            except (TransferError, UserError, OSError) as error:
                shutil.rmtree(partial, ignore_errors=True)
                self._report.warn(f"{error}: going back to the checkpoint before")
                continue
            self._report.say(f"checkpoint {name} came from {self.place}")
            return

    def clear(self) -> None:
        """Removes them all: the finished model stands for them."""
        try:
            for name in self._steps():
                delete_directory(self.place / name, self._options, client=self._client)
        except (TransferError, UserError) as error:
            self._report.warn(f"checkpoints that are no longer needed could not be removed: {error}")
