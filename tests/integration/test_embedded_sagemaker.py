"""The embedded SageMaker, through boto3: jobs of ours, and small programs for the rest of the contract."""

from __future__ import annotations

import itertools
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from PIL import Image

import launcher
from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import upload_directory
from launcher.jobs.job import Job, JobFailed, JobStopped
from launcher.local.services import embedded_services
from tests.helpers.jobs import SMALL, read_weights, same_weights
from tests.helpers.services import Workplace, eventually

NO_CLASS = {"class_prompt": "None"}
STEPS = 24
LONG = {**NO_CLASS, "max_train_steps": str(STEPS), "save_steps": "4", "checkpoints_total_limit": "2"}
PIPELINE = {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"}


@pytest.fixture(autouse=True, scope="module")
def _no_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="module")
def workplace() -> Iterator[Workplace]:
    with embedded_services() as services:
        yield Workplace(services)


def checkpoints_at(workplace: Workplace, prefix: str) -> dict[str, Any]:
    return {"CheckpointConfig": {"S3Uri": str(workplace.bucket / prefix)}}


# --- Jobs of ours ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def completed(workplace: Workplace, pictures: Path, tiny_base: Path) -> tuple[Job, list[tuple[str, str]]]:
    """A job that has ended, and what its log said at which status, while it ran."""
    algorithm = {
        "TrainingImage": "dreambooth-sm:test",
        "TrainingInputMode": "File",
        "MetricDefinitions": [{"Name": "loss", "Regex": r"\bloss=(\S+)"}],
    }
    job = workplace.train(
        pictures,
        tiny_base,
        LONG,
        AlgorithmSpecification=algorithm,
        Environment={"OMP_NUM_THREADS": "1", "SAID": "so"},
        Tags=[{"Key": "team", "Value": "toys"}],
    )
    return job, [(line, job.status) for line in job.logs(follow=True)]


def test_the_log_is_live(completed: tuple[Job, list[tuple[str, str]]]) -> None:
    _, said = completed
    assert ("step=1", "InProgress") in [(line.split()[0], status) for line, status in said]
    assert [line for line, _ in said if line.startswith("phase=save")]
    steps = [int(line.split()[0].removeprefix("step=")) for line, _ in said if line.startswith("step=")]
    assert steps == list(range(1, STEPS + 1))


def test_the_description_says_what_was_asked_and_what_became_of_it(
    workplace: Workplace, completed: tuple[Job, list[tuple[str, str]]]
) -> None:
    job, said = completed
    description = job.describe()
    assert description["TrainingJobStatus"] == description["SecondaryStatus"] == "Completed"
    assert description["Environment"] == {"OMP_NUM_THREADS": "1", "SAID": "so"}
    assert description["HyperParameters"]["max_train_steps"] == str(STEPS)
    assert description["ResourceConfig"]["InstanceType"] == "ml.g5.xlarge"
    transitions = description["SecondaryStatusTransitions"]
    assert [entry["Status"] for entry in transitions] == [
        "Starting",
        "Downloading",
        "Training",
        "Uploading",
        "Completed",
    ]
    assert all(one["EndTime"] == two["StartTime"] for one, two in itertools.pairwise(transitions))
    assert description["CreationTime"] <= description["TrainingStartTime"] <= description["TrainingEndTime"]
    assert description["BillableTimeInSeconds"] >= 1
    last = next(line for line, _ in reversed(said) if line.startswith(f"step={STEPS} "))
    assert description["FinalMetricDataList"][0]["MetricName"] == "loss"
    assert f" loss={description['FinalMetricDataList'][0]['Value']:.4g} " in last
    tags = workplace.clients("sagemaker").list_tags(ResourceArn=description["TrainingJobArn"])["Tags"]
    assert tags == [{"Key": "team", "Value": "toys"}]


def test_uncompressed_output_is_plain_files(
    workplace: Workplace, completed: tuple[Job, list[tuple[str, str]]], tiny_base: Path, tmp_path: Path
) -> None:
    job, _ = completed
    artifacts = job.describe()["ModelArtifacts"]["S3ModelArtifacts"]
    assert artifacts == f"{workplace.bucket}/output/{job.name}/output/model/"
    assert workplace.keys(f"output/{job.name}/output/model") >= PIPELINE
    assert_trained(job.download(tmp_path / "model"), tiny_base)


