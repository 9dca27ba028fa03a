"""A fleet of ten thousand subjects, from its first job to its last model, on a platform that only takes time.

    python -m benchmarks.fleet_simulation [--subjects 10000] [--instances 100] [--seed 0] [--seeds 1]
        [--subject_minutes 2.0]

The launcher's own code starts and follows the jobs, in processes that end and attach again, on a clock that does not
wait: to SageMaker itself (spot instances of two types), and through a queue of AWS Batch. The account throttles and is
short of instances; jobs are interrupted and lost; subjects fail (`benchmarks/simulated_aws.py`). It ends with an error
unless every subject has its model, none was trained twice, and requests of a thousand or more subjects stay below half
of one a subject. Minutes and dollars of jobs are the launcher's estimates, but for `--subject_minutes`; what a million
subjects a day would take is computed from them. `--seeds` takes so many seeds from the first one on: the least, the
median and the most of them.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from benchmarks.simulated_aws import (
    SUBMISSIONS_A_SECOND,
    Counted,
    SimulatedBatch,
    SimulatedClients,
    SimulatedClock,
    SimulatedS3,
    SimulatedSageMaker,
    World,
)
from dreambooth_sm.fleet.subjects import FleetSubject
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.decode import split_arguments
from dreambooth_sm.storage import S3Options, S3Uri
from launcher.aws.service_errors import ServiceError
from launcher.channels import Channel
from launcher.estimates import Estimate, estimate_on
from launcher.fleets.fleet import REQUESTS_A_MINUTE, Fleet
from launcher.fleets.queue import Queue
from launcher.fleets.split import FleetEstimate, shared_minutes, split, subject_minutes, subjects_a_job
from launcher.fleets.state import job_names, write_state
from launcher.instances import find_instance
from launcher.resources import Resources
from launcher.training_request import training_request

T = TypeVar("T")
FIRST, SECOND = "ml.g5.xlarge", "ml.g6.xlarge"
ROOT = S3Uri("simulated", "dreambooth-sm/fleets/many")
WISHES: dict[str, object] = {
    "instance_prompt": "photo of zwx toy",
    "class_prompt": "photo of a toy",
    "method": "lora",
    "max_train_steps": 400,
    "num_class_images": 50,
    "fleet": "/opt/ml/input/data/fleet/fleet.jsonl",
    "manual_upload_model_path": str(ROOT / "models"),
}
# A process follows a fleet for so long before the next one attaches.
_HOURS_A_PROCESS = 3.0
# Subjects from which on requests are held to the bound.
_MANY = 1000
# Of S3 in us-east-1, dollars for a thousand requests: writing or listing, and reading. Published.
_WRITES_USD, _READS_USD = 0.005, 0.0004


class ProcessEnded(Exception):  # noqa: N818 - not an error
    """Whoever followed the fleet has gone home."""


class Shift(SimulatedClock):
    """A clock that ends a process after some hours of it."""

    ends = math.inf

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        if self.now() > self.ends:
            self.ends = math.inf
            raise ProcessEnded


def again(act: Callable[[], T], clock: SimulatedClock) -> T:
    """Does something until AWS answers."""
    while True:
        try:
            return act()
        except ServiceError as error:
            if not error.kind.passes:
                raise
        clock.sleep(5)


def estimated(hyperparameters: Hyperparameters) -> Estimate:
    """A job of one subject on one card of the first instance type."""
    return estimate_on(hyperparameters, replace(find_instance(FIRST), count=1))


def simulate(count: int, instances: int, seed: int, *, queue: Queue | None = None, **world: Any) -> dict[str, Any]:
    """Runs a fleet to its end.

    Args:
        instances: that run at a time.
        queue: that its jobs go through; None: SageMaker itself, on spot instances.
        world: of :class:`World`, where it is to be another.

    Returns:
        what it came to.
    """
    hyperparameters = Hyperparameters.parse(WISHES)
    alone = estimated(hyperparameters)
    clock, chance, calls = Shift(), random.Random(seed), Counter[str]()
    random.seed(seed)  # the launcher's pauses
    place = World(shared_minutes(alone), subject_minutes(alone), {FIRST: math.ceil(0.7 * instances), SECOND: instances})
    place = replace(place, **world)
    counted = Counted(clock, chance, calls, place.throttled)
    s3 = SimulatedS3(counted)
    sagemaker = SimulatedSageMaker(place, counted, s3)
    batch = SimulatedBatch(sagemaker, counted, instances)
    clients = SimulatedClients({"s3": s3, "sagemaker": sagemaker, "batch": batch})
    sizes = _write(count, instances, hyperparameters, alone, queue, clients)

    began, processes, lines = clock.now(), 0, list[str]()
    while True:
        clock.ends, processes = clock.now() + 3600 * _HOURS_A_PROCESS, processes + 1
        try:
            fleet = Fleet(ROOT, clients, clock).wait(lines.append)
        except ProcessEnded:
            continue
        if not (status := again(fleet.status, clock)).failed:
            break
        # Somebody has put the pictures right.
        again(partial(fleet.retry, lines.append, bad_input=True), clock)
    hours = (clock.now() - began) / 3600
    billed = sum(job.billed / 3600 * (find_instance(job.kind).usd_per_hour or 0.0) for job in sagemaker.jobs.values())
    ideal = FleetEstimate(sizes, instances, alone).minutes or 0.0
    return {
        "way": "queue" if queue else "sagemaker",
        "subjects": count,
        "done": len(status.done),
        "failed_at_first": len(sagemaker.failed),
        "trained_twice": sum(times > 1 + (each in sagemaker.failed) for each, times in sagemaker.trained.items()),
        "jobs": len(sagemaker.jobs),
        "planned_jobs": len(sizes),
        "hours": round(hours, 2),
        "hours_without_trouble": round(ideal / 60, 2),
        "most_instances": sagemaker.most_at_work,
        "processes": processes,
        "interruptions": sagemaker.interruptions,
        "jobs_lost": sagemaker.lost,
        "jobs_without_capacity": sagemaker.without_capacity,
        "dollars": round(status.dollars or 0.0, 2),
        "dollars_billed": round(billed, 2),
        "requests": dict(sorted(calls.items())),
        "requests_of_one_look": fleet.requests,
        "requests_a_subject": round(calls.total() / count, 4),
    }


def _write(
    count: int, instances: int, h: Hyperparameters, alone: Estimate, queue: Queue | None, clients: SimulatedClients
) -> tuple[int, ...]:
    """Writes the fleet's state as the launcher does; sizes of its jobs."""
    sizes = split(count, subjects_a_job(count, alone, instances))
    names = job_names("many", len(sizes))
    subjects = iter([FleetSubject(f"s{number:07d}", f"s3://pictures/{number:07d}") for number in range(count)])
    lists = {name: tuple(next(subjects) for _ in range(size)) for name, size in zip(names, sizes, strict=True)}
    resources = Resources(
        instance_type=FIRST,
        name="many",
        bucket=ROOT.bucket,
        image_uri="123456789012.dkr.ecr.us-west-2.amazonaws.com/dreambooth-sm:1",
        role="arn:aws:iam::123456789012:role/dreambooth-sm",
        spot=queue is None,
    )
    channels = {"fleet": Channel(ROOT / "jobs"), "model": Channel(S3Uri("simulated", "models/sd15"))}
    facts = {
        "name": "many",
        "parallel": instances,
        "minutes": FleetEstimate(sizes, instances, alone).minutes,
        "models": str(ROOT / "models"),
        "alternatives": [SECOND],
        "queue": queue.facts() if queue else None,
        "request": training_request(h, resources, channels),
    }
    write_state(ROOT, facts, lists, S3Options(), clients)
    return sizes


