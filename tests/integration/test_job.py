"""``launcher.Job`` and its friends on jobs that really run."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from PIL import Image

import launcher
from dreambooth_sm.errors import UserError
from launcher.aws.clients import Clients
from launcher.jobs.job import Job
from tests.helpers.services import Workplace, eventually

# Writes what a job of ours writes, in no time.
PROGRAM = """
import os, pathlib, signal, sys, time
base = pathlib.Path(os.environ["SAGEMAKER_BASE_DIR"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("phase=train state=started")
for step in (1, 10, 20):
    print(f"step={step} loss={1 / step:.4g} lr=2e-06 steps_per_s=4", flush=True)
(base / "model" / "samples").mkdir(parents=True)
(base / "model" / "unet.bin").write_bytes(b"weights")
(base / "model" / "report.html").write_text("<p>good")
if os.environ.get("PICTURE"):
    (base / "model" / "samples" / "step-20.png").write_bytes(bytes.fromhex(os.environ["PICTURE"]))
while os.environ.get("LONG"): time.sleep(0.05)
print("phase=train state=ended seconds=1.5")
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    from launcher.local.services import embedded_services

    program = tmp_path_factory.mktemp("program") / "train.py"
    program.write_text(PROGRAM)
    with embedded_services(entrypoint=program) as services:
        yield Workplace(services)


class FarAway(Clients):
    """Clients of a job that lives on when this process ends."""

    def __init__(self, workplace: Workplace) -> None:
        super().__init__()
        self._make = workplace.clients._make  # type: ignore[method-assign]

    def is_local(self, service: str) -> bool:
        return False


def test_figures_model_report_and_pictures_of_an_ended_job(workplace: Workplace, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "teal").save(tmp_path / "picture.png")
    picture = (tmp_path / "picture.png").read_bytes().hex()
    said: list[str] = []
    started = workplace.start(Environment={"PICTURE": picture})
    job = launcher.attach(started.name, workplace.clients)
    assert job.wait(said.append) is job
    assert said == job.lines() == list(job.logs())
    assert [entry["step"] for entry in job.history()] == [1, 10, 20]
    table = job.metrics()
    assert list(table.index) == [1, 10, 20]
    assert table.loc[10, "loss"] == 0.1
    assert job.seconds == {"train": 1.5}
    assert job.report() == "<p>good"
    assert 'srcdoc="&lt;p&gt;good"' in job.report()._repr_html_()
    assert [sample.getpixel((0, 0)) for sample in job.samples()] == [(0, 128, 128)]
    shown = job.samples()._repr_png_()
    assert shown is not None
    assert Image.open(io.BytesIO(shown)).getpixel((80, 80)) == (0, 128, 128)
    assert (job.download(tmp_path / "model") / "unet.bin").read_bytes() == b"weights"
    assert job.status == "Completed"


def test_the_command_line_fetches_the_model(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launcher.cli import main

    for name, value in workplace.services.environment().items():
        monkeypatch.setenv(name, value)
    job = workplace.start().wait(lambda line: None)
    assert main(["download", job.name, str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'model'}\n"
    assert (tmp_path / "model" / "unet.bin").read_bytes() == b"weights"
    assert main(["download", "nobody", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


def test_without_pandas_metrics_are_the_history(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    job = workplace.start().wait(lambda line: None)
    assert job.metrics() == job.history()


def test_pictures_in_an_archive_are_pointed_to(workplace: Workplace) -> None:
    output = {"S3OutputPath": str(workplace.bucket / "packed")}
    job = workplace.start(OutputDataConfig=output).wait(lambda line: None)
    with pytest.raises(UserError, match=r"model\.tar\.gz is an archive: download\(\)"):
        job.samples()


def test_ctrl_c_leaves_a_job_on_aws_running(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    started = workplace.start(Environment={"LONG": "1"})
    job = Job(started.name, FarAway(workplace))

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.wait(interrupt)
    assert f"launcher.attach('{job.name}')" in capsys.readouterr().out
    assert started.status == "InProgress"
    started.stop()


def test_an_interrupted_look_at_a_local_job_stops_it(workplace: Workplace) -> None:
    job = workplace.start(Environment={"LONG": "1"})

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.wait(interrupt)
    assert job.status == "Stopped"


def test_throttled_requests_are_sent_again(workplace: Workplace) -> None:
    from botocore.awsrequest import AWSResponse

    job = workplace.start()
    clients = FarAway(workplace)
    # The client of an AWS account, with its retries.
    clients._make = lambda service: _aws_client(workplace, service)  # type: ignore[method-assign]
    sent: list[str] = []

    def throttle(request: Any, **_: Any) -> Any:
        sent.append(request.url)
        if len(sent) % 3 != 1:
            return None
        body = b'{"__type": "ThrottlingException", "message": "Rate exceeded"}'
        headers = {"Content-Type": "application/x-amz-json-1.1"}
        response = AWSResponse(request.url, 400, headers, None)
        response._content = body
        return response

    followed = Job(job.name, clients)
    for service in ("sagemaker", "logs"):
        clients(service).meta.events.register("before-send", throttle)
    eventually(lambda: followed.describe()["TrainingJobStatus"] == "Completed")
    assert [line for line in followed.lines() if line.startswith("step=")] == [
        "step=1 loss=1 lr=2e-06 steps_per_s=4",
        "step=10 loss=0.1 lr=2e-06 steps_per_s=4",
        "step=20 loss=0.05 lr=2e-06 steps_per_s=4",
    ]


def _aws_client(workplace: Workplace, service: str) -> Any:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in workplace.services.environment().items():
            environment.setenv(name, value)
        return Clients()._make(service)


def test_jobs_are_listed_the_newest_first(workplace: Workplace) -> None:
    names = [workplace.start(TrainingJobName=f"listed-{number}").name for number in range(3)]
    listed = launcher.list_jobs(name_contains="listed", limit=2, clients=workplace.clients)
    assert [job.name for job in listed] == names[:0:-1]


def test_inside_local_services_everything_is_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    mine = boto3.session.Session("key", "secret", region_name="us-west-2")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", mine)  # as in a notebook that has asked AWS before
    with launcher.local_services() as services:
        assert boto3.client("iam").get_role(RoleName="dreambooth-sm")["Role"]["Arn"] == services.role
        assert boto3.client("service-quotas").list_service_quotas(ServiceCode="sagemaker")["Quotas"] == []
        with pytest.raises(ClientError, match="not in the embedded services"):
            boto3.client("service-quotas").list_services()
        assert boto3.client("sts").get_caller_identity()["Account"] == "123456789012"
        assert launcher.list_jobs() == []
    assert boto3.DEFAULT_SESSION is mine
    assert not [name for name in os.environ if name.startswith("AWS_")]
