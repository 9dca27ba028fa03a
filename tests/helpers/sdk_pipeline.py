"""Makes pipelines with an SDK's own objects, as its own user would.

In an environment with SDK 2 or 3 and with requests as a JSON list on standard input, prints the bodies that went to
SageMaker.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import boto3

from launcher.pipelines.sdk import sdk_pipeline


def main() -> None:
    sent: list[Any] = []
    session = boto3.Session()
    session.events.register(
        "before-call.sagemaker.CreatePipeline", lambda params, **_: sent.append(json.loads(params["body"]))
    )
    for request in json.load(sys.stdin):
        made = sdk_pipeline(request, session)
        made.create(request["RoleArn"], request["PipelineDescription"], request["Tags"])
    print(json.dumps(sent))


if __name__ == "__main__":
    main()
