"""A fleet that really trains, on the embedded platform, in an account where all goes wrong that can.

    python -m benchmarks.troubled_fleet [--subjects 200] [--seed 0]

SageMaker throttles, has room for fewer jobs than the fleet asks for, has no capacity for some, takes spot instances
back (SIGTERM, and a start on a fresh one), and loses jobs. Some subjects' pictures can't be read; a few are left out
before. Whoever follows the fleet goes away now and then, and another process attaches. Then half of the bad pictures
are put right, and their subjects tried again. In the end every model is compared with its manifest, and the jobs' logs
are counted: it ends with an error unless each good subject has one model, made once, and each bad one its reason.
Toyboxes, LoRA, few steps. The launcher waits a tenth of what it would, as jobs are that much shorter at least.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import re
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import boto3.session
import numpy as np
from PIL import Image

import launcher
from benchmarks.common import emit
from dreambooth_sm.storage import S3Uri, put_object, verify
from launcher.aws.clients import Clients
from launcher.fleets.clock import Clock
from launcher.fleets.fleet import Fleet
from launcher.jobs.logs import LOG_GROUP
from launcher.local.answers import RequestError
from launcher.local.services import EmbeddedServices, embedded_services

OPTIONS: dict[str, Any] = {
    "base_model": "toybox",
    "method": "lora",
    "instance_prompt": "photo of zwx toy",
    "resolution": 64,
    "max_train_steps": 4,
    "logging_steps": 2,
    "instance_type": "ml.g5.xlarge",
    "spot": True,
}
_PICTURES = S3Uri("pictures", "subjects")
_QUICKER = 10.0
# Of requests that start jobs.
_THROTTLED = 0.2
# Jobs that the fleet asks for at a time, and that the account has room for; seconds of one follower.
_PARALLEL, _ROOM, _SHIFT = 3, 2, 120.0
# Of so many subjects that were started, least and most, one sees its spot instance taken back.
_TAKEN_BACK = (6, 18)
_ENDED = re.compile(r"^subject=(\S+) state=(started|done|there)")


class ProcessEnded(Exception):  # noqa: N818 - not an error
    """Whoever followed the fleet has gone home."""


class QuickClock(Clock):
    """A clock whose owner waits less, and is gone after a while."""

    def __init__(self) -> None:
        self._ends = time.monotonic() + _SHIFT

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds / _QUICKER)
        if time.monotonic() > self._ends:
            raise ProcessEnded


class Abroad(Clients):
    """Clients that take this machine's services for AWS's: the launcher waits as long between two looks."""

    def is_local(self, service: str) -> bool:
        return False


class Account:
    """What the account does to who starts jobs in it.

    Attributes:
        refused: requests, by their reasons.
        taken_back: spot instances.
    """

    def __init__(self, services: EmbeddedServices, chance: random.Random) -> None:
        self._services, self._chance = services, chance
        self._create = services.sagemaker.create
        self.refused, self.taken_back = Counter[str](), 0
        self._done = threading.Event()

    def create(self, *arguments: Any, **named: Any) -> dict[str, Any]:
        """Starts a job, or has no room for it."""
        if self._chance.random() < _THROTTLED:
            self._refuse("ThrottlingException")
        if sum(not job.ended for job in [*self._services.sagemaker.jobs.values()]) >= _ROOM:
            self._refuse("ResourceLimitExceeded")
        return self._create(*arguments, **named)

    def _refuse(self, reason: str) -> None:
        self.refused[reason] += 1
        raise RequestError("by chance", reason)

    @contextmanager
    def troubled(self) -> Iterator[None]:
        """Refuses jobs, and takes instances back."""
        thread = threading.Thread(target=self._take_back, daemon=True)
        with patch.object(self._services.sagemaker, "create", self.create):
            thread.start()
            yield
            if not thread.is_alive():
                raise SystemExit("no more instances were taken back: see above")
            self._done.set()
            thread.join()

    def _take_back(self) -> None:
        due = self._chance.randint(*_TAKEN_BACK)
        while not self._done.wait(2.0):
            if told(self._services)["started"].total() < due:
                continue
            doing = {job: job.describe()["SecondaryStatus"] for job in [*self._services.sagemaker.jobs.values()]}
            if running := [job for job, status in doing.items() if status == "Training"]:
                due += self._chance.randint(*_TAKEN_BACK)
                with suppress(ValueError):  # it has ended meanwhile
                    self._chance.choice(running).interrupt()
                    self.taken_back += 1


def send_pictures(client: Any, subject: str, number: int, *, readable: bool = True) -> None:
    """Four pictures of a subject to S3; the third of a bad one can't be read."""
    noise = np.random.default_rng(number)
    for picture in range(4):
        file = io.BytesIO()
        small = noise.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((64, 64)).save(file, "PNG")
        body = file.getvalue() if readable or picture != 2 else b"no picture"
        put_object(_PICTURES / subject / f"{picture}.png", body, client=client)


