"""Tasks in parallel: taken lazily, ended by the first failure, awaited."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from dreambooth_sm.parallel import in_parallel
from tests.helpers.patience import PATIENCE


def test_every_task_is_run_once_and_few_are_taken_ahead() -> None:
    taken, finished, most = 0, 0, 0
    lock = threading.Lock()

    def square(number: int) -> int:
        nonlocal finished
        with lock:
            finished += 1
        return number * number

    def tasks():
        nonlocal taken, most
        for number in range(200):
            taken += 1
            most = max(most, taken - finished)
            yield partial(square, number)

    with in_parallel(tasks(), 4) as results:
        assert sorted(results) == [n * n for n in range(200)]
    assert most <= 4


def test_the_first_failure_ends_it() -> None:
    taken: list[int] = []

    def tasks():
        for number in range(1000):
            taken.append(number)
            yield partial(divmod, 1, number - 3)

    with pytest.raises(ZeroDivisionError), in_parallel(tasks(), 2) as results:
        list(results)
    assert len(taken) < 10


def test_a_failing_iterable_ends_it() -> None:
    def tasks():
        yield partial(int, 1)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"), in_parallel(tasks(), 3) as results:
        list(results)


def test_leaving_the_block_waits_for_what_runs() -> None:
    started, ended = threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        time.sleep(0.1)
        ended.set()

    with in_parallel([slow], 1):
        started.wait()
    assert ended.is_set()


def test_tasks_that_wait_get_all_threads() -> None:
    """Twenty that wait for one another can only end when they run together."""
    together = threading.Barrier(20, timeout=PATIENCE)
    with in_parallel([together.wait] * 20, 20) as results:
        assert sorted(results) == list(range(20))


def test_tasks_that_only_compute_share_few_threads() -> None:
    def compute() -> int:
        return sum(range(20_000))

    most = 0
    with in_parallel([compute] * 400, 32) as results:
        for _ in results:
            most = max(most, sum(thread.name == "transfer" for thread in threading.enumerate()))
    assert 0 < most < 32
