"""The start of a job: from its process to the base model, which comes from a hub or from S3 with a network's latency.

    python -m benchmarks.start [--source hub http s3] [--repeat 3] [--delay-ms 20] [--mb-per-s 1250] [--directory DIR]

The model has SD 1.5's shapes in fp16 (2.13 GB) and random weights. The servers are :mod:`benchmarks.null_hub`, as the
hub (`hub`: Xet's protocol) and as a mirror of it (`http`), and :mod:`benchmarks.null_s3`; they share the cores with
the job. One JSON object each, of the fastest of `--repeat` runs: seconds, and after them CPU seconds, which others on
the machine disturb less:

- `transfer`: a plain client takes the large files from the same server, by ranges of 16 MiB over `--connections`
  connections, and writes them;
- `weights`: in a process that has imported everything, from the model's name to all weights in memory, on the CPU and
  in the files' precision: `fetch`, `open` (files understood, the model's digest), `load`;
- `job`: `container/train.py`, compiled as in the image (by the first run), from the start of its process: until its
  first phase begins (`to_check`), until input is checked (`checked`), and until the model is open (`loaded`), when it
  is stopped; CPU seconds of this process alone.

Needs 10 GB in `--directory`, where no file waits for a disk.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.null_hub import COMMIT, REPOSITORY, lay_chunks

WARM_POOL = "SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY"
_RANGE = 16 * 2**20
_ROOT = Path(__file__).parents[1]
_SETTINGS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
# Of each source: its server, where the server has a file, what the job calls the model, and what leads clients there.
SOURCES = {
    "hub": ("null_hub", f"/{REPOSITORY}/resolve/{COMMIT}/", REPOSITORY, {"HF_HUB_DISABLE_XET": "0"}, "HF_ENDPOINT"),
    "http": ("null_hub", f"/{REPOSITORY}/resolve/{COMMIT}/", REPOSITORY, {"HF_HUB_DISABLE_XET": "1"}, "HF_ENDPOINT"),
    "s3": ("null_s3", "/repository/model/", "s3://repository/model", _SETTINGS, "AWS_ENDPOINT_URL"),
}


@contextmanager
def server(module: str, files: Path, options: argparse.Namespace) -> Iterator[str]:
    """A server's address, while the block runs."""
    shaped = ["--delay-ms", str(options.delay_ms), "--mb-per-s", str(options.mb_per_s)]
    shaped += ["--connection-mb-per-s", str(options.connection_mb_per_s)]
    # The S3 server hands out buckets, of which the repository is one.
    directory = files.parent if module == "null_s3" else files
    command = [sys.executable, "-m", f"benchmarks.{module}", "--directory", str(directory), *shaped]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def clocks() -> tuple[float, float]:
    """Seconds, and CPU seconds of this process and those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(each.ru_utime + each.ru_stime for each in used)


def since(before: tuple[float, float]) -> list[float]:
    """What has gone by on both clocks."""
    return [round(now - then, 2) for now, then in zip(clocks(), before, strict=True)]


def transfer(address: str, prefix: str, model: Path, target: Path, connections: int) -> list[float]:
    """Seconds in which a plain client takes the large files."""
    place, started = urlsplit(address), clocks()
    tasks: queue.SimpleQueue[tuple[str, Path, int, int]] = queue.SimpleQueue()
    for path in model.rglob("*.safetensors"):
        size, name = path.stat().st_size, path.relative_to(model).as_posix()
        file = target / name.replace("/", "-")
        with file.open("wb") as stream:
            stream.truncate(size)
        for first in range(0, size, _RANGE):
            tasks.put((prefix + name, file, first, min(_RANGE, size - first)))

    def work() -> None:
        buffer = memoryview(bytearray(2**20))
        with socket.create_connection((place.hostname, place.port)) as connection:
            while not tasks.empty():
                try:
                    url, file, first, size = tasks.get_nowait()
                except queue.Empty:
                    return
                head = f"GET {url} HTTP/1.1\r\nHost: x\r\nRange: bytes={first}-{first + size - 1}\r\n\r\n"
                connection.sendall(head.encode())
                answer = b""
                while b"\r\n\r\n" not in answer:
                    answer += connection.recv(4096)
                rest = answer.partition(b"\r\n\r\n")[2]
                with file.open("r+b", buffering=0) as stream:
                    stream.seek(first)
                    stream.write(rest)
                    left = size - len(rest)
                    while left:
                        got = connection.recv_into(buffer, min(len(buffer), left))
                        stream.write(buffer[:got])
                        left -= got

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return since(started)


def load_weights(name: str) -> None:
    """Brings a model into this process' memory, and prints the seconds of each part."""
    from dreambooth_sm.importing import importing

    with importing():
        from dreambooth_sm.fetching import WantedBase, fetch, fetching
        from dreambooth_sm.hyperparameters import Hyperparameters
        from dreambooth_sm.models import PretrainedModel, read_stored
        from dreambooth_sm.resume import fingerprint
        from dreambooth_sm.stored import classes  # noqa: F401
    h = Hyperparameters.parse({"pretrained_model_name_or_path": name, "instance_prompt": "photo of zwx toy"})
    parts, started = {}, clocks()
    with fetching(h):
        path = fetch(WantedBase.of(h).model)
        parts["fetch"], started = since(started), clocks()
        base = PretrainedModel.of(name, read_stored(path), None)
        fingerprint(base)
        parts["open"], started = since(started), clocks()
        base.load()
        parts["load"] = since(started)
    print(json.dumps(parts))


