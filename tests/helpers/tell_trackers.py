"""A job's report, told to MLflow and to W&B without a network, by a Python that has both: stopped, and resumed.

``python tell_trackers.py DIRECTORY URI`` ends with a line of JSON: the ids of the runs in both attempts, what W&B has
kept of them, and what was warned of when MLflow's server was gone (standard input says when it is).
"""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth_sm.context import Context
from dreambooth_sm.distributed import World
from dreambooth_sm.errors import StopRequested
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.planning.cards import CPU
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.report import Reporter, ValidationPicture
from dreambooth_sm.sagemaker import Contract
from dreambooth_sm.trackers.told import told_trackers


def job(directory: Path, uri: str, trackers: str = "mlflow,wandb") -> Context:
    h = Hyperparameters.parse(
        {"instance_prompt": "photo of zwx toy", "report_to": trackers, "mlflow_tracking_uri": uri, "seed": 3}
    )
    report = Reporter(io.StringIO())
    return Context(h, h, Contract(directory, job_name="toy-1"), World(), report, threading.Event(), ExitStack())


def draw(report: Reporter, directory: Path, step: int) -> None:
    path = directory / f"step-{step:06}-prompt-0-seed-0-0123abcd.png"
    Image.new("RGB", (8, 8), (step, 0, 0)).save(path)
    report.drew([ValidationPicture(step, "a toy", 0, path)])


def tell(directory: Path, uri: str) -> list[dict[str, str]]:
    first = job(directory, uri)
    plan = make_plan(first.h, CPU)
    with suppress(StopRequested), told_trackers(first, plan, 0):
        draw(first.report, directory, 0)
        for step in (1, 2, 3):  # the checkpoint is of step 2
            first.report.metrics(step=step, loss=1 / step, lr=1e-4)
        raise StopRequested("as asked")
    second = job(directory, uri)
    second.report.resume(first.report.record(2), 2, directory)
    with told_trackers(second, plan, 2):
        for step in (3, 4):
            second.report.metrics(step=step, loss=1 / step, lr=1e-4)
        second.report.metrics(candidate=4, score=0.5)
        draw(second.report, directory, 4)
        for name in ("report.html", "report.json", "README.md"):
            (directory / name).write_text(f"the report of toy-1 as {name}")
        second.report.finish({"verdicts": ["good"], "attempts": [{"last_step": 4}]}, directory)
    for attempt in (first, second):
        print(attempt.report.stream.getvalue(), file=sys.stderr)  # type: ignore[attr-defined]
    return [first.report.runs, second.report.runs]


def tell_nobody(directory: Path, uri: str) -> list[str]:
    lost = job(directory, uri, "mlflow")
    with told_trackers(lost, make_plan(lost.h, CPU), 0):
        for step in range(1, 4):
            lost.report.metrics(step=step, loss=1 / step, lr=1e-4)
    lines = lost.report.stream.getvalue().splitlines()  # type: ignore[attr-defined]
    return [line for line in lines if line.startswith("warning")]


def records_of(file: Path) -> Iterator[bytes]:
    """The records of a file of W&B's: LevelDB's log format in blocks of 32 KiB, after seven bytes of its own."""
    content, position, record = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if (left := 2**15 - position % 2**15) < 7:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def kept_by_wandb(directory: Path) -> list[dict[str, Any]]:
    """What the files of each run without a network hold."""
    from wandb.proto import wandb_internal_pb2 as pb

    found = []
    for file in sorted(
        directory.glob("output/data/wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime
    ):
        run: dict[str, Any] = {"config": {}, "history": [], "summary": {}}
        for data in records_of(file):
            record = pb.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                run |= {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
            for item in [*record.run.config.update, *record.config.update]:
                run["config"][item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            if record.HasField("history"):
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                run["history"].append({name: value for name, value in row.items() if not name.startswith("_")})
            for item in record.summary.update:
                run["summary"][item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            if record.HasField("exit"):
                run["exit"] = record.exit.exit_code
        found.append(run)
    return found


if __name__ == "__main__":
    directory, uri = Path(sys.argv[1]), sys.argv[2]
    runs = tell(directory, uri)
    print("told", flush=True)
    sys.stdin.readline()
    warned = tell_nobody(directory, uri)
    print(json.dumps({"runs": runs, "wandb": kept_by_wandb(directory), "warned": warned}))