def follow(root: S3Uri, clients: Clients, lines: list[str]) -> tuple[Fleet, int]:
    """Follows a fleet to its end; it, and how many processes that took."""
    processes = 0
    while True:
        processes += 1
        with suppress(ProcessEnded):
            return Fleet(root, clients, QuickClock()).wait(lines.append), processes


def told(services: EmbeddedServices) -> dict[str, Counter[str]]:
    """How often the jobs' logs say of each subject that it was started, done, or found done."""
    found: dict[str, Counter[str]] = {state: Counter() for state in ("started", "done", "there")}
    logs = services.clients()("logs")
    with suppress(logs.exceptions.ResourceNotFoundException):  # before the first job
        for page in logs.get_paginator("filter_log_events").paginate(logGroupName=LOG_GROUP):
            for event in page["events"]:
                if match := _ENDED.match(event["message"]):
                    found[match[2]][match[1]] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=200)
    parser.add_argument("--subjects_per_job", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    program = partial(embedded_services, entrypoint=Path(__file__).with_name("troubled_job.py"))
    with patch("launcher.local.run.embedded_services", program), launcher.local_services() as services:
        run(services, options.subjects, options.subjects_per_job, random.Random(options.seed))


def run(services: EmbeddedServices, count: int, subjects_per_job: int, chance: random.Random) -> None:
    names = [f"s{number:04d}" for number in range(count)]
    bad = sorted(chance.sample(names, max(2, count // 40)))
    pictures = services.client()
    pictures.create_bucket(Bucket=_PICTURES.bucket)
    for number, name in enumerate(names):
        send_pictures(pictures, name, number, readable=name not in bad)
    subjects: list[dict[str, Any]] = [{"id": name, "images": str(_PICTURES / name)} for name in names]
    subjects += [
        {"id": "odd", "images": str(_PICTURES / names[0]), "learning_rate": "much"},
        {"id": "gone", "images": str(_PICTURES / "gone")},
    ]
    session, requests = boto3.session.Session(), Counter[str]()
    session.events.register("before-send", lambda event_name, **_: requests.update([event_name.split(".", 1)[1]]))
    clients, lines, account = Abroad(session), list[str](), Account(services, chance)
    began = time.monotonic()

    class Lines(list[str]):
        def append(self, line: str) -> None:
            print(f"{time.monotonic() - began:6.0f} s  {line}", file=sys.stderr, flush=True)
            super().append(line)

    lines = Lines()
    with account.troubled():
        started = launcher.fit_many(
            subjects,
            skip_bad=True,
            parallel=_PARALLEL,
            subjects_per_job=subjects_per_job,
            wait=False,
            log=lines.append,
            session=session,
            **OPTIONS,
        )
        assert isinstance(started, Fleet)
        fleet, processes = follow(started.root, clients, lines)
        first = fleet.status()
        for name in bad[::2]:
            send_pictures(pictures, name, names.index(name))
        fleet.retry(lines.append, bad_input=True)
        fleet, more = follow(started.root, clients, lines)
    status = fleet.status()
    whole = [name for name, place in fleet.models().items() if verify(S3Uri.parse(place), client=pictures).whole]
    log = told(services)
    reasons = Counter(job.describe().get("FailureReason", "").split(":")[0] for job in services.sagemaker.jobs.values())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    emit(
        subjects=count,
        left_out=sum(line.startswith("left out: ") for line in lines),
        done=len(status.done),
        whole=len(whole),
        failed=status.failed,
        failed_at_first=len(first.failed),
        made_twice=[name for name, times in log["done"].items() if times > 1],
        started_again=sum(times > 1 for times in log["started"].values()),
        jobs=len(services.sagemaker.jobs),
        jobs_ended_for={reason: number for reason, number in reasons.items() if reason},
        refused=dict(account.refused),
        taken_back=account.taken_back,
        processes=processes + more,
        requests=dict(sorted(requests.items())),
        requests_a_subject=round(requests.total() / count, 2),
        wall_s=round(time.monotonic() - began),
        cpu_s=round(used.ru_utime + used.ru_stime),
    )
    good = {*names} - {*bad[1::2]}
    if {*status.done} != good or {*whole} != good or {*status.failed} != {*bad[1::2]} or status.remaining:
        raise SystemExit("not all good subjects have their whole models, and the bad ones their reasons")
    if {*bad} != {*first.failed} or any(times > 1 for times in log["done"].values()):
        raise SystemExit("some were made twice, or failed for another reason than their pictures")


if __name__ == "__main__":
    main()
