"""Both SDKs make the launcher's pipeline, and check what its steps refer to by their own rules.

The SDKs can't be installed together: each runs in an environment of its own, which `make test` sets up.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.local.s3 import EmbeddedS3
from tests.helpers.sdks import run_script
from tests.unit.test_pipelines import definition

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("backend", ["estimator", "model_trainer"])
def test_a_sdk_sends_the_definition(backend: str, s3: EmbeddedS3, tmp_path: Path) -> None:
    spot = definition({"score": 0.1}, spot=True, vpc=["subnet-0a", "sg-0c"])
    requests = [
        {
            "PipelineName": f"{backend.replace('_', '-')}-{number}",
            "PipelineDescription": "Trains",
            "PipelineDefinition": json.dumps(found),
            "RoleArn": "arn:aws:iam::123456789012:role/train",
            "Tags": [{"Key": "dreambooth-sm:pipeline", "Value": "toys"}],
        }
        for number, found in enumerate([definition(), spot])
    ]
    ended = run_script(backend, "sdk_pipeline.py", [], tmp_path, s3.environment(), standard_input=requests)
    if "No module named" in ended.stderr or "needs the SageMaker SDK" in ended.stderr:
        pytest.skip("the environment was made before pipelines were tested: remove it, and make it again")
    sent = json.loads(ended.stdout.splitlines()[-1]) if ended.stdout else []
    assert len(sent) == len(requests), ended.stderr
    for body, request in zip(sent, requests, strict=True):
        own = json.loads(body.pop("PipelineDefinition"))
        assert not any([own.pop("PipelineExperimentConfig"), own.pop("MlflowConfig", None)])
        assert own == json.loads(request.pop("PipelineDefinition"))
        del body["ClientRequestToken"]
        assert body == request