def on_paper(count: int) -> dict[str, Any]:
    """What so many subjects a day would take, computed from the launcher's estimate and published limits."""
    alone = estimated(Hyperparameters.parse(WISHES))
    size = subjects_a_job(count, alone, 1)
    jobs = math.ceil(count / size)
    minutes = shared_minutes(alone) + size * subject_minutes(alone)
    dollars = jobs * (minutes - alone.waiting_minutes) / 60 * (alone.instance.usd_per_hour or 0.0)
    # Assumed: some 25 files a model, report and outcomes among them; ten pictures a subject, and five other reads.
    writes, reads = 25 * count, 15 * count
    instances = math.ceil(jobs * minutes / (24 * 60))
    look = math.ceil(jobs / 100) + math.ceil(instances * size / 1000)  # pages: of the queue's jobs, of what has ended
    return {
        "subjects_a_day": count,
        "subjects_a_job": size,
        "jobs_a_day": jobs,
        "minutes_a_job": round(minutes, 1),
        "submission_minutes_at_5_a_second": round(jobs / SUBMISSIONS_A_SECOND / 60, 1),
        "instances_at_a_time": instances,
        "requests_of_one_look": look,
        "minutes_between_looks": round(max(1.0, look / REQUESTS_A_MINUTE), 1),
        "instance_dollars_a_day": round(dollars),
        "cents_a_subject": round(100 * dollars / count, 2),
        "s3_dollars_a_day": round((writes * _WRITES_USD + reads * _READS_USD) / 1000),
        "subjects_a_day_by_submissions": round(SUBMISSIONS_A_SECOND * 86400 * size),
    }


