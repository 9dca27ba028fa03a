"""A server under a mixed load for a long time: whether its memory, files and threads stay as they are.

    python -m benchmarks.serving_soak --minutes 20

The toybox model, and adapters in the embedded S3, which clients ask for by Zipf's law; memory and disk hold a part of
them. Some requests name an adapter that is not there, or one that is damaged; some can't be read; some clients send
slowly, and some go away while their picture is drawn. Beside the server that is looked at, another one uses the same
disk, and is killed and ended in turns. Each answer has to be the one that its request deserves, and memory has to stay
as it is after a warm-up: the exit code is 1 where another answer came, or memory grows by more than ``--most-growth``.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import emit
from benchmarks.serving import lay_out
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.serving.served_model import open_served
from dreambooth_sm.storage import S3Uri, put_object
from dreambooth_sm.toybox import BASE
from launcher.local.s3 import EmbeddedS3, embedded_s3
from launcher.local.server_process import ServerProcess
from tests.helpers.serving import Client

PLACE = S3Uri("models", "adapters")
_POISONED = "poisoned"
_SMALL = {"prompt": "photo of a hat", "steps": 2, "width": 32, "height": 32}
_OTHER, _RESTARTS = "other server, ", "restarts"
# Seconds between two looks at the process, and a client's pause between two pieces of what it sends slowly.
_LOOK, _SLOWLY = 5.0, 0.2
# What requests are of each hundred, beside those that are drawn.
_ODD = {"vanished": 4, "poisoned": 4, "malformed": 4, "slow": 4, "leaves": 4}
_STATUS = {"vanished": 404, "poisoned": 422, "malformed": 400}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--adapters", type=int, default=60)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--restart", type=float, default=120, help="seconds between two ends of the other server")
    parser.add_argument("--warm-up", type=float, default=3, help="minutes whose growth does not count")
    parser.add_argument("--most-growth", type=float, default=5, help="MB in a thousand requests")
    options = parser.parse_args()
    if options.minutes < options.warm_up + 1:
        parser.error(f"--minutes {options.minutes:g} leaves nothing to measure; set {options.warm_up + 1:g} or more")
    until = time.monotonic() + options.minutes * 60
    with tempfile.TemporaryDirectory() as folder, embedded_s3() as s3:
        size = _fill(s3, Path(folder, "adapters"), options.adapters)
        settings = {
            **s3.environment(),
            "CUDA_VISIBLE_DEVICES": "",
            "SERVE_ADAPTERS": str(PLACE),
            "SERVE_ADAPTER_SLOTS": "4",
            "SERVE_ADAPTER_BYTES": str(size * options.adapters // 4),
            "SERVE_ADAPTER_DISK": str(Path(folder, "disk")),
            "SERVE_ADAPTER_DISK_BYTES": str(size * options.adapters // 2),
        }
        Path(folder, "tree").mkdir()
        Path(folder, "tree", "model").symlink_to(BASE)

        def start() -> ServerProcess:
            server = ServerProcess(Path(folder, "tree"), settings)
            server.wait()
            return server

        server, answers = start(), Counter[str]()
        stop = threading.Event()
        threads = [
            threading.Thread(target=_ask, args=(server.port, seed, options.adapters, stop, answers))
            for seed in range(options.clients)
        ]
        threads.append(threading.Thread(target=_restart, args=(start, options.restart, stop, answers)))
        for thread in threads:
            thread.start()
        looks = []
        while time.monotonic() < until:
            time.sleep(_LOOK)
            looks.append({**_look(server.pid), "requests": _asked_for(answers)})
        stop.set()
        for thread in threads:
            thread.join()
        time.sleep(_LOOK)
        idle = _look(server.pid)
        server.end()
        kept = sum(path.stat().st_size for path in Path(folder, "disk").rglob("*") if path.is_file())
    emit(
        minutes=options.minutes,
        clients=options.clients,
        adapters=options.adapters,
        answers=dict(sorted(answers.items())),
    )
    emit(**_told(looks), idle=idle, disk_mb=round(kept / 1e6, 1), disk_most_mb=round(size * options.adapters / 2e6, 1))
    growth = growth_mb(looks[int(options.warm_up * 60 / _LOOK) :])
    problems = [f"{count} x {kind}" for kind, count in sorted(answers.items()) if ": " in kind]
    if growth > options.most_growth:
        problems.append(f"memory grows by {growth} MB in a thousand requests")
    emit(growth_mb_per_1000_requests=growth, problems=problems)
    return 1 if problems else 0


def _fill(s3: EmbeddedS3, folder: Path, count: int) -> int:
    """Puts adapters into S3, and a damaged one; the size of one."""
    lay_out(folder, open_served(BASE, None), count)
    client = s3.client()
    client.create_bucket(Bucket=PLACE.bucket)
    for number in range(count):
        for path in (folder / str(number)).iterdir():
            put_object(PLACE / f"{number}/{path.name}", path.read_bytes(), client=client)
    put_object(PLACE / f"{_POISONED}/{FILE}", b"not an adapter", client=client)
    return (folder / "0" / FILE).stat().st_size


def _ask(port: int, seed: int, adapters: int, stop: threading.Event, answers: Counter[str]) -> None:
    """A client, which asks until it is to stop."""
    pick = random.Random(seed)
    by_zipf = list(itertools.accumulate(1 / rank for rank in range(1, adapters + 1)))
    client = Client(port)
    while not stop.is_set():
        name = str(pick.choices(range(adapters), cum_weights=by_zipf)[0])
        (kind,) = pick.choices(["drawn", *_ODD], [100 - sum(_ODD.values()), *_ODD.values()])
        body = {**_SMALL, "seed": pick.randrange(1000), "adapters": [name]}
        if kind in ("vanished", "poisoned"):
            body["adapters"] = [kind]
        if kind == "malformed":
            body["steps"] = "many"
        try:
            if kind in ("slow", "leaves"):
                status = _slowly(port, json.dumps(body).encode(), leaves=kind == "leaves")
            else:
                status = client.draw(body).status
        except (OSError, http.client.HTTPException) as error:
            answers[f"{kind}: {type(error).__name__}"] += 1
            continue
        expected = _STATUS.get(kind, 200)
        answers[kind if status in (expected, None) else f"{kind}: {status} instead of {expected}"] += 1


def _slowly(port: int, body: bytes, *, leaves: bool) -> int | None:
    """Sends a request in pieces, and reads its answer, or goes away; the status."""
    head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        for start in range(0, len(body), 30):
            connection.sendall((b"" if start else head) + body[start : start + 30])
            time.sleep(_SLOWLY)
        if leaves:
            return None
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        answer.read()
        return answer.status


def _restart(start: Callable[[], ServerProcess], every: float, stop: threading.Event, answers: Counter[str]) -> None:
    """Another server of the same disk: asked, and killed or ended, in turns."""
    for number in itertools.count():
        server = start()
        with _asked(server.port, number, answers):
            stopped = stop.wait(every)
        if number % 2:
            server.end()
        else:
            server.kill()
        answers[_RESTARTS] += 1
        if stopped:
            return


@contextmanager
def _asked(port: int, seed: int, answers: Counter[str]) -> Iterator[None]:
    stop, found = threading.Event(), Counter[str]()
    client = threading.Thread(target=_ask, args=(port, 1000 + seed, 20, stop, found))
    client.start()
    yield
    stop.set()
    client.join()
    answers.update({f"{_OTHER}{kind}": count for kind, count in found.items()})


def _asked_for(answers: Counter[str]) -> int:
    """Requests to the server that is looked at."""
    return sum(count for kind, count in answers.copy().items() if not kind.startswith((_OTHER, _RESTARTS)))


def growth_mb(looks: list[dict[str, float]]) -> float:
    """What a thousand requests add to a process's memory, in MB: the slope of the line nearest to all looks."""
    requests, memory = ([look[name] for look in looks] for name in ("requests", "rss_mb"))
    return round(1000 * statistics.linear_regression(requests, memory).slope, 2)


def _look(pid: int) -> dict[str, float]:
    """Memory in MB, files and threads of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {
        "rss_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "files": files,
        "threads": int(status["Threads"]),
    }


def _told(looks: list[dict[str, float]]) -> dict[str, object]:
    """Medians of the second, of the middle and of the last tenth: the first one is for what is loaded once."""
    tenth = max(1, len(looks) // 10)
    parts = {
        "start": looks[tenth : 2 * tenth] or looks,
        "middle": looks[len(looks) // 2 - tenth // 2 :][:tenth],
        "end": looks[-tenth:],
    }
    return {part: {name: statistics.median(each[name] for each in of) for name in of[0]} for part, of in parts.items()}


if __name__ == "__main__":
    sys.exit(main())
