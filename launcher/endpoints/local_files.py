"""What an endpoint on SageMaker is to serve and lies on this machine: where it goes to in S3, and how it gets there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.serving.report import REPORT
from dreambooth_sm.sources import is_local
from dreambooth_sm.storage import S3Options, S3Uri
from dreambooth_sm.stored.locate import INDEX
from launcher.aws.account import Account
from launcher.channels import SINGLE_FILES
from launcher.endpoints.models import Served
from launcher.resources import WORKSPACE
from launcher.staging import all_files, digest, stage

_FOLDER = "models"
_NO_BUCKET = "unknown"


@dataclass(frozen=True)
class LocalFiles:
    """A directory or a file of this machine that an endpoint is to serve.

    Attributes:
        place: in S3, named after the content.
        files: by their names below it.
    """

    source: Path
    place: S3Uri
    files: Mapping[str, Path]

    def line(self) -> str:
        """Tells people what goes to S3, unless it is there."""
        size = sum(path.stat().st_size for path in self.files.values())
        return f"files: {len(self.files)} of {self.source}, {size:,} bytes, for {self.place}"

    def report(self) -> Mapping[str, Any]:
        """That of the job that left them, or of the first of several; empty where there is none."""
        names = sorted((name.count("/"), name) for name in self.files if Path(name).name == REPORT)
        try:
            found = json.loads(self.files[names[0][1]].read_text(encoding="utf-8")) if names else {}
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


def find_local_files(
    served: Served, account: Account, bucket: str | None, problems: Problems
) -> tuple[Served, tuple[LocalFiles, ...]]:
    """Finds what has to be sent before an endpoint can serve it.

    Args:
        bucket: that it goes to; None: the one that SageMaker's SDKs use.
        problems: gets those of directories that hold nothing to serve, and of the bucket.

    Returns:
        the same with the places in S3, and what has to be there: no files, where problems say what is wrong with them.
    """
    places: dict[str, str | Path | None] = {}
    found: list[LocalFiles] = []
    for field, text in (("model", served.model), ("base_model", served.base_model), ("adapters", served.adapters)):
        if text is None or not is_local(text) or not Path(text).exists():
            continue
        if not found and bucket is None:
            bucket = _NO_BUCKET
            with problems.collected():
                bucket = account.find_bucket()
        files: Mapping[str, Path] = {}
        with problems.collected():
            files = _files(field, Path(text))
        place = S3Uri(bucket or _NO_BUCKET, WORKSPACE) / _FOLDER / digest(files)
        found.append(LocalFiles(Path(text), place, files))
        places[field] = str(place)
    return served.changed(**places), tuple(found)


def send(files: Sequence[LocalFiles], account: Account, say: Callable[[str], None]) -> None:
    """Sends what is not in S3 yet, verified, with a manifest that is written last; makes a bucket that is missing.

    Args:
        say: gets a line about each.

    Raises:
        UserError: no permission.
        TransferError: the transfer failed in spite of retries.
    """
    if made := account.make_bucket():
        say(f"bucket: made {made}")
    for each in files:
        sent = stage(each.files, each.place, account.clients("s3"), S3Options())
        say(f"files: {len(each.files)} {'sent to' if sent else 'already in'} {each.place}")


def _files(field: str, path: Path) -> dict[str, Path]:
    """The files of a model, or of a folder of adapters; nothing else is sent by mistake.

    Raises:
        UserError: it holds neither.
    """
    files = {path.name: path} if path.is_file() else all_files(path)
    below = 1 if field == "adapters" else 0
    if not any(
        name.count("/") == below and (name.endswith(SINGLE_FILES) or (not below and name == INDEX)) for name in files
    ):
        raise UserError(
            f"{field}: {path} holds no adapter in a folder of its own; name the folder above those that jobs left"
            if below
            else f"{field}: {path} holds no model; name a directory that a job left, or a .safetensors file"
        )
    return files
