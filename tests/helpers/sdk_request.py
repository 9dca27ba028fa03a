"""Sends a request with one of the launcher's backends, and prints the body of what really went to SageMaker.

Run as ``python sdk_request.py boto3|estimator|model_trainer < request.json``, in an environment with that SDK.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import boto3

from launcher import backends
from launcher.clients import Clients


def main(backend: str) -> None:
    sent: list[Any] = []

    def record(params: dict[str, Any], **_: object) -> None:
        sent.append(json.loads(params["body"]))

    request = json.load(sys.stdin)
    session = boto3.Session()
    session.events.register("before-call.sagemaker.CreateTrainingJob", record)
    if backend == "boto3":
        backends.submit(request, Clients(session))
    elif backend == "estimator":
        backends.estimator(request, session).fit(wait=False)
    else:
        backends.model_trainer(request, session).train(wait=False)
    print(json.dumps(sent))


if __name__ == "__main__":
    main(sys.argv[1])
