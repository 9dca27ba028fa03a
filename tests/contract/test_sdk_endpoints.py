"""What the documentation says to do with both SDKs makes the launcher's endpoint.

The SDKs can't be installed together: each runs in an environment of its own, which `make test` sets up.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import launcher
from launcher.local.s3 import EmbeddedS3
from tests.helpers.sdks import run_script

pytestmark = pytest.mark.slow

DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
ROLE = "arn:aws:iam::123456789012:role/serve"


@pytest.mark.parametrize(("backend", "marked"), [("estimator", "# SDK 2"), ("model_trainer", "# SDK 3")])
def test_a_sdk_sends_the_launchers_requests(backend: str, marked: str, s3: EmbeddedS3, tmp_path: Path) -> None:
    (code,) = [each for each in re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.S | re.M) if marked in each]
    image = "123456789012.dkr.ecr.us-east-1.amazonaws.com/dreambooth-sm:1"
    others: list[dict[str, Any]] = [
        {},
        {"base_model": "s3://bucket/base", "network_isolation": True, "instance_count": 2, "tags": {"team": "toys"}},
        {"batch": 4, "safety_labels": "nsfw"},
    ]
    asked = [
        launcher.endpoint_requests(
            "zwx", "s3://bucket/zwx", image_uri=image, role=ROLE, instance_type="ml.g5.xlarge", **options
        )
        for options in others
    ]
    given = [{"code": code, "requests": requests, "role": ROLE} for requests in asked]
    ended = run_script(backend, "sdk_endpoint.py", [], tmp_path, s3.environment(), standard_input=given)
    sent = json.loads(ended.stdout.splitlines()[-1]) if ended.stdout else []
    assert len(sent) == len(asked), ended.stderr
    for bodies, requests in zip(sent, asked, strict=True):
        assert list(bodies) == ["CreateModel", "CreateEndpointConfig", "CreateEndpoint"]
        bodies["CreateModel"]["PrimaryContainer"].setdefault("Environment", {})  # SDK 3 leaves out what is empty
        assert list(bodies.values()) == list(requests.values())
