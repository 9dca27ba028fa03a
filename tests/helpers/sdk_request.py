"""Sends requests with one of the launcher's three ways, as an SDK's own user would.

Run in an environment with that SDK, with requests as a JSON list on standard input:
``python sdk_request.py boto3|estimator|model_trainer send`` prints the bodies that really went to SageMaker;
``... follow`` follows all the jobs to their ends at the same time, each in a process of its own: what the SDK shows
goes to ``NAME.log``, line by line. Prints the exit code of each process by its job's name.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import boto3

from launcher import sdks, submit
from launcher.aws.clients import Clients

# Beside this file: among what the SDK needs is another package of the name `tests`.
from fast_clock import let_time_fly  # type: ignore[import-not-found]  # isort: skip

MODULES = {"boto3": "boto3", "estimator": "sagemaker.estimator", "model_trainer": "sagemaker.train"}


def start(backend: str, request: dict[str, Any], session: boto3.Session, *, follow: bool) -> None:
    if backend == "estimator":
        sdks.estimator(request, session).fit(wait=follow)
    elif backend == "model_trainer":
        sdks.model_trainer(request, session).train(wait=follow)
    else:
        job = submit.submit(request, Clients(session))
        if follow:
            job.wait()


def send(backend: str, requests: Sequence[dict[str, Any]]) -> list[Any]:
    sent: list[Any] = []
    session = boto3.Session()
    session.events.register(
        "before-call.sagemaker.CreateTrainingJob", lambda params, **_: sent.append(json.loads(params["body"]))
    )
    for request in requests:
        start(backend, request, session, follow=False)
    return sent


def follow(backend: str, request: dict[str, Any]) -> None:
    with Path(f"{request['TrainingJobName']}.log").open("w") as shown:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(shown.fileno(), stream.fileno())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    start(backend, request, boto3.Session(), follow=True)


def follow_all(backend: str, requests: Sequence[dict[str, Any]]) -> dict[str, int | None]:
    import_module(MODULES[backend])  # once, before the processes part: it takes seconds
    let_time_fly()
    fork = multiprocessing.get_context("fork")
    processes = {r["TrainingJobName"]: fork.Process(target=follow, args=(backend, r)) for r in requests}
    for process in processes.values():
        process.start()
    for process in processes.values():
        process.join()
    return {name: process.exitcode for name, process in processes.items()}


if __name__ == "__main__":
    run = {"send": send, "follow": follow_all}[sys.argv[2]]
    print(json.dumps(run(sys.argv[1], json.load(sys.stdin))))