def test_compressed_output_is_an_archive(workplace: Workplace, pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    output = {"S3OutputPath": str(workplace.bucket / "packed")}
    job = workplace.train(pictures, tiny_base, NO_CLASS, OutputDataConfig=output).wait(log=lambda line: None)
    assert workplace.keys("packed") == {f"{job.name}/output/model.tar.gz"}
    assert job.model_uri == f"{workplace.bucket}/packed/{job.name}/output/model.tar.gz"
    assert_trained(job.download(tmp_path / "model"), tiny_base)


def test_an_interrupted_spot_job_ends_with_the_weights_of_an_uninterrupted_one(
    workplace: Workplace,
    completed: tuple[Job, list[tuple[str, str]]],
    pictures: Path,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    spot = {"EnableManagedSpotTraining": True}
    stopping = {"StoppingCondition": {"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 900}}
    job = workplace.train(pictures, tiny_base, LONG, **spot, **stopping, **checkpoints_at(workplace, "spot"))
    lines = job.logs(follow=True)
    next(line for line in lines if line.startswith("checkpoint="))
    eventually(lambda: workplace.keys("spot"))
    assert job.status == "InProgress", "checkpoints are synced while the job runs"
    workplace.services.sagemaker.interrupt(job.name)
    rest = list(lines)
    assert any(line.startswith("resumed after step") for line in rest)
    assert job.status == "Completed"
    states = [entry["Status"] for entry in job.describe()["SecondaryStatusTransitions"]]
    one = ["Downloading", "Training"]
    assert states == ["Starting", *one, "Interrupted", "Restarting", *one, "Uploading", "Completed"]
    assert [entry["step"] for entry in job.history()] == list(range(1, STEPS + 1))
    other, _ = completed
    one, two = job.download(tmp_path / "one"), other.download(tmp_path / "two")
    assert same_weights(read_weights(one, "unet"), read_weights(two, "unet"))
    steps = {key.split("/")[0] for key in workplace.keys("spot")}
    assert len(steps) == 2, "what the job deleted is gone in S3 as well"


@pytest.mark.parametrize("direct", [True, False], ids=["uploaded by the job", "synced with the checkpoints"])
def test_pictures_are_shown_while_the_job_runs(
    workplace: Workplace, pictures: Path, tiny_base: Path, tmp_path: Path, direct: bool
) -> None:
    values = {**NO_CLASS, "validation_prompt": "a toy", "validation_guidance_scale": "1", "max_train_steps": "2000"}
    more: dict[str, Any] = checkpoints_at(workplace, "drawing")
    if direct:
        target = workplace.bucket / "drawn"
        more = {}
        values["manual_upload_model_path"] = str(target)
        earlier = tmp_path / "earlier" / "samples" / "step-000000-prompt-0-seed-2000-0123abcd.png"
        earlier.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(earlier)
        upload_directory(tmp_path / "earlier", target, job="earlier", client=workplace.clients("s3"))
        time.sleep(1)  # S3 keeps whole seconds
    job = workplace.train(pictures, tiny_base, {**values, "validation_steps": "2"}, **more)
    shown = eventually(lambda: len(found := _samples(job)) >= 2 and found)
    assert job.status == "InProgress"
    assert {picture.size for picture in shown} == {(64, 64)}, "and none of another job's"
    assert shown[0].text["prompt"] == "a toy"
    job.stop()
    with pytest.raises(JobStopped):
        job.wait(lambda line: None)


def _samples(job: Job) -> list[Any]:
    try:
        return list(job.samples())
    except UserError:  # nothing is there yet
        return []


def test_what_is_no_whole_model_yet_is_not_downloaded(
    workplace: Workplace, pictures: Path, tiny_base: Path, tmp_path: Path
) -> None:
    target = workplace.bucket / "whole"
    values = {**NO_CLASS, "validation_prompt": "a toy", "validation_guidance_scale": "1", "max_train_steps": "40"}
    job = workplace.train(pictures, tiny_base, {**values, "manual_upload_model_path": str(target)})
    eventually(job.samples)
    with pytest.raises(UserError, match=r"has no whole model in .* yet: it is InProgress"):
        job.download(tmp_path / "model")
    job.wait(lambda line: None)
    assert_trained(job.download(tmp_path / "model"), tiny_base)
    assert len(job.samples()) == 2


def test_a_stopped_job_leaves_a_checkpoint(workplace: Workplace, pictures: Path, tiny_base: Path) -> None:
    job = workplace.train(
        pictures, tiny_base, {**NO_CLASS, "max_train_steps": "5000"}, **checkpoints_at(workplace, "stopped")
    )
    assert next(line for line in job.logs(follow=True) if line.startswith("step=2 "))
    job.stop()
    with pytest.raises(JobStopped, match="stopped"):
        job.wait(log=lambda line: None)
    assert job.status == "Stopped"
    assert any(key.endswith("state.json") for key in workplace.keys("stopped"))


def test_a_failed_job_says_why(workplace: Workplace, pictures: Path, tiny_base: Path) -> None:
    job = workplace.train(pictures, tiny_base, {"resolution": "511"})
    with pytest.raises(JobFailed, match="resolution") as caught:
        job.wait(log=lambda line: None)
    assert "resolution" in job.describe()["FailureReason"]
    assert any("resolution" in line for line in caught.value.lines)
    assert not workplace.keys(f"output/{job.name}")


def assert_trained(model: Path, base: Path) -> None:
    before = {name: tensor.half() for name, tensor in read_weights(base, "unet").items()}
    assert not same_weights(read_weights(model, "unet"), before)


# --- The contract, with programs of a few lines ----------------------------------------------------------------------

HEAD = """
import json, os, pathlib, signal, sys, time
base = pathlib.Path(os.environ["SAGEMAKER_BASE_DIR"])
"""
RunProgram = Callable[..., Job]


@pytest.fixture
def run_program(tmp_path: Path) -> Iterator[RunProgram]:
    """Starts a job whose program is the given one, on services of its own."""
    program = tmp_path / "train.py"
    with embedded_services(entrypoint=program, grace=1) as services:
        workplace = Workplace(services)

        def run(code: str, **more: Any) -> Job:
            program.write_text(HEAD + code)
            return workplace.start(**more)

        run.workplace = workplace  # type: ignore[attr-defined]
        yield run


def ended(job: Job) -> dict[str, Any]:
    return eventually(
        lambda: (now := job.describe())["TrainingJobStatus"] in ("Completed", "Failed", "Stopped") and now
    )


def test_what_a_container_finds(run_program: RunProgram, tmp_path: Path) -> None:
    workplace: Workplace = run_program.workplace  # type: ignore[attr-defined]
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "a.txt").write_text("a")
    channels = {"whole": workplace.upload(folder, "data"), "one": str(workplace.bucket / "data/below/a.txt")}
    job = run_program(
        """
config = base / "input" / "config"
print(json.dumps({
    "files": sorted(str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()),
    "folders": sorted(p.name for p in base.iterdir()),
    "hyperparameters": json.loads((config / "hyperparameters.json").read_text()),
    "channels": sorted(json.loads((config / "inputdataconfig.json").read_text())),
    "hosts": json.loads((config / "resourceconfig.json").read_text())["hosts"],
    "environment": {name: os.environ.get(name) for name in ("TRAINING_JOB_NAME", "TRAINING_JOB_ARN", "MINE")},
    "argument": sys.argv[1:],
}))
""",
        channels=channels,
        hyperparameters={"a": "1", "b": "false"},
        Environment={"MINE": "yes"},
    )
    description = ended(job)
    found = json.loads(job.lines()[0])
    assert found == {
        "files": [
            "input/config/hyperparameters.json",
            "input/config/inputdataconfig.json",
            "input/config/resourceconfig.json",
            "input/data/one/a.txt",
            "input/data/whole/below/a.txt",
        ],
        "folders": ["checkpoints", "input", "model", "output"],
        "hyperparameters": {"a": "1", "b": "false"},
        "channels": ["one", "whole"],
        "hosts": ["algo-1"],
        "environment": {
            "TRAINING_JOB_NAME": job.name,
            "TRAINING_JOB_ARN": description["TrainingJobArn"],
            "MINE": "yes",
        },
        "argument": ["train"],
    }


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("(base / 'output' / 'failure').write_text('x' * 2000); sys.exit(3)", "x" * 1024),
        ("sys.exit(3)", "AlgorithmError: , exit code: 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "instance type with more memory"),
    ],
)
def test_failure_reasons(code: str, reason: str, run_program: RunProgram) -> None:
    description = ended(run_program(code))
    assert description["TrainingJobStatus"] == description["SecondaryStatus"] == "Failed"
    assert reason in description["FailureReason"]
    assert len(description["FailureReason"]) <= 1024


def test_a_job_that_does_not_heed_the_stop_is_killed(run_program: RunProgram) -> None:
    job = run_program("signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up')\nwhile True: time.sleep(0.1)")
    eventually(lambda: "up" in job.lines())
    job.stop()
    description = ended(job)
    assert description["TrainingJobStatus"] == "Stopped"
    assert "Stopping" in [entry["Status"] for entry in description["SecondaryStatusTransitions"]]
    assert job.lines() == ["up"]
    job.stop()  # changes nothing
    with pytest.raises(ClientError, match="is in status Stopped"):
        run_program.workplace.clients("sagemaker").stop_training_job(TrainingJobName=job.name)  # type: ignore[attr-defined]


def test_the_time_limit(run_program: RunProgram) -> None:
    job = run_program("time.sleep(3600)", StoppingCondition={"MaxRuntimeInSeconds": 1})
    with pytest.raises(JobStopped, match="MaxRuntimeExceeded") as caught:
        job.wait(log=lambda line: None)
    assert "more minutes" in (caught.value.advice or "")


def test_checkpoints_are_there_at_the_start_and_follow_what_the_job_does(run_program: RunProgram) -> None:
    workplace: Workplace = run_program.workplace  # type: ignore[attr-defined]
    s3 = workplace.clients("s3")
    for name in ("kept", "removed"):
        s3.put_object(Bucket=workplace.bucket.bucket, Key=f"state/{name}", Body=name.encode())
    job = run_program(
        """
folder = base / "checkpoints"
print(*sorted(p.name for p in folder.iterdir()), flush=True)
(folder / "removed").unlink()
(folder / "kept").write_text("changed")
(folder / "new.sagemaker-uploading").touch()
(folder / "below").mkdir()
(folder / "below" / "new").write_text("new")
while not (base / "go").exists(): time.sleep(0.05)
""",
        **checkpoints_at(workplace, "state"),
    )
    eventually(lambda: workplace.keys("state") == {"kept", "below/new"})
    assert job.status == "InProgress"
    assert workplace.body("state/kept") == b"changed"
    (workplace.services.sagemaker.named(job.name).tree / "go").touch()
    assert ended(job)["TrainingJobStatus"] == "Completed"
    assert job.lines() == ["kept removed"]


def test_output_data_is_kept_beside_the_model(run_program: RunProgram) -> None:
    workplace: Workplace = run_program.workplace  # type: ignore[attr-defined]
    code = "(base / 'output/data/curve.csv').write_text('1,2')"
    job = run_program(code, OutputDataConfig={"S3OutputPath": str(workplace.bucket / "out")})
    ended(job)
    assert workplace.keys(f"out/{job.name}/output") == {"model.tar.gz", "output.tar.gz"}
    with tarfile.open(fileobj=BytesIO(workplace.body(f"out/{job.name}/output/output.tar.gz"))) as tar:
        assert tar.getnames() == ["curve.csv"]


def test_an_isolated_job_has_no_credentials(run_program: RunProgram) -> None:
    code = "print(os.environ.get('AWS_SECRET_ACCESS_KEY'), os.environ['HF_HUB_OFFLINE'])"
    job = run_program(code, EnableNetworkIsolation=True)
    ended(job)
    assert job.lines() == ["None 1"]


def test_every_line_of_a_talkative_job_is_there_once(run_program: RunProgram) -> None:
    job = run_program("for n in range(20000): print(n)\nprint(); print('end')")
    assert list(job.logs(follow=True)) == [*map(str, range(20000)), "end"]


def test_only_spot_jobs_are_interrupted(run_program: RunProgram) -> None:
    workplace: Workplace = run_program.workplace  # type: ignore[attr-defined]
    job = run_program("time.sleep(3600)")
    with pytest.raises(ValueError, match="not a spot job"):
        workplace.services.sagemaker.interrupt(job.name)


def test_jobs_that_run_are_stopped_with_the_services(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(
        f"import os, time, pathlib; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
    )
    program.write_text(program.read_text() + "time.sleep(3600)")
    with embedded_services(entrypoint=program, grace=1) as services:
        Workplace(services).start()
        eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# --- What the API refuses and lists ----------------------------------------------------------------------------------


def test_names_are_unique_and_jobs_are_found(run_program: RunProgram) -> None:
    workplace: Workplace = run_program.workplace  # type: ignore[attr-defined]
    sagemaker = workplace.clients("sagemaker")
    jobs = [run_program("", TrainingJobName=f"{name}-toy") for name in ("a", "b", "c")]
    for job in jobs:
        ended(job)
    with pytest.raises(sagemaker.exceptions.ResourceInUse):
        run_program("", TrainingJobName="b-toy")
    with pytest.raises(ClientError, match="not found"):
        sagemaker.describe_training_job(TrainingJobName="nobody")
    names = []
    for page in sagemaker.get_paginator("list_training_jobs").paginate(
        NameContains="toy", StatusEquals="Completed", PaginationConfig={"PageSize": 2}
    ):
        assert len(page["TrainingJobSummaries"]) <= 2
        names += [job["TrainingJobName"] for job in page["TrainingJobSummaries"]]
    assert names == ["c-toy", "b-toy", "a-toy"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 1}}, "one host"),
        ({"TrainingJobName": "no_name"}, "no_name"),
        ({"RoleArn": "short"}, "RoleArn"),
    ],
)
def test_requests_that_can_not_be_served(more: dict[str, Any], words: str, run_program: RunProgram) -> None:
    workplace: Workplace = run_program.workplace  # type: ignore[attr-defined]
    client = workplace.services.session().client(  # one that does not check by itself
        "sagemaker", endpoint_url=workplace.services.endpoint_url, config=_unchecked()
    )
    request = workplace.request(**more)
    del request["InputDataConfig"]
    with pytest.raises(ClientError, match=words) as caught:
        client.create_training_job(**request)
    assert caught.value.response["Error"]["Code"] == "ValidationException"


