"""Work that is done beside the training, in a thread of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Background(Generic[Item]):
    """Acts on items, one after another, in a thread that does not keep the process alive.

    Args:
        name: of the thread.
        act: is called with each item; it must not raise.
    """

    def __init__(self, name: str, act: Callable[[Item], object]) -> None:
        self._act = act
        self._condition = threading.Condition()
        self._waiting: deque[Item] = deque()
        self.is_closing = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, item: Item) -> None:
        """Takes an item and returns at once."""
        with self._condition:
            self._waiting.append(item)
            self._condition.notify()

    def take_back(self) -> list[Item]:
        """The items that still wait; they will not be acted on."""
        with self._condition:
            items = list(self._waiting)
            self._waiting.clear()
            return items

    def close(self, longest_wait: float | None = None) -> bool:
        """Waits until all items were acted on, for so many seconds at most; whether they were."""
        with self._condition:
            self.is_closing = True
            self._condition.notify()
        self._thread.join(longest_wait)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting or self.is_closing)
                if not self._waiting:
                    return
                item = self._waiting.popleft()
            self._act(item)
