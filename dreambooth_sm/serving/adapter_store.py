"""Adapters by their names: where they lie, and those that are in the host's memory."""

from __future__ import annotations

import threading
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_sm import storage
from dreambooth_sm.errors import UserError
from dreambooth_sm.knobs.messages import short
from dreambooth_sm.s3 import TransferError
from dreambooth_sm.s3_uri import S3Uri
from dreambooth_sm.serving.adapter_disk import AdapterDisk
from dreambooth_sm.serving.adapter_s3 import AdapterInS3
from dreambooth_sm.serving.fields import is_adapter_name
from dreambooth_sm.serving.host_adapter import HostAdapter, Shapes, read_host_adapter
from dreambooth_sm.serving.refusal import Refusal
from dreambooth_sm.serving.shelf import Shelf
from dreambooth_sm.sources import is_s3

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class AdapterStore:
    """Finds adapters, reads them when they are asked for, and lets go of those that were not asked for lately.

    Args:
        place: folder or ``s3://`` prefix: the adapter ``zwx`` lies below ``zwx`` there. None: only those that are added
            can be had.
        shapes: of the weights of the model that they lie beside, and ``base``, what messages call that.
        size: bytes of the host's memory that they may take.
        disk: keeps the files of those that come from S3.
    """

    def __init__(self, place: str | None, shapes: Shapes, base: str, size: int, disk: AdapterDisk) -> None:
        self._place, self._shapes, self._base, self._disk = place, shapes, base, disk
        self._added: dict[str, str] = {}
        self._shelf: Shelf[HostAdapter] = Shelf(size)
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Those that were added, or are in memory."""
        with self._lock:
            return tuple(sorted({*self._added, *self._shelf.names}))

    def get(self, name: str) -> HostAdapter:
        """An adapter; read, where it is not in memory. Takes as long as that; other threads get others meanwhile.

        Raises:
            Refusal: 404 where there is none of this name, 422 where it can't be drawn with.
            TransferError: S3 does not answer.
        """
        return self._shelf.get(name, self._read)

    def add(self, name: str, source: str, preload: bool = True, pin: bool = False) -> None:
        """Says where an adapter lies.

        Args:
            source: a path, or an ``s3://`` object or prefix.
            preload: read it at once; if it can't be drawn with, it is not added.
            pin: keep it in memory once it is there.

        Raises:
            Refusal: where the name can't be one, or is another adapter's; and what :meth:`get` raises.
            TransferError: S3 does not answer.
        """
        if not is_adapter_name(name):
            raise Refusal(f"name: {short(name)} is not valid; set letters, digits, dots and hyphens")
        with self._lock:
            if self._added.get(name, source) != source:
                raise Refusal(f"{name} is {self._added[name]}; DELETE /adapters/{name} first", 409)
            self._added[name] = source
            self._shelf.pinned |= {name} if pin else set()
        if preload:
            try:
                self.get(name)
            except (Refusal, TransferError):
                with self._lock:
                    self._added.pop(name, None)
                raise

    def remove(self, name: str) -> None:
        """Forgets an adapter: if it is asked for again, it is read again.

        Raises:
            Refusal: where there is none of this name.
        """
        with self._lock:
            known = self._added.pop(name, None) is not None
            if not self._shelf.remove(name) and not known:
                raise Refusal(f"{short(name)} is not known here", 404)

    def _read(self, name: str) -> HostAdapter:
        source = self._source(name)
        try:
            if not is_s3(source):
                path = Path(source)
                if not path.exists():
                    raise Refusal(f"adapters: {short(name)} is not known here", 404)
                return read_host_adapter(name, path, self._shapes, self._base)
            found = AdapterInS3.find(name, S3Uri.parse(source), self._client)
            with self._disk.files(found.identity, lambda folder: found.download(folder, self._client)) as folder:
                return read_host_adapter(name, folder, self._shapes, self._base)
        except Refusal:
            raise
        except UserError as error:
            raise Refusal([f"adapters: {name}: {problem}" for problem in error.problems], 422) from None

    @cached_property
    def _client(self) -> S3Client:
        """To make one takes longer than to bring an adapter here."""
        return storage.s3_client()

    def _source(self, name: str) -> str:
        with self._lock:
            if name in self._added:
                return self._added[name]
        if self._place is None or not is_adapter_name(name):
            raise Refusal(f"adapters: {short(name)} is not known here", 404)
        return f"{self._place.rstrip('/')}/{name}"