def _unchecked() -> Any:
    from botocore.config import Config

    return Config(parameter_validation=False)


def test_a_channel_without_data_fails_the_job(run_program: RunProgram) -> None:
    workplace: Workplace = run_program.workplace  # type: ignore[attr-defined]
    job = run_program("", channels={"images": str(workplace.bucket / "nothing")})
    description = ended(job)
    assert "nothing below this prefix" in description["FailureReason"]
    assert [entry["Status"] for entry in description["SecondaryStatusTransitions"]][-1] == "Failed"


# --- In a container --------------------------------------------------------------------------------------------------


needs_docker = pytest.mark.skipif(
    not (os.environ.get("DOCKER_HOST") and os.environ.get("SUBSTITUTE_BASE_IMAGE")),
    reason="needs a Docker engine: set DOCKER_HOST and SUBSTITUTE_BASE_IMAGE (an image with Python and torch)",
)


@needs_docker
def test_the_image_runs_as_on_sagemaker(
    workplace: Workplace, image: str, pictures: Path, tiny_base: Path, tmp_path: Path
) -> None:
    local = {"InstanceType": "local-container", "InstanceCount": 1, "VolumeSizeInGB": 30}
    algorithm = {"TrainingImage": image, "TrainingInputMode": "File"}
    target = workplace.bucket / "container"
    job = workplace.train(
        pictures,
        tiny_base,
        NO_CLASS | {"manual_upload_model_path": str(target)},
        ResourceConfig=local,
        AlgorithmSpecification=algorithm,
        **checkpoints_at(workplace, "container-state"),
    ).wait(log=lambda line: None)
    assert job.model_uri == str(target)
    assert_trained(job.download(tmp_path / "model"), tiny_base)
    job = workplace.train(
        pictures,
        tiny_base,
        NO_CLASS | {"max_train_steps": "5000"},
        ResourceConfig=local,
        AlgorithmSpecification=algorithm,
        **checkpoints_at(workplace, "container-stopped"),
    )
    assert next(line for line in job.logs(follow=True) if line.startswith("step=2 "))
    job.stop()
    with pytest.raises(JobStopped):
        job.wait(log=lambda line: None)
    assert any(key.endswith("state.json") for key in workplace.keys("container-stopped"))


@needs_docker
def test_fit_runs_the_image(image: str, pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    names = ("instance_prompt", "class_prompt", "num_class_images", "resolution", "max_train_steps", "learning_rate")
    options = {name: SMALL[name] for name in names}
    job = launcher.fit(
        pictures,
        base_model=tiny_base,
        instance_type="local-container",
        image_uri=image,
        directory=tmp_path / "opt-ml",
        log=lambda line: None,
        **options,
    )
    assert job.model_uri == str(tmp_path / "opt-ml" / "model")
    assert_trained(Path(job.model_uri), tiny_base)


def test_a_container_needs_an_image_and_docker(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"instance_prompt": SMALL["instance_prompt"], "resolution": 64, "instance_type": "local-container"}
    with pytest.raises(UserError, match="image_uri is missing"):
        launcher.fit(pictures, **options)
    monkeypatch.setenv("DOCKER", "no-such-program")
    with pytest.raises(UserError, match="no-such-program"):
        launcher.fit(pictures, image_uri="image", **options)