def bottleneck(result: dict[str, Any]) -> str:
    """What would take longest, were it alone."""
    hours = {
        "instances": result["hours_without_trouble"],
        "submissions": result["planned_jobs"] / SUBMISSIONS_A_SECOND / 3600,
        "requests of who follows it": result["requests_of_one_look"] / REQUESTS_A_MINUTE / 60,
    }
    name = max(hours, key=lambda each: hours[each])
    return f"{name}: {', '.join(f'{each} {hours[each]:.2f} h' for each in hours)}"


def main() -> None:
    wishes = dict(split_arguments(sys.argv[1:]))
    count, instances, first, seeds = (
        int(str(wishes.pop(name, default)))
        for name, default in (("subjects", 10_000), ("instances", 100), ("seed", 0), ("seeds", 1))
    )
    world = {name: float(str(wishes.pop(name))) for name in ("subject_minutes",) if name in wishes}
    if wishes:
        raise SystemExit(f"not known: {', '.join(wishes)}")
    for queue in (None, Queue("toys", share="toys", priority=1, attempts=3)):
        results = [simulate(count, instances, seed, queue=queue, **world) for seed in range(first, first + seeds)]
        if seeds > 1:
            print(json.dumps(_summed_up(results)), flush=True)
        else:
            print(json.dumps({**results[0], "bottleneck": bottleneck(results[0])}, indent=1), flush=True)
        if any(each["done"] != count or each["trained_twice"] for each in results):
            raise SystemExit("not all are done, or some were trained twice")
        if count >= _MANY and any(each["requests_a_subject"] > 0.5 for each in results):
            raise SystemExit("there were more requests than half of one a subject")
    if seeds == 1:
        print(json.dumps({"on paper": on_paper(1_000_000)}, indent=1))


def _summed_up(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several seeds: the least, the median and the most."""

    def spread(name: str) -> list[float]:
        values = sorted(each[name] for each in results)
        return [round(value, 3) for value in (values[0], statistics.median(values), values[-1])]

    told = {name: spread(name) for name in ("hours", "requests_a_subject")}
    return {name: results[0][name] for name in ("way", "subjects", "hours_without_trouble")} | told


if __name__ == "__main__":
    main()
