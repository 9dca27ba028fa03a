"""Jobs that the SageMaker SDKs start and follow, on the embedded SageMaker, to whatever end they come."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import launcher
from dreambooth_sm.storage import S3Uri, list_objects
from launcher.jobs.job import Job
from launcher.local.services import EmbeddedServices
from tests.helpers.jobs import SMALL, read_weights, same_weights
from tests.helpers.patience import PATIENCE
from tests.helpers.sdks import start_script
from tests.helpers.services import eventually

STEPS = 24
VALUES = {name: value for name, value in SMALL.items() if name != "pretrained_model_name_or_path"}
LONG = {"class_prompt": None, "max_train_steps": STEPS, "save_steps": 4, "checkpoints_total_limit": 2}
JOBS: dict[str, dict[str, Any]] = {
    "undisturbed": LONG,
    "spot": {**LONG, "spot": True, "max_minutes": 60},
    "stopped": {"class_prompt": None, "max_train_steps": 5000},
    "failing": {"class_prompt": None},
}
SECRETS = {"HF_TOKEN": "hf_" + "aBcDeFgHiJ" * 3, "AWS_SESSION_TOKEN": "planted-session-token-of-aws"}


@dataclass(frozen=True)
class Followed:
    """Jobs that an SDK started and followed, all of them at the same time.

    Attributes:
        jobs: by kind.
        shown: what the SDK showed of each, in the end.
        codes: exit code of the process that followed it.
        shown_live: what the SDK had shown of the stopped job before it was stopped.
    """

    backend: str
    jobs: dict[str, Job]
    shown: dict[str, str]
    codes: dict[str, int]
    shown_live: str


@pytest.fixture(scope="module", params=["estimator", "model_trainer"])
def followed(
    request: pytest.FixtureRequest,
    services: EmbeddedServices,
    pictures: Path,
    tiny_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Followed:
    backend, directory = request.param, tmp_path_factory.mktemp(request.param)
    names = {kind: f"{kind}-{backend.replace('_', '-')}" for kind in JOBS}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in SECRETS.items():  # of this process, the SDK's and the jobs'
            environment.setenv(name, value)
        requests = {
            kind: launcher.request(
                pictures,
                base_model=tiny_base,
                instance_type="ml.g5.xlarge",
                role=services.role,
                name=names[kind],
                **{**VALUES, **options},
            )
            for kind, options in JOBS.items()
        }
        requests["failing"]["HyperParameters"]["resolution"] = "511"  # which the launcher itself would refuse
        process = start_script(
            backend,
            "sdk_request.py",
            [backend, "follow"],
            directory,
            {**services.environment(), **SECRETS},
            standard_input=list(requests.values()),
        )
        try:
            spot = eventually(lambda: _find(services, names["spot"]))
            eventually(lambda: "step=2 " in "\n".join(spot.lines()))
            services.sagemaker.interrupt(spot.name)
            stopped = eventually(lambda: _find(services, names["stopped"]))
            log = directory / f"{names['stopped']}.log"
            # The job would run for thousands of steps: only a log that is shown live gets so far.
            eventually(lambda: "step=2 loss=" in log.read_text() or stopped.status != "InProgress")
            shown_live = log.read_text()
            stopped.stop()
            output, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    codes = json.loads(output.splitlines()[-1])
    return Followed(
        backend,
        {kind: _find(services, name) for kind, name in names.items()},
        {kind: (directory / f"{name}.log").read_text() for kind, name in names.items()},
        {kind: codes[name] for kind, name in names.items()},
        shown_live,
    )


def _find(services: EmbeddedServices, name: str) -> Any:
    """The job, once it is there; the SDK 3 adds the time to its name."""
    found = [job.name for job in list(services.sagemaker.jobs.values()) if job.name.startswith(name)]
    return Job(found[0], services.clients()) if found else None


def checkpoints(job: Job) -> set[str]:
    uri = S3Uri.parse(job.describe()["CheckpointConfig"]["S3Uri"])
    return {Path(name).name for name in list_objects(uri)}


def test_a_job_runs_and_its_log_is_shown(followed: Followed) -> None:
    assert followed.codes["undisturbed"] == 0, followed.shown["undisturbed"]
    assert followed.jobs["undisturbed"].status == "Completed"
    for step in range(1, STEPS + 1):
        assert followed.shown["undisturbed"].count(f"step={step} loss=") == 1


def test_the_log_is_shown_while_the_job_runs(followed: Followed) -> None:
    assert "step=2 loss=" in followed.shown_live
    assert "phase=train state=ended" not in followed.shown_live


def test_a_failing_job_raises_with_its_reason_after_its_log(followed: Followed) -> None:
    job, shown = followed.jobs["failing"], followed.shown["failing"]
    assert job.status == "Failed"
    reason = job.describe()["FailureReason"]
    assert "resolution=511" in reason
    error = {"estimator": "UnexpectedStatusException", "model_trainer": "FailedStatusError"}[followed.backend]
    log, _, raised = shown.partition("Traceback")
    assert followed.codes["failing"] == 1
    assert error in raised.splitlines()[-1]
    assert reason in raised.splitlines()[-1]
    assert job.lines()
    assert all(line in log for line in job.lines())


def test_a_stopped_job_keeps_a_checkpoint_and_raises_nothing(followed: Followed) -> None:
    job, shown = followed.jobs["stopped"], followed.shown["stopped"]
    description = job.describe()
    assert (description["TrainingJobStatus"], description["SecondaryStatus"]) == ("Stopped", "Stopped")
    assert "state.json" in checkpoints(job)
    assert followed.codes["stopped"] == 0, shown
    assert "Traceback" not in shown
    said = {"estimator": "Job ended with status 'Stopped'", "model_trainer": "Final Resource Status: [bold]Stopped"}
    assert said[followed.backend] in shown


def test_an_interrupted_spot_job_is_seen_through_to_the_same_weights(followed: Followed, tmp_path: Path) -> None:
    job, undisturbed = followed.jobs["spot"], followed.jobs["undisturbed"]
    assert followed.codes["spot"] == 0, followed.shown["spot"]
    assert job.status == "Completed"
    states = [entry["Status"] for entry in job.describe()["SecondaryStatusTransitions"]]
    one = ["Downloading", "Training"]
    assert states == ["Starting", *one, "Interrupted", "Restarting", *one, "Uploading", "Completed"]
    assert any(line.startswith("resumed after step") for line in job.lines())
    assert [entry["step"] for entry in job.history()] == list(range(1, STEPS + 1))
    assert "step=2 loss=" in followed.shown["spot"]
    one_model, other = job.download(tmp_path / "one"), undisturbed.download(tmp_path / "other")
    assert same_weights(read_weights(one_model, "unet"), read_weights(other, "unet"))


def test_planted_secrets_stay_where_they_are(followed: Followed, services: EmbeddedServices) -> None:
    texts = [*followed.shown.values()]
    for job in followed.jobs.values():
        texts += [json.dumps(services.sagemaker.named(job.name).request), *job.lines()]
    for secret in (*SECRETS.values(), services.environment()["AWS_SECRET_ACCESS_KEY"]):
        assert not [text for text in texts if secret in text]
