"""A server's memory stays as it is, and the soak says where it does not."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serving_soak import growth_mb
from dreambooth_sm.errors import EXIT_BAD_INPUT

# Threads that take memory at the same time, after the server's process has begun; malloc_info names each arena.
THREADS = f"""
import ctypes, sys, threading
from container import serve
if "serve" in sys.argv:
    assert serve.main(["no option"]) == {EXIT_BAD_INPUT}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
together = threading.Barrier(7)
def take():
    together.wait()
    assert libc.malloc(50_000)
    together.wait()
threads = [threading.Thread(target=take) for _ in range(6)]
for thread in threads:
    thread.start()
together.wait(); together.wait()
for thread in threads:
    thread.join()
libc.fopen.restype, libc.fopen.argtypes = ctypes.c_void_p, [ctypes.c_char_p] * 2
libc.malloc_info.argtypes, libc.fclose.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
place = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, place)
libc.fclose(place)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="the C library is another one")
def test_threads_of_a_server_share_two_arenas_unless_the_environment_says_how_many(tmp_path: Path) -> None:
    def arenas(*arguments: str, **more: str) -> int:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        root = str(Path(__file__).parents[2])
        environment |= {"PYTHONPATH": root, **more}
        told = tmp_path / "arenas.xml"
        subprocess.run(
            [sys.executable, "-c", THREADS, str(told), *arguments], env=environment, check=True, capture_output=True
        )
        return told.read_text().count("<heap nr=")

    assert arenas() > 3
    assert arenas("serve") == 2
    assert arenas("serve", MALLOC_ARENA_MAX="3") == 3


def test_a_soak_tells_growth_from_what_comes_and_goes() -> None:
    def looks(leak_mb: float) -> list[dict[str, float]]:
        return [
            {"requests": 15 * number, "rss_mb": 600 + leak_mb * 15 * number + (number * 7) % 5} for number in range(240)
        ]

    assert abs(growth_mb(looks(leak_mb=0))) < 0.1
    assert growth_mb(looks(leak_mb=0.01)) == pytest.approx(10, abs=0.1)
