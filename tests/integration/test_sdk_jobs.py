"""Jobs that the SageMaker SDKs start and follow really run, on the embedded SageMaker."""

from __future__ import annotations

from pathlib import Path

import pytest

import launcher
from launcher.embedded import EmbeddedServices
from tests.helpers.jobs import SMALL
from tests.helpers.sdks import run_backend


@pytest.mark.parametrize("backend", ["estimator", "model_trainer"])
def test_a_job_runs_and_its_log_is_shown(
    backend: str, services: EmbeddedServices, pictures: Path, tiny_base: Path, tmp_path: Path
) -> None:
    values = {name: value for name, value in SMALL.items() if name not in ("pretrained_model_name_or_path",)}
    request = launcher.request(
        pictures, base_model=tiny_base, instance_type="ml.g5.xlarge", role=services.role, **values
    )
    ended = run_backend(backend, "follow", [request], tmp_path, services.environment())
    assert ended.returncode == 0, ended.stderr
    assert "step=2 loss=" in ended.stdout
    (job,) = [job for job in services.sagemaker.jobs.values() if job.name.startswith(request["TrainingJobName"])]
    assert job.status == "Completed"
