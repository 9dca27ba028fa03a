"""What a checkpoint that travels to S3 costs the steps that run meanwhile: SD 1.5's architecture, random weights.

    python -m benchmarks.background_upload [--cores 4] [--save_steps 500]

Steps are timed in turns with nothing beside them and with an upload of a checkpoint of SD 1.5's size (5.9 GB, UNet
alone) beside them, over and over, by two workers as in a job, to :mod:`benchmarks.null_s3`, which takes all that it can
get: no network is as fast. This process has ``--cores`` cores (a g4dn.xlarge has four); the server has others. Printed
are steps a second of both, the upload's speed, and what is left of the slowdown in a job that saves every
``--save_steps`` steps. Needs a GPU.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks.common import emit, make_trainer, sd15
from benchmarks.train_step import VARIANTS, plan_for
from benchmarks.transfer import make_directory, null_server

CHECKPOINT = {"tensors.pt": 5_900_000_000, "state.json": 20_000}
ROUNDS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=4)
    parser.add_argument("--save_steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=100, help="in each round")
    options = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with tempfile.TemporaryDirectory(prefix="background-") as work:
        checkpoint = make_directory(Path(work) / "checkpoint", CHECKPOINT)
        (Path(work) / "buckets").mkdir()
        with null_server(Path(work) / "buckets", 0) as endpoint:
            os.environ["AWS_ENDPOINT_URL"] = endpoint
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
            measure(Path(work), checkpoint, options)


def measure(work: Path, checkpoint: Path, options: argparse.Namespace) -> None:
    from dreambooth_sm.storage import S3Uri, s3_client, upload_directory

    h, plan = plan_for("sd15", *VARIANTS["unet"])
    trainer = make_trainer(sd15(), plan, h, work, options.steps)
    client, sent, busy = s3_client(), 0, 0.0

    def upload_until(stop: threading.Event, number: int) -> None:
        nonlocal sent, busy
        while not stop.is_set():
            started = time.perf_counter()
            target = S3Uri("models", f"checkpoint-{number}-{sent}")
            sent += upload_directory(checkpoint, target, workers=2, client=client).size
            busy += time.perf_counter() - started

    def seconds() -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(options.steps):
            trainer.optimizer_step(h.learning_rate)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds()  # warm-up and capture
    alone, beside = [], []
    for number in range(ROUNDS):
        alone.append(seconds())
        stop = threading.Event()
        thread = threading.Thread(target=upload_until, args=(stop, number))
        thread.start()
        beside.append(seconds())
        stop.set()
        thread.join()
    trainer.make_step.close()
    size = sum(CHECKPOINT.values())
    slowdown = sum(beside) / sum(alone) - 1
    upload_s = busy * size / sent
    lost = upload_s * slowdown / (1 + slowdown)
    emit(
        cores=options.cores,
        steps_per_s_alone=round(options.steps * ROUNDS / sum(alone), 2),
        steps_per_s_beside=round(options.steps * ROUNDS / sum(beside), 2),
        slowdown_while_uploading_percent=round(100 * slowdown, 2),
        upload_mb_per_s=round(sent / busy / 1e6),
        upload_s=round(upload_s, 1),
        slowdown_of_job_percent=round(100 * lost / (options.save_steps * sum(alone) / options.steps / ROUNDS), 2),
    )


if __name__ == "__main__":
    main()
