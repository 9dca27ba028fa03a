"""Sends requests with one of the launcher's backends, as an SDK's own user would, and prints what came of it.

Run in an environment with that SDK, with requests as a JSON list on standard input:
``python sdk_request.py boto3|estimator|model_trainer send`` prints the bodies that really went to SageMaker;
``... follow`` follows each job to its end, with its log as the SDK shows it.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import boto3

from launcher import backends
from launcher.clients import Clients


def main(backend: str, mode: str) -> None:
    sent: list[Any] = []
    session = boto3.Session()
    session.events.register(
        "before-call.sagemaker.CreateTrainingJob", lambda params, **_: sent.append(json.loads(params["body"]))
    )
    follow = mode == "follow"
    logging.basicConfig(level=logging.INFO if follow else logging.WARNING, stream=sys.stdout)
    for request in json.load(sys.stdin):
        if backend == "estimator":
            backends.estimator(request, session).fit(wait=follow)
        elif backend == "model_trainer":
            backends.model_trainer(request, session).train(wait=follow)
        else:
            job = backends.submit(request, Clients(session))
            if follow:
                job.wait()
    print(json.dumps(sent))


if __name__ == "__main__":
    main(*sys.argv[1:])
