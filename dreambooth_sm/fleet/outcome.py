"""What a fleet leaves of each subject: a model whose manifest was written last, or a small file that says why not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from dreambooth_sm.manifest import MANIFEST_NAME
from dreambooth_sm.s3 import Store
from dreambooth_sm.s3_uri import S3Uri
from dreambooth_sm.storage import get_object

FAILURE_NAME = "failure.json"
# As much of a reason as somebody reads in a list.
_MOST_REASON = 1000


@dataclass(frozen=True)
class Failure:
    """Why a subject has no model.

    Attributes:
        subject: its id.
        reason: what was wrong, and what to set instead.
        bad_input: whether the same subject would fail again.
        job: that it failed in.
    """

    subject: str
    reason: str
    bad_input: bool
    job: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, content: str | bytes) -> Failure:
        """Reads what :meth:`to_json` wrote.

        Raises:
            ValueError: the content is something else.
        """
        try:
            fields = json.loads(content)
            return cls(
                str(fields["subject"]),
                str(fields["reason"])[:_MOST_REASON],
                bool(fields["bad_input"]),
                str(fields["job"]),
            )
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not a subject's failure: {error}") from error


def states(names: Iterable[str]) -> dict[str, bool]:
    """What a listing of a fleet's outputs tells: to the ids of subjects that have ended, whether they have a model.

    Args:
        names: of objects, relative to the outputs.

    Examples:
        >>> states(["duck/manifest.json", "cat/failure.json", "dog/samples/1.png"])
        {'cat': False, 'duck': True}
    """
    ended: dict[str, bool] = {}
    for name in sorted(names):
        subject, _, rest = name.partition("/")
        if rest in (MANIFEST_NAME, FAILURE_NAME):
            ended[subject] = ended.get(subject, False) or rest == MANIFEST_NAME
    return ended


class Place:
    """Where the model of a subject goes: to S3, or to a directory of this machine.

    Args:
        subject: its id.
        store: of the objects in S3; None where nothing goes there.
        index: where copies of what it ends with lie beside those of other subjects.
    """

    def __init__(
        self, subject: str, target: S3Uri | None, directory: Path, store: Store | None, index: S3Uri | None
    ) -> None:
        self.target, self.directory, self._store = target, directory, store
        self._index = index / subject if index else None

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is none."""
        if self.target and self._store:
            return get_object(self.target / name, self._store.options, client=self._store.client)
        path = self.directory / name
        return path.read_bytes() if path.is_file() else None

    def failure(self) -> Failure | None:
        """The failure that is written there."""
        content = self.read(FAILURE_NAME)
        try:
            return None if content is None else Failure.from_json(content)
        except ValueError:
            return None

    def conclude(self) -> bool:
        """Whether a whole model is there; then nothing tells of a failure any more."""
        manifest = self.read(MANIFEST_NAME)
        if manifest is None:
            return False
        if self.target and self._store:
            if self.read(FAILURE_NAME) is not None:
                self._store.delete(self.target / FAILURE_NAME)
        else:
            (self.directory / FAILURE_NAME).unlink(missing_ok=True)
        if self._index and self._store:
            self._store.put(self._index / MANIFEST_NAME, manifest)
        return True

    def fail(self, failure: Failure) -> None:
        """Writes why the model is missing."""
        content = failure.to_json().encode()
        if self._index and self._store:
            self._store.put(self._index / FAILURE_NAME, content)
        if self.target and self._store:
            self._store.put(self.target / FAILURE_NAME, content)
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / FAILURE_NAME).write_bytes(content)