def cpu_seconds_of(process: int) -> float:
    """What another process has used so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return round(sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK"), 2)


def run_job(base: Path, environment: dict[str, str]) -> dict[str, list[float]]:
    """Seconds and CPU seconds from the start of a job's process until lines of its log, after the last of which it is
    stopped."""
    marks = {
        "to_check": r"phase=check state=started",
        "checked": r"phase=check state=ended",
        "loaded": r"phase=load_base state=ended",
    }
    found: dict[str, list[float]] = {}
    command = [sys.executable, "-u", str(_ROOT / "container" / "train.py")]
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        env={**environment, "SAGEMAKER_BASE_DIR": str(base)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout
        log = ""
        for line in process.stdout:
            log += line
            for mark, pattern in marks.items():
                if re.search(pattern, line):
                    found[mark] = [round(time.perf_counter() - started, 2), cpu_seconds_of(process.pid)]
            if "loaded" in found:
                process.kill()
    if "loaded" not in found:
        raise RuntimeError(log)
    return found


def lay_out_job(base: Path, name: str) -> None:
    """An ``/opt/ml`` with five pictures."""
    from dreambooth_sm import toybox

    (base / "input" / "config").mkdir(parents=True)
    (base / "model").mkdir()
    shutil.copytree(toybox.PHOTOS, base / "input" / "data" / "images")
    values = {
        "pretrained_model_name_or_path": name,
        "instance_data_dir": "/opt/ml/input/data/images",
        "instance_prompt": "photo of zwx toy",
        "models_path": "/opt/ml/model",
        "max_train_steps": "1",
    }
    (base / "input" / "config" / "hyperparameters.json").write_text(json.dumps(values))


def measure(source: str, files: Path, work: Path, options: argparse.Namespace) -> None:
    """Prints one JSON object for a source."""
    module, prefix, name, settings, endpoint = SOURCES[source]
    own: list[list[float]] = []
    weights: list[dict[str, list[float]]] = []
    jobs: list[dict[str, list[float]]] = []
    with server(module, files, options) as address:
        environment = {**os.environ, **settings, endpoint: address, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for _ in range(options.repeat):
            with tempfile.TemporaryDirectory(dir=work) as scratch:
                own.append(transfer(address, prefix, files / "model", Path(scratch), options.connections))
            with tempfile.TemporaryDirectory(dir=work) as scratch:
                call = f"from benchmarks.start import load_weights; load_weights({name!r})"
                ended = subprocess.run(
                    [sys.executable, "-c", call],
                    cwd=_ROOT,
                    env={**environment, "HF_HOME": scratch, WARM_POOL: scratch},
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                weights.append(json.loads(ended.stdout.splitlines()[-1]))
            with tempfile.TemporaryDirectory(dir=work) as scratch:
                lay_out_job(Path(scratch) / "opt-ml", name)
                jobs.append(run_job(Path(scratch) / "opt-ml", {**environment, "HF_HOME": scratch, WARM_POOL: scratch}))
    best, until = min(weights, key=lambda run: sum(part[0] for part in run.values())), min(own)
    ratios = [round(sum(part[clock] for part in best.values()) / until[clock], 2) for clock in range(2)]
    job = min(jobs, key=lambda run: run["loaded"])
    print(json.dumps({"source": source, "transfer": until, "weights": best, "ratio": ratios, "job": job}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--delay-ms", type=float, default=20)
    parser.add_argument("--mb-per-s", type=float, default=1250)
    parser.add_argument("--connection-mb-per-s", type=float, default=0, help="of each connection; 0: as many as can be")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args()
    files = options.directory / "dreambooth-sm-start" / "repository"
    if not files.is_dir():
        from benchmarks.load_save import make_files

        made = files.with_name("made")
        make_files("sd15", made)
        (made / "single.safetensors").unlink()
        (made / "directory").rename(made / "model")
        lay_chunks(made / "model", made / "xet")
        made.rename(files)
    for source in options.source:
        measure(source, files, files.parent, options)


if __name__ == "__main__":
    main()
