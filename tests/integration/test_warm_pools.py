"""Warm pools on the embedded SageMaker: what a job fetched is there for the next one, if that is like it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import launcher
from launcher.local.services import EmbeddedServices
from tests.helpers.hub import Hub
from tests.helpers.services import eventually


@pytest.mark.slow
def test_a_second_job_fetches_nothing_that_the_first_one_has_fetched(
    hub: Hub, services: EmbeddedServices, pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    options: dict[str, Any] = {
        "instance_prompt": "photo of zwx toy",
        "base_model": "owner/model",
        "instance_type": "ml.g6.2xlarge",  # whose earlier jobs, of other tests, would be told of as well
        "role": services.role,
        "resolution": 64,
        "max_train_steps": 1,
    }

    def fit(**more: Any) -> tuple[launcher.Job, str, set[str]]:
        said: list[str] = []
        hub.fetched.clear()
        job = launcher.fit(pictures, log=said.append, **options, **more)
        return job, "\n".join(said), set(hub.fetched)

    def pool(job: launcher.Job) -> dict[str, Any]:
        found: dict[str, Any] = services.clients()("sagemaker").describe_training_job(TrainingJobName=job.name)
        return found.get("WarmPoolStatus", {})

    first, said, fetched = fit(keep_alive=600)
    assert "warm pool" not in said
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in fetched
    assert pool(first)["Status"] == "Available"

    said_no: list[str] = []
    launcher.check(pictures, log=said_no.append, vpc=["subnet-1", "sg-1"], **options)
    why = "security groups: none, and the job's is sg-1; subnets: none, and the job's is subnet-1"
    assert f"warm pool: that of {first.name} can't be used ({why})" in said_no

    # It is given back after this one, which does not ask for it to be kept.
    second, said, fetched = fit()
    assert re.search(
        rf"warm pool: that of {first.name}, until \d\d:\d\d UTC, saves about \d\.\d minutes \(.*training image", said
    )
    assert re.search(rf"base model: 0\.0 minutes \(in the warm pool since {first.name}, assumed\)", said)
    assert fetched == set()
    assert (pool(first)["Status"], pool(first)["ReusedByJob"]) == ("Reused", second.name)
    assert pool(second)["Status"] == "Terminated"
    assert not [*services.sagemaker.named(second.name).tree.parents[1].glob("warm-pools/*")]


def test_an_instance_is_kept_for_as_long_as_was_asked_for(services: EmbeddedServices) -> None:
    from launcher.local.warm_pools import EmbeddedWarmPools

    request = {
        "TrainingJobName": "one",
        "RoleArn": services.role,
        "ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "KeepAlivePeriodInSeconds": 1},
    }
    pools = EmbeddedWarmPools(Path(services.sagemaker._directory, "pools"))
    first = pools.enter(request, "us-east-1")
    assert first is not None
    (first.directory / "model").touch()
    assert pools.enter({**request, "TrainingJobName": "beside"}, "us-east-1") is not first
    first.end(is_healthy=True)
    assert pools.enter({**request, "EnableManagedSpotTraining": True}, "us-east-1") is None
    elsewhere = pools.enter(request, "eu-west-1")
    assert elsewhere is not None
    assert elsewhere.directory != first.directory
    second = pools.enter({**request, "TrainingJobName": "two"}, "us-east-1")
    assert second is not None
    assert (second.directory / "model").exists()
    assert first.describe()["ReusedByJob"] == "two"
    second.end(is_healthy=True)
    eventually(lambda: second.describe()["Status"] == "Terminated")
    assert not second.directory.exists()
    elsewhere.end(is_healthy=False)
    assert elsewhere.describe()["Status"] == "Terminated"
