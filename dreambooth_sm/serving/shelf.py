"""What was read from files stays in the host's memory, until others were asked for more lately."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Something that takes memory."""

    @property
    def size(self) -> int:
        """In bytes."""


Item = TypeVar("Item", bound=Sized)


class Shelf(Generic[Item]):
    """Things by name, bounded by bytes; for several threads.

    Args:
        size: bytes that all of them may take, but for the last that was asked for.

    Attributes:
        pinned: names of those that stay.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.pinned: set[str] = set()
        self._kept: OrderedDict[str, Item] = OrderedDict()
        self._lock = threading.Lock()
        self._reading: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    @property
    def names(self) -> set[str]:
        with self._lock:
            return {*self._kept}

    def get(self, name: str, read: Callable[[str], Item]) -> Item:
        """One of them; read, where it is not there. Takes as long as that; other threads get others meanwhile.

        Raises:
            What ``read`` does.
        """
        if (found := self._find(name)) is not None:
            return found
        with self._lock:
            reading = self._reading[name]
        with reading:  # whoever asks for the same one waits for it
            if (found := self._find(name)) is not None:
                return found
            try:
                item = read(name)
            finally:
                with self._lock:
                    self._reading.pop(name, None)
            with self._lock:
                self._kept[name] = item
                self._let_go(beside=name)
            return item

    def remove(self, name: str) -> bool:
        """Forgets one of them; False where it is not there."""
        with self._lock:
            self.pinned.discard(name)
            return self._kept.pop(name, None) is not None

    def _find(self, name: str) -> Item | None:
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
            return self._kept.get(name)

    def _let_go(self, beside: str) -> None:
        """Lets go of those that were not asked for lately, until the rest is small enough."""
        over = sum(each.size for each in self._kept.values()) - self._size
        for name in [name for name in self._kept if name != beside and name not in self.pinned]:
            if over <= 0:
                return
            over -= self._kept.pop(name).size
