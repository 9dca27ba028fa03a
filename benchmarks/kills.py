"""Small jobs killed at random moments until done: what is lost, and what S3 shows meanwhile.

    python -m benchmarks.kills [--kills 100] [--seed 0] [--steps 16]

One job runs undisturbed. Then jobs like it are started and get SIGTERM or SIGKILL after a random time, again and again
until one start reaches its end. Each start finds what a new SageMaker instance would: an empty disk, but for
`/opt/ml/checkpoints` in half of the jobs, in every third start with its newest checkpoint synced half-way; the other
half have only what lies in S3. After each kill, a manifest in S3 has to have all of its files, whole. In the end, all
weights have to have the checksums that the undisturbed job's have. Jobs are forks of a process that has imported
everything: a moment of a job is one of its phases, not of Python's start. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from dreambooth_sm.storage import MANIFEST_NAME, S3Uri, list_objects, read_manifest, verify
from tests.helpers.aws_descriptions import remembered

SETTINGS = {
    "pretrained_model_name_or_path": "/opt/ml/input/data/model",
    "instance_prompt": "photo of zwx toy",
    "class_prompt": "photo of a toy",
    "resolution": "64",
    "num_class_images": "2",
    "logging_steps": "1",
    "learning_rate": "1e-3",
    "use_ema": "true",
    "lr_scheduler": "cosine",
    "seed": "7",
}
# Seconds after which a job is taken to hang, however loaded the machine is.
_PATIENCE = 1800.0
_SERVER = """
import json, time
from launcher.local.s3 import embedded_s3
with embedded_s3() as server:
    print(json.dumps(server.environment()), flush=True)
    time.sleep(1e9)
"""


def start(base: Path, steps: int, channels: dict[str, str], target: S3Uri, *, synced: Path | None, half: bool) -> int:
    """Lays out a new instance and forks a job on it, which saves four checkpoints; its process id."""
    from launcher.local.tree import lay_out

    shutil.rmtree(base, ignore_errors=True)
    length = {"max_train_steps": str(steps), "save_steps": str(steps // 4)}
    lay_out(base, {**SETTINGS, **length, "manual_upload_model_path": str(target)}, channels)
    shutil.rmtree(base / "checkpoints", ignore_errors=True)
    if synced:
        (base / "checkpoints").symlink_to(synced)
        newest = sorted(synced.glob("step-*/tensors.pt"))[-1:]
        for tensors in newest if half else []:
            tensors.write_bytes(tensors.read_bytes()[: tensors.stat().st_size // 2])
    process = os.fork()
    if process:
        return process
    with (base / "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["SAGEMAKER_BASE_DIR"] = str(base)
    from container.train import main

    code = 1
    with suppress(BaseException):
        code = main(["train"])
    sys.stdout.flush()
    os._exit(code)


def wait(process: int, seconds: float) -> int | None:
    """The exit code of a job that ends by itself in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def phase_of(base: Path) -> str:
    """The phase that a job's log last speaks of."""
    phases = re.findall(r"phase=(\w+) state=(\w+)", (base / "log").read_text())
    return f"{'in' if phases[-1][1] == 'started' else 'after'} {phases[-1][0]}" if phases else "before check"


def weights_in(target: S3Uri) -> dict[str, str]:
    """The checksum of every file of weights; reports tell of times, which differ."""
    return {e.path: e.crc64nvme for e in read_manifest(target).files if e.path.endswith(".safetensors")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=16, help="of each job; at least 4")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout
    os.environ |= json.loads(server.stdout.readline())
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        with tempfile.TemporaryDirectory(prefix="kills-") as work, remembered():
            print(json.dumps(run(Path(work), options.kills, options.steps, chance)))
    finally:
        server.terminate()


def run(work: Path, kills: int, steps: int, chance: random.Random) -> dict[str, object]:
    import container.train  # noqa: F401 - imported once, for all forks
    import dreambooth_sm.job  # noqa: F401
    from benchmarks.common import make_pictures
    from dreambooth_sm.storage import s3_client
    from tests.helpers.tiny import save_tiny_pipeline

    client = s3_client()
    client.create_bucket(Bucket="kills")
    make_pictures(work / "pictures", 2, 96)
    channels = {"images": str(work / "pictures"), "model": str(save_tiny_pipeline(work / "tiny"))}
    base = work / "opt-ml"
    gc.collect()
    gc.freeze()  # what the forks share is not walked, and so not copied, by each of them

    started = time.monotonic()
    reference = S3Uri("kills", "reference")
    code = wait(start(base, steps, channels, reference, synced=None, half=False), _PATIENCE)
    seconds = time.monotonic() - started
    assert code == 0, (base / "log").read_text()
    wanted = weights_in(reference)

    killed: Counter[str] = Counter()
    phases: Counter[str] = Counter()
    jobs = starts = lost = 0
    slowest = 0.0
    while killed.total() < kills:
        jobs += 1
        target, synced = S3Uri("kills", f"job-{jobs}"), work / f"synced-{jobs}" if jobs % 2 else None
        if synced:
            synced.mkdir()
        code, reached, spoiled = None, 0, False
        while code != 0:
            starts += 1
            half = bool(synced) and starts % 3 == 0
            spoiled |= half
            process = start(base, steps, channels, target, synced=synced, half=half)
            code = wait(process, chance.uniform(0, seconds))
            if code is None:
                kind = chance.choice([signal.SIGTERM, signal.SIGKILL])
                os.kill(process, kind)
                sent = time.monotonic()
                killed[kind.name] += 1
                phases[phase_of(base)] += 1
                code = wait(process, _PATIENCE)
                if kind is signal.SIGTERM:
                    slowest = max(slowest, time.monotonic() - sent)
                # -SIGTERM: before the job had begun to listen.
                assert code in (0, 143, -kind), (base / "log").read_text()
            else:
                assert code == 0, (base / "log").read_text()
            log = (base / "log").read_text()
            done = [int(step) for step in re.findall(r"^step=(\d+) ", log, flags=re.MULTILINE)]
            if done:
                lost = lost if spoiled else max(lost, reached - done[0] + 1)
                reached, spoiled = done[-1], False
            if MANIFEST_NAME in list_objects(target, client=client):
                assert verify(target, client=client).whole, "a manifest over incomplete files"
        assert weights_in(target) == wanted, "other weights than the undisturbed job's"
        files = {entry.path for entry in read_manifest(target, client=client).files}
        assert set(list_objects(target, client=client)) == {*files, MANIFEST_NAME}
    return {
        "kills": killed.total(),
        **killed,
        "jobs": jobs,
        "starts": starts,
        "most_steps_lost": lost,
        "slowest_exit_after_sigterm_s": round(slowest, 2),
        "killed": dict(phases.most_common()),
        "undisturbed_s": round(seconds, 1),
        "all_weights_equal": True,
    }


if __name__ == "__main__":
    main()
