"""Checkpoints in S3, of jobs whose checkpoint directory SageMaker does not sync.

They lie beside the model that is to come, in ``TARGET/checkpoints/step-N``, each with a manifest, and are removed once
the model is there; another job's stay. They travel while training continues: one at a time, two requests at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
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
    get_object,
    list_objects,
    upload_directory,
)
from dreambooth_sm.training.checkpoint import (
    CHECKPOINT_NAME,
    LARGEST_STATE,
    STATE,
    Checkpoint,
    all_checkpoints,
    own_name,
    parse_state,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_WORKERS = 2


class RemoteCheckpoints:
    """Sends checkpoints in the background. What fails is a warning: training does not end for it.

    As a context manager it waits, on the way out, until the last checkpoint has arrived.

    Args:
        target: where the model will be uploaded to.
        client: for every request.
        owns: whether a checkpoint is this job's, and may give way.
    """

    def __init__(
        self,
        target: S3Uri,
        options: S3Options,
        client: S3Client,
        report: Reporter,
        owns: Callable[[Checkpoint], bool],
    ) -> None:
        self.place = target / "checkpoints"
        self._options, self._client, self._report, self._owns = options, client, report, owns
        self._sent: set[str] = set()
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
            there = self._steps(list_objects(self.place, self._options, client=self._client))
            own = {other: self._is_own(other, found) for other, found in there.items() if found}
            place = own_name(int(name.split("-")[1]), own)
            self._sent.add(place)
            upload_directory(directory, self.place / place, self._options, workers=_WORKERS, client=self._client)
            self._remove(but=place)
        except (TransferError, UserError, OSError) as error:
            self._report.warn(f"the checkpoint {name} is not in S3: {error}")
        shutil.rmtree(directory, ignore_errors=True)

    def _steps(self, listed: Mapping[str, int]) -> dict[str, Checkpoint | None]:
        """The checkpoints there, whole or not, newest first; None of those whose record can't be read."""
        names = {key.partition("/")[0] for key in listed}
        steps = sorted((name for name in names if CHECKPOINT_NAME.fullmatch(name)), reverse=True)
        return {name: self._read(name) if listed.get(f"{name}/{STATE}", 0) <= LARGEST_STATE else None for name in steps}

    def _read(self, name: str) -> Checkpoint | None:
        try:
            content = get_object(self.place / name / STATE, self._options, client=self._client)
            return None if content is None else parse_state(content, Path(name))[0]
        except (ValueError, UserError):
            return None

    def _is_own(self, name: str, checkpoint: Checkpoint | None) -> bool:
        return name in self._sent or (checkpoint is not None and self._owns(checkpoint))

    def _remove(self, but: str | None = None) -> None:
        """Removes this job's checkpoints; another's, and what can't be told to be this one's, stay."""
        there = self._steps(list_objects(self.place, self._options, client=self._client))
        for name, checkpoint in there.items():
            if name != but and self._is_own(name, checkpoint):
                delete_directory(self.place / name, self._options, client=self._client)

    def fetch(self, root: Path) -> None:
        """Puts the newest whole checkpoint of this job below ``root``, unless it is there undamaged; where there is
        none, another job's."""
        listed = list_objects(self.place, self._options, client=self._client)
        there: dict[str, Checkpoint] = {}
        for name, checkpoint in self._steps(listed).items():
            if f"{name}/{MANIFEST_NAME}" in listed:
                if checkpoint:
                    there[name] = checkpoint
                else:
                    self._report.warn(f"the checkpoint {self.place / name} is damaged and passed over")
        own = {name: checkpoint for name, checkpoint in there.items() if self._owns(checkpoint)}
        here = all_checkpoints(root)
        for name, checkpoint in (own or there).items():
            same = next((c for c in here if (c.identity, c.crc32) == (checkpoint.identity, checkpoint.crc32)), None)
            if same and same.is_undamaged():
                return
            owned_here = {c.directory.name: self._owns(c) for c in here}
            place = same.directory if same else root / own_name(checkpoint.step, owned_here)
            partial = root / f".partial-{place.name}"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                download_directory(self.place / name, partial, self._options, client=self._client)
                shutil.rmtree(place, ignore_errors=True)
                partial.rename(place)
            except (TransferError, UserError, OSError) as error:
                shutil.rmtree(partial, ignore_errors=True)
                self._report.warn(f"{error}: going back to the checkpoint before")
                continue
            self._report.say(f"checkpoint {name} came from {self.place}")
            return

    def clear(self) -> None:
        """Removes this job's: the finished model stands for them."""
        try:
            self._remove()
        except (TransferError, UserError) as error:
            self._report.warn(f"checkpoints that are no longer needed could not be removed: {error}")
