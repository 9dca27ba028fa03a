"""Places in S3 that pictures go to: each is tried before anything is drawn for it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from functools import cached_property
from typing import TYPE_CHECKING

from dreambooth_sm import storage
from dreambooth_sm.errors import UserError
from dreambooth_sm.s3_uri import S3Uri

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# Seconds that a place which took an object is not tried again for, and how many such places are remembered.
_TRUSTED, _MOST = 600, 1000


class OutputPlaces:
    """Prefixes in S3, by the process's AWS settings; for several threads at a time."""

    def __init__(self) -> None:
        self._took: OrderedDict[S3Uri, float] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, place: S3Uri) -> None:
        """Tries whether a place takes objects, unless it took one lately.

        Raises:
            UserError: it refuses them; in one sentence, with what to do.
            TransferError: S3 does not answer.
        """
        with self._lock:
            if time.monotonic() - self._took.get(place, -_TRUSTED) < _TRUSTED:
                return
        storage.check_takes_objects(place, client=self._prober)
        with self._lock:
            self._took[place] = time.monotonic()
            self._took.move_to_end(place)
            if len(self._took) > _MOST:
                self._took.popitem(last=False)

    def put(self, place: S3Uri, name: str, content: bytes) -> S3Uri:
        """Writes an object below a place, verified; returns where it is.

        Raises:
            UserError, TransferError: as :meth:`check`; the place is tried again before it is drawn for.
        """
        try:
            storage.put_object(place / name, content, client=self._client)
        except (UserError, storage.TransferError):
            with self._lock:
                self._took.pop(place, None)
            raise
        return place / name

    # To make a client takes longer than to write an object.

    @cached_property
    def _client(self) -> S3Client:
        return storage.s3_client()

    @cached_property
    def _prober(self) -> S3Client:
        return storage.probing_client()
