"""Processing jobs of the embedded SageMaker: programs of the image that read some files and leave others."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.sagemaker import FAILURE_LENGTH, STANDARD_BASE
from dreambooth_sm.storage import S3Uri, TransferError
from launcher.aws.clients import Clients
from launcher.local.answers import Operation, RequestError, arn_of, check_shape
from launcher.local.environment import inherited, loader_variables
from launcher.local.program import ENTRYPOINT
from launcher.local.synced import file_states
from launcher.local.tree import fetch_channel

_LOG_GROUP = "/aws/sagemaker/ProcessingJobs"
# The image's programs, where they lie in the image and here.
_INSIDE, _HERE = PurePosixPath("/opt/dreambooth-sm"), ENTRYPOINT.parents[1]
_ENDED = ("Completed", "Failed", "Stopped")


class ProcessingJob:
    """A processing job: its description, and the thread that runs it.

    Args:
        request: of CreateProcessingJob.
        arn: of the job.
        directory: where its ``/opt/ml`` tree is laid out.
        clients: of S3 and CloudWatch Logs.
        environment: of the job, besides what its request names.
    """

    def __init__(
        self, request: Mapping[str, Any], arn: str, directory: Path, clients: Clients, environment: Mapping[str, str]
    ) -> None:
        self.request, self.arn, self.name = request, arn, str(request["ProcessingJobName"])
        self._tree, self._clients, self._environment = directory, clients, dict(environment)
        self._status, self._reason, self._message = "InProgress", "", ""
        self._created, self._ended = time.time(), 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self.start, self.join = self._thread.start, self._thread.join

    def describe(self) -> dict[str, Any]:
        """The answer of DescribeProcessingJob."""
        described = {name: value for name, value in self.request.items() if name != "Tags"}
        described |= {"ProcessingJobArn": self.arn, "ProcessingJobStatus": self._status, "CreationTime": self._created}
        told = {"FailureReason": self._reason, "ExitMessage": self._message, "ProcessingEndTime": self._ended}
        return {**described, **{name: value for name, value in told.items() if value}}

    @property
    def ended(self) -> bool:
        return self._status in _ENDED

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        try:
            self._fetch()
            code = self._execute()
            message = self._tree / "output" / "message"
            if message.is_file():
                self._message = message.read_text(encoding="utf-8", errors="replace")[:FAILURE_LENGTH]
            if self._stop.is_set():
                self._end("Stopped")
            elif code:
                self._end("Failed", self._message or f"AlgorithmError: , exit code: {code}")
            else:
                self._upload()
                self._end("Completed")
        except (UserError, TransferError, OSError) as error:
            self._end("Failed", f"ClientError: {error}")
        except Exception as error:  # the platform's own fault: a job has to end in some state
            self._end("Failed", f"InternalServerError: {type(error).__name__}: {error}")

    def _end(self, status: str, reason: str = "") -> None:
        self._reason, self._ended, self._status = reason, time.time(), status

    def _fetch(self) -> None:
        for each in self.request.get("ProcessingInputs", ()):
            source = each["S3Input"]
            fetch_channel(source, self._below(source["LocalPath"]), self._clients("s3"))

    def _below(self, path: str) -> Path:
        return self._tree / PurePosixPath(path).relative_to(STANDARD_BASE)

    def _execute(self) -> int:
        own = {**self.request.get("Environment", {}), "SAGEMAKER_BASE_DIR": str(self._tree), "PYTHONPATH": str(_HERE)}
        process = subprocess.Popen(
            [sys.executable, "-u", str(program_of(self.request)), *_arguments(self.request)],
            env={**inherited(), **self._environment, **own},
            process_group=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        watcher = threading.Thread(target=self._end_when_asked, args=(process,), daemon=True)
        watcher.start()
        output, _ = process.communicate()
        self._log(output)
        return process.returncode

    def _end_when_asked(self, process: subprocess.Popen[str]) -> None:
        deadline = time.time() + self.request.get("StoppingCondition", {}).get("MaxRuntimeInSeconds", 86400)
        while process.poll() is None:
            if self._stop.wait(0.05) or time.time() > deadline:
                process.kill()
                return

    def _log(self, output: str) -> None:
        logs, stream, now = self._clients("logs"), f"{self.name}/algo-1", time.time_ns() // 1_000_000
        with suppress(logs.exceptions.ResourceAlreadyExistsException):
            logs.create_log_group(logGroupName=_LOG_GROUP)
        logs.create_log_stream(logGroupName=_LOG_GROUP, logStreamName=stream)
        if events := [{"timestamp": now, "message": line} for line in output.splitlines() if line]:
            logs.put_log_events(logGroupName=_LOG_GROUP, logStreamName=stream, logEvents=events)

    def _upload(self) -> None:
        for each in self.request.get("ProcessingOutputConfig", {}).get("Outputs", ()):
            folder, target = self._below(each["S3Output"]["LocalPath"]), S3Uri.parse(each["S3Output"]["S3Uri"])
            for name in sorted(file_states(folder)):
                self._clients("s3").upload_file(str(folder / name), target.bucket, (target / name).prefix)


def program_of(request: Mapping[str, Any]) -> Path:
    """The program of this machine that stands for the image's.

    Raises:
        RequestError: the image has no such program.
    """
    words: list[str] = request["AppSpecification"].get("ContainerEntrypoint", [])
    python, inside = (words[0], PurePosixPath(words[1])) if len(words) > 1 else ("", PurePosixPath())
    path = _HERE / inside.relative_to(_INSIDE) if inside.is_relative_to(_INSIDE / "container") else None
    if python != "python" or path is None or ".." in inside.parts or not path.is_file():
        raise RequestError("the embedded SageMaker processes with python and a program of the image's container/ only")
    return path


def _arguments(request: Mapping[str, Any]) -> list[str]:
    specification = request["AppSpecification"]
    return [*specification["ContainerEntrypoint"][2:], *specification.get("ContainerArguments", ())]


class EmbeddedProcessing:
    """Processing jobs, each of the region that its request is signed for.

    Args:
        directory: where they lay out their trees.
        clients: of a region.
        environment: of jobs in a region.
        tags: of everything, by ARN.
    """

    def __init__(
        self,
        directory: Path,
        clients: Callable[[str], Clients],
        environment: Callable[[str], Mapping[str, str]],
        tags: dict[str, dict[str, str]],
    ) -> None:
        self._directory, self._clients, self._environment, self._tags = directory, clients, environment, tags
        self._jobs: dict[str, ProcessingJob] = {}
        self.operations: dict[str, Operation] = {
            "CreateProcessingJob": lambda request, region: {"ProcessingJobArn": self.begin(request, region).arn},
            "DescribeProcessingJob": lambda request, region: self._find(request, region).describe(),
            "ListProcessingJobs": self._list,
            "StopProcessingJob": self._stop,
        }

    def begin(self, request: dict[str, Any], region: str) -> ProcessingJob:
        """Starts a job.

        Raises:
            RequestError: as SageMaker would answer, or for what only SageMaker can do.
        """
        check_shape("CreateProcessingJob", request)
        if problems := list(_beyond_a_laptop(request)):
            raise RequestError("; ".join(problems))
        program_of(request)
        name = request["ProcessingJobName"]
        arn = arn_of("processing-job", name, region)
        job = ProcessingJob(
            request, arn, self._directory / region / name, self._clients(region), self._environment(region)
        )
        if self._jobs.setdefault(arn, job) is not job:
            raise RequestError(f"a processing job with this name exists ({arn})", "ResourceInUse")
        self._tags[arn] = {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])}
        job.start()
        return job

    def close(self) -> None:
        """Stops what still runs, and waits for its end."""
        for job in list(self._jobs.values()):
            job.stop()
        for job in list(self._jobs.values()):
            job.join()

    def _find(self, request: dict[str, Any], region: str) -> ProcessingJob:
        try:
            return self._jobs[arn_of("processing-job", request["ProcessingJobName"], region)]
        except KeyError:
            raise RequestError("Could not find requested job.") from None

    def _list(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        names = ("ProcessingJobName", "ProcessingJobArn", "CreationTime", "ProcessingJobStatus")
        described = [job.describe() for arn, job in self._jobs.items() if arn.split(":")[3] == region]
        return {"ProcessingJobSummaries": [{name: each[name] for name in names} for each in described]}

    def _stop(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        self._find(request, region).stop()
        return {}


def _beyond_a_laptop(request: Mapping[str, Any]) -> Iterator[str]:
    if request["ProcessingResources"]["ClusterConfig"]["InstanceCount"] != 1:
        yield "ProcessingResources: the embedded SageMaker runs jobs of one host; set InstanceCount to 1"
    places = [("S3Input", each) for each in request.get("ProcessingInputs", ())]
    places += [("S3Output", each) for each in request.get("ProcessingOutputConfig", {}).get("Outputs", ())]
    for kind, each in places:
        path = PurePosixPath(each.get(kind, {}).get("LocalPath", ""))
        if not path.is_relative_to(STANDARD_BASE / "processing") or ".." in path.parts:
            yield f"{each.get('InputName', each.get('OutputName'))}: set {kind} with a LocalPath in /opt/ml/processing"
    if unsafe := sorted(loader_variables(request.get("Environment", {}))):
        yield f"Environment: {', '.join(unsafe)}: decides which code of this machine runs; leave it out"
