"""Makes endpoints with an SDK's own objects, by a block of code that the documentation has.

In an environment with SDK 2 or 3 and with ``[{"code": ..., "requests": ..., "role": ...}, ...]`` on standard input,
prints the bodies that went to SageMaker. Nothing is made: each request is answered here.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Any

from botocore.client import BaseClient


def main() -> None:
    sent: list[dict[str, Any]] = []

    def answer(client: Any, operation: str, asked: dict[str, Any]) -> dict[str, Any]:
        if operation.startswith("Create"):
            sent[-1][operation] = asked
        now, arn = datetime.now(UTC), "arn:aws:sagemaker:us-east-1:123456789012:x/zwx"
        names = ("Model", "EndpointConfig", "Endpoint")
        said = {f"{name}{end}": value for name in names for end, value in (("Name", "zwx"), ("Arn", arn))}
        return {**said, "EndpointStatus": "Creating", "CreationTime": now, "LastModifiedTime": now}

    # SDK 3 makes sessions of its own, which have no hooks.
    BaseClient._make_api_call = answer  # type: ignore[attr-defined]
    for given in json.load(sys.stdin):
        sent.append({})
        exec(given["code"], {"requests": given["requests"], "role": given["role"]})
    print(json.dumps(sent))


if __name__ == "__main__":
    main()
