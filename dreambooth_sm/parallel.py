"""Many small tasks at a time, at less cost for each than a pool of futures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def in_parallel(tasks: Iterable[Callable[[], T]], workers: int) -> Iterator[Iterator[T]]:
    """Runs tasks in that many threads; gives their results as they come, in any order.

    A task is taken from the iterable, by one thread at a time, when a thread is free for it. After a failure, or when
    the block is left, no more are taken; leaving it waits for those that run.

    Raises:
        what a task or the iterable raised, in place of the next result.

    Example:
        >>> with in_parallel([lambda: 1, lambda: 2], workers=2) as results:
        ...     sum(results)
        3
    """
    source, taking, stopped = iter(tasks), threading.Lock(), threading.Event()
    # A result, or a failure; None from each thread that ends.
    done: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()

    def work() -> None:
        try:
            while True:
                with taking:
                    task = None if stopped.is_set() else next(source, None)
                if task is None:
                    return
                done.put((task(),))
        except BaseException as failure:
            stopped.set()
            done.put(failure)
        finally:
            done.put(None)

    def results() -> Iterator[T]:
        running = workers
        while running:
            found = done.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                running -= 1
            else:
                yield found[0]

    threads = [threading.Thread(target=work, name="transfer") for _ in range(workers)]
    with taking:  # a thread that works already would make the start of the next one slow
        for thread in threads:
            thread.start()
    try:
        yield results()
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
