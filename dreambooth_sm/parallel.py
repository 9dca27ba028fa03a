"""Many small tasks at a time, at less cost for each than a pool of futures."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")

# Seconds; what takes longer on average spends most of them outside the interpreter.
_LONG = 5e-3
# Seconds without a result after which it is certain that tasks wait.
_PATIENCE = 0.1
# Tasks after which the number of threads is thought over.
_SEVERAL = 4


@contextmanager
def in_parallel(tasks: Iterable[Callable[[], T]], workers: int) -> Iterator[Iterator[T]]:
    """Runs tasks in up to that many threads; gives their results as they come, in any order.

    A task is taken from the iterable, by one thread at a time, when a thread is free for it. There are two threads at
    first, and more as soon as tasks are seen to wait, for else they would only wait for one another: short ones for
    the interpreter, long ones for a processor. After a failure, or when the block is left, no more tasks are taken;
    leaving it waits for those that run.

    Raises:
        what a task or the iterable raised, in place of the next result.

    Example:
        >>> with in_parallel([lambda: 1, lambda: 2], workers=2) as results:
        ...     sum(results)
        3
    """
    source, lock, stopped = iter(tasks), threading.Lock(), threading.Event()
    threads: list[threading.Thread] = []
    # Seconds that the last few tasks took, and those of them in which they kept a processor busy.
    seen: list[tuple[float, float]] = []
    # A result, or a failure; None from each thread that ends.
    done: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()

    def work() -> None:
        try:
            while True:
                with lock:
                    if len(seen) >= _SEVERAL:
                        start_upto(_useful(seen))
                        seen.clear()
                    task = None if stopped.is_set() else next(source, None)
                if task is None:
                    return
                began, busy = time.perf_counter(), time.thread_time()
                done.put((task(),))
                seen.append((time.perf_counter() - began, time.thread_time() - busy))
        except BaseException as failure:
            stopped.set()
            done.put(failure)
        finally:
            done.put(None)

    def start_upto(count: float) -> None:
        while len(threads) < min(count, workers) and not stopped.is_set():
            threads.append(threading.Thread(target=work, name="transfer"))
            threads[-1].start()

    def results() -> Iterator[T]:
        ended = 0
        while ended < len(threads):
            try:
                found = done.get(timeout=_PATIENCE if len(threads) < workers else None)
            except Empty:
                with lock:
                    start_upto(workers)
                continue
            if isinstance(found, BaseException):
                raise found
            if found is None:
                ended += 1
            else:
                yield found[0]

    with lock:  # a thread that works already would make the start of the next one slow
        start_upto(2)
    try:
        yield results()
    finally:
        with lock:
            stopped.set()
        for thread in threads:
            thread.join()


def _useful(seen: list[tuple[float, float]]) -> float:
    """As many threads as share a processor, or, for long tasks, all processors, each idle for half of its wait.

    The other half may be waits for the processors themselves.
    """
    took, worked = (sum(column) for column in zip(*seen, strict=True))
    shared = (os.cpu_count() or 1) if took > len(seen) * _LONG else 1
    return shared * took / max(2 * worked, 1e-9)
