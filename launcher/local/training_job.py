"""One training job of the embedded SageMaker: what the platform does around a container, done on this machine.

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo.html
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.sagemaker import FAILURE_LENGTH, STANDARD_BASE
from dreambooth_sm.storage import S3Uri, TransferError
from dreambooth_sm.warm_pool import VARIABLE
from launcher.aws.clients import Clients
from launcher.jobs.logs import LOG_GROUP
from launcher.local.environment import inherited, isolated, loader_variables
from launcher.local.program import CONTAINER, docker
from launcher.local.synced import SyncedDirectory, file_states
from launcher.local.tree import lay_out
from launcher.local.warm_pools import MOUNTED, PoolUse

HOST = "algo-1"
# Seconds between SIGTERM and SIGKILL, as SageMaker has it.
GRACE = 120.0
# Seconds between two looks at what is synced.
_SYNC_PAUSE = 1.0
_MESSAGES = {
    "Starting": "Preparing the instances for training",
    "Downloading": "Downloading input data",
    "Training": "Training image download completed. Training in progress.",
    "Uploading": "Uploading generated training model",
    "Stopping": "Stopping the training job",
    "Interrupted": "The spot instance was taken back",
    "Restarting": "Waiting for another spot instance",
    "Completed": "Training job completed",
    "Failed": "Training job failed",
    "Stopped": "Training job stopped",
    "MaxRuntimeExceeded": "The training job reached its maximal run time",
}


class TrainingJob:
    """A training job: its description, and the thread that runs it.

    Args:
        request: of CreateTrainingJob.
        arn: of the job.
        directory: where the ``/opt/ml`` tree is laid out.
        clients: of S3 and CloudWatch Logs.
        environment: of the job, besides what its request names.
        entrypoint: program that runs as a process, where the image's would run in a container.
        grace: seconds between SIGTERM and SIGKILL.
        on_change: is told of each change of its state, with it.
        tuning_arn: of the tuning job that it is a trial of; empty where it is none.

    Attributes:
        metric_values: all that its log has said, by the names of MetricDefinitions.
    """

    def __init__(
        self,
        request: Mapping[str, Any],
        arn: str,
        directory: Path,
        *,
        clients: Clients,
        environment: Mapping[str, str],
        entrypoint: Path,
        grace: float,
        tuning_arn: str = "",
        on_change: Callable[[TrainingJob], object] = lambda job: None,
    ) -> None:
        self.request = request
        self.metric_values: dict[str, list[float]] = {}
        self._tuning_arn = tuning_arn
        self.name: str = request["TrainingJobName"]
        self.arn = arn
        self.region = arn.split(":")[3]
        self.tree = directory
        self.created = time.time()
        self._clients = clients
        self._environment = dict(environment)
        self._entrypoint = entrypoint
        self._grace = grace
        self._on_change = on_change
        self._lock = threading.RLock()
        self._status = "InProgress"
        self._transitions: list[dict[str, Any]] = []
        self._times: dict[str, float] = {}
        self._reason = ""
        self._artifacts = ""
        self._final_metrics: dict[str, dict[str, Any]] = {}
        self._synced: list[SyncedDirectory] = []
        self._warm_pool: PoolUse | None = None
        self._stop = threading.Event()
        self._interruption = threading.Event()
        self._note("Starting")
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)

    def start(self, warm_pool: PoolUse | None = None) -> None:
        """Runs the job, in a warm pool where there is one."""
        self._warm_pool = warm_pool
        self._on_change(self)
        self._thread.start()

    # What the API shows and takes

    @property
    def ended(self) -> bool:
        return self._status in ("Completed", "Failed", "Stopped")

    @property
    def status(self) -> str:
        return self._status

    @property
    def warm_pool_status(self) -> str | None:
        return self._warm_pool.describe()["Status"] if self._warm_pool else None

    def describe(self) -> dict[str, Any]:
        """The answer of DescribeTrainingJob, times in seconds since 1970."""
        with self._lock:
            description = {name: value for name, value in self.request.items() if name != "Tags"}
            description |= {
                "TrainingJobArn": self.arn,
                "TrainingJobStatus": self._status,
                "SecondaryStatus": self._transitions[-1]["Status"],
                "SecondaryStatusTransitions": [dict(transition) for transition in self._transitions],
                "CreationTime": self.created,
                "LastModifiedTime": self._transitions[-1]["StartTime"],
                "FinalMetricDataList": list(self._final_metrics.values()),
                **self._times,
            }
            if self._tuning_arn:
                description["TuningJobArn"] = self._tuning_arn
            if self._warm_pool:
                description["WarmPoolStatus"] = self._warm_pool.describe()
            if self._artifacts:
                description["ModelArtifacts"] = {"S3ModelArtifacts": self._artifacts}
            if self._reason:
                description["FailureReason"] = self._reason
            if "TrainingEndTime" in self._times:
                seconds = max(1, round(self._times["TrainingEndTime"] - self._times["TrainingStartTime"]))
                description |= {"TrainingTimeInSeconds": seconds, "BillableTimeInSeconds": seconds}
            return description

    def summary(self) -> dict[str, Any]:
        """One entry of ListTrainingJobs."""
        description = self.describe()
        names = ("TrainingJobName", "TrainingJobArn", "CreationTime", "LastModifiedTime", "TrainingJobStatus")
        optional = ("TrainingEndTime", "SecondaryStatus", "WarmPoolStatus")
        return {name: description[name] for name in (*names, *(n for n in optional if n in description))}

    def stop(self) -> None:
        """SIGTERM now and SIGKILL after the grace."""
        with self._lock:
            if self.ended:
                raise ValueError(f"the training job is in status {self._status}")
            self._status = "Stopping"
            self._enter("Stopping")
        self._stop.set()

    def interrupt(self) -> None:
        """Takes the spot instance away; the job starts again on a fresh one, with its checkpoints.

        Raises:
            ValueError: it is not a spot job, or does not run.
        """
        if not self.request.get("EnableManagedSpotTraining"):
            raise ValueError(f"{self.name} is not a spot job: EnableManagedSpotTraining is not set")
        if self.ended:
            raise ValueError(f"{self.name} has ended: {self._status}")
        self._interruption.set()

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    # What the platform does

    def _run(self) -> None:
        try:
            while self._attempt() == "Interrupted":
                self._interruption.clear()
                self._enter("Interrupted")
                self._enter("Restarting")
                self._clean()
        except Exception as error:  # the platform's own fault: a job has to end in some state
            self._end("Failed", reason=f"InternalServerError: {type(error).__name__}: {error}")

    def _attempt(self) -> str:
        """One start of the job, up to its end or to an interruption."""
        self._enter("Downloading")
        with self._lock:
            self._times.setdefault("TrainingStartTime", time.time())  # billed from here, as SageMaker says
        try:
            self._lay_out()
        except (UserError, TransferError, OSError) as error:
            self._end("Failed", reason=f"ClientError: Data download failed: {error}")
            return "Failed"
        if self._stop.is_set():
            self._end("Stopped")
            return "Stopped"
        self._enter("Training")
        code, cause = self._execute()
        self._sync()
        if cause == "Interrupted" and code != 0:
            return cause
        if cause not in ("Stopped", "MaxRuntimeExceeded") and code != 0:
            self._end("Failed", reason=self._failure(code))
            return "Failed"
        self._enter("Uploading")
        try:
            self._upload()
        except (UserError, TransferError, OSError, self._clients("s3").exceptions.ClientError) as error:
            self._end("Failed", reason=f"ClientError: Artifact upload failed: {error}")
            return "Failed"
        if cause == "MaxRuntimeExceeded":
            self._end("Stopped", "MaxRuntimeExceeded")
        else:
            self._end("Stopped" if cause == "Stopped" else "Completed")
        return "Ended"

    def _lay_out(self) -> None:
        channels = {
            channel["ChannelName"]: channel["DataSource"]["S3DataSource"]
            for channel in self.request.get("InputDataConfig", [])
        }
        lay_out(self.tree, self.request.get("HyperParameters", {}), channels, s3=self._clients("s3"))
        for path in (self._checkpoints, self.tree / "output" / "data"):
            path.mkdir(parents=True, exist_ok=True)
        self._synced = []
        if (uri := self._checkpoint_uri).startswith("s3://"):
            self._synced.append(SyncedDirectory(self._checkpoints, S3Uri.parse(uri), self._clients, deletes=True))
            self._synced[0].fetch()
        if self._events:
            self._synced.append(SyncedDirectory(*self._events, self._clients, deletes=False))

    def _execute(self) -> tuple[int, str]:
        """Runs the entrypoint to its end.

        Returns:
            its exit code, and why it was ended: ``""``, ``"Stopped"``, ``"MaxRuntimeExceeded"`` or ``"Interrupted"``.
        """
        deadline = self._times["TrainingStartTime"] + self.request["StoppingCondition"]["MaxRuntimeInSeconds"]
        stream = f"{HOST}-{time.time_ns() // 1_000_000}"
        self._container = f"{self.name}-{stream}"
        process = subprocess.Popen(
            self._command(),
            env=self._process_environment(),
            process_group=0,  # Ctrl-C in a terminal is for whoever follows the job, who then stops it
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        lines: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        log = _Log(self._clients("logs"), f"{self.name}/{stream}")
        done = threading.Event()
        syncer = threading.Thread(target=self._keep_synced, args=(done,), daemon=True)
        syncer.start()
        cause, kill_at = "", float("inf")
        while process.poll() is None or reader.is_alive():
            if not cause and process.poll() is None:
                cause = self._cause_to_end(deadline)
                if cause and self._signal(process, "TERM"):
                    kill_at = time.time() + self._grace
                else:
                    cause = ""
            if time.time() > kill_at:
                self._signal(process, "KILL")
                kill_at = float("inf")
            self._note_metrics(log.write(lines))
            reader.join(0.05)
        self._note_metrics(log.write(lines))
        done.set()
        syncer.join()
        return process.returncode, cause

    def _cause_to_end(self, deadline: float) -> str:
        if self._stop.is_set():
            return "Stopped"
        if self._interruption.is_set():
            return "Interrupted"
        return "MaxRuntimeExceeded" if time.time() > deadline else ""

    @property
    def _in_container(self) -> bool:
        return bool(self.request["ResourceConfig"].get("InstanceType") == CONTAINER)

    def _command(self) -> list[str]:
        if not self._in_container:
            return [sys.executable, "-u", str(self._entrypoint), "train"]
        isolated = self.request.get("EnableNetworkIsolation")
        command = [docker(), "run", "--rm", f"--name={self._container}", "--read-only", "--cap-drop=ALL"]
        command += [f"--network={'none' if isolated else 'host'}", f"--user={os.getuid()}:{os.getgid()}"]
        if shutil.which("nvidia-smi"):
            command.append("--gpus=all")
        environment = self._job_environment()
        for name in environment.keys() - (seen := set(loader_variables(environment))):
            command.append(f"--env={name}")  # the value comes from docker's own environment, not from its arguments
        command += [f"--env={name}={environment[name]}" for name in seen]  # docker would heed these itself
        command += [f"--volume={self.tree}:/opt/ml", f"--volume={self.tree / 'input'}:/opt/ml/input:ro"]
        if self._warm_pool:
            command.append(f"--volume={self._warm_pool.directory}:{MOUNTED}")
        return [*command, self.request["AlgorithmSpecification"]["TrainingImage"], "train"]

    def _job_environment(self) -> dict[str, str]:
        """Returns what the platform gives to a container."""
        environment = {**self._environment, **self.request.get("Environment", {})}
        if self.request.get("EnableNetworkIsolation"):
            environment = isolated(environment)
        if self._warm_pool:
            environment[VARIABLE] = MOUNTED if self._in_container else str(self._warm_pool.directory)
        return {**environment, "TRAINING_JOB_NAME": self.name, "TRAINING_JOB_ARN": self.arn}

    def _process_environment(self) -> dict[str, str]:
        """Returns that of the entrypoint; with a container, of the Docker client, which hands some of it on."""
        environment = self._job_environment()
        if self._in_container:
            unsafe = set(loader_variables(environment))
            return {**os.environ, **{k: v for k, v in environment.items() if k not in unsafe}}
        return {**inherited(), **environment, "SAGEMAKER_BASE_DIR": str(self.tree)}

    def _signal(self, process: subprocess.Popen[str], name: str) -> bool:
        """Returns whether the job got it: a container takes a moment to be there."""
        if self._in_container:
            command = [docker(), "kill", f"--signal={name}", self._container]
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        process.send_signal(signal.Signals[f"SIG{name}"])
        return True

    def _failure(self, code: int) -> str:
        path = self.tree / "output" / "failure"
        if path.is_file() and (reason := path.read_text(encoding="utf-8", errors="replace")[:FAILURE_LENGTH]):
            return reason
        if code in (137, -9):
            return "ClientError: Please use an instance type with more memory, exit code: 137"
        return f"AlgorithmError: , exit code: {code if code >= 0 else 128 - code}"

    # Checkpoints and events

    @property
    def _checkpoint_path(self) -> PurePosixPath:
        local = self.request.get("CheckpointConfig", {}).get("LocalPath")
        return PurePosixPath(local or STANDARD_BASE / "checkpoints")

    @property
    def _checkpoints(self) -> Path:
        return self.tree / self._checkpoint_path.relative_to(STANDARD_BASE)

    @property
    def _checkpoint_uri(self) -> str:
        return str(self.request.get("CheckpointConfig", {}).get("S3Uri", "")).rstrip("/")

    def _keep_synced(self, done: threading.Event) -> None:
        while not done.wait(_SYNC_PAUSE):
            self._sync()

    def _sync(self) -> None:
        for directory in self._synced:
            directory.sync()

    @property
    def _events(self) -> tuple[Path, S3Uri] | None:
        """Where the job writes TensorBoard's events, and where they go; None where nobody asked for them."""
        config = self.request.get("TensorBoardOutputConfig")
        if not config:
            return None
        local = PurePosixPath(config.get("LocalPath", STANDARD_BASE / "output" / "tensorboard"))
        target = S3Uri.parse(config["S3OutputPath"].rstrip("/")) / self.name / "tensorboard-output"
        return self.tree / local.relative_to(STANDARD_BASE), target

    # Results

    def _upload(self) -> None:
        """Model and output data to S3; with a ``file://`` location the model stays in the tree."""
        config = self.request["OutputDataConfig"]
        location = config["S3OutputPath"].rstrip("/")
        packed = config.get("CompressionType", "GZIP") == "GZIP"
        if not location.startswith("s3://"):
            self._artifacts = f"file://{self.tree / 'model'}"
            return
        target = S3Uri.parse(location) / self.name / "output"
        for name, folder, always in (("model", self.tree / "model", True), ("output", self._data, False)):
            if always or any(folder.iterdir()):
                self._upload_folder(folder, target, f"{name}.tar.gz" if packed else name)
        self._artifacts = f"{target}/{'model.tar.gz' if packed else 'model/'}"

    @property
    def _data(self) -> Path:
        return self.tree / "output" / "data"

    def _upload_folder(self, folder: Path, target: S3Uri, name: str) -> None:
        s3 = self._clients("s3")
        if name.endswith(".tar.gz"):
            with tempfile.TemporaryDirectory() as scratch:
                archive = Path(scratch) / name
                with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
                    for path in sorted(folder.iterdir()):
                        tar.add(path, path.name)
                s3.upload_file(str(archive), target.bucket, (target / name).prefix)
            return
        for relative in sorted(file_states(folder)):
            s3.upload_file(str(folder / relative), target.bucket, (target / name / relative).prefix)

    def _clean(self) -> None:
        """A fresh instance has nothing of the one before."""
        for name in ("model", "output"):
            shutil.rmtree(self.tree / name, ignore_errors=True)
        if not self._checkpoint_uri.startswith("file://"):
            shutil.rmtree(self._checkpoints, ignore_errors=True)

    # State

    def _enter(self, secondary: str) -> None:
        self._note(secondary)
        self._on_change(self)

    def _note(self, secondary: str) -> None:
        now = time.time()
        with self._lock:
            if self._transitions and "EndTime" not in self._transitions[-1]:
                self._transitions[-1]["EndTime"] = now
            message = _MESSAGES[secondary]
            self._transitions.append({"Status": secondary, "StartTime": now, "StatusMessage": message})

    def _end(self, status: str, secondary: str = "", *, reason: str = "") -> None:
        self._note(secondary or status)
        with self._lock:
            now = time.time()
            self._transitions[-1]["EndTime"] = now
            self._times.setdefault("TrainingStartTime", now)
            self._times["TrainingEndTime"] = now
            if self._warm_pool:
                self._warm_pool.end(is_healthy="InternalServerError" not in reason)
            self._reason, self._status = reason, status
        self._on_change(self)

    def _note_metrics(self, lines: list[tuple[int, str]]) -> None:
        definitions = self.request["AlgorithmSpecification"].get("MetricDefinitions", [])
        for definition in definitions:
            for timestamp, line in lines:
                if found := re.search(definition["Regex"], line):
                    with suppress(ValueError), self._lock:
                        self.metric_values.setdefault(definition["Name"], []).append(float(found.group(1)))
                        self._final_metrics[definition["Name"]] = {
                            "MetricName": definition["Name"],
                            "Value": float(found.group(1)),
                            "Timestamp": timestamp / 1000,
                        }


class _Log:
    """A stream of CloudWatch Logs."""

    def __init__(self, client: Any, stream: str) -> None:
        self._client, self._stream = client, stream
        with suppress(client.exceptions.ResourceAlreadyExistsException):
            client.create_log_group(logGroupName=LOG_GROUP)
        client.create_log_stream(logGroupName=LOG_GROUP, logStreamName=stream)

    def write(self, lines: queue.SimpleQueue[tuple[int, str]]) -> list[tuple[int, str]]:
        """Sends what is in the queue; returns it."""
        taken = list(_drain(lines))
        # CloudWatch takes no empty event.
        events = [{"timestamp": timestamp, "message": text} for timestamp, text in taken if text]
        if events:
            self._client.put_log_events(logGroupName=LOG_GROUP, logStreamName=self._stream, logEvents=events)
        return taken


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[tuple[int, str]]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put((time.time_ns() // 1_000_000, line.rstrip("\n")))


def _drain(lines: queue.SimpleQueue[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    with suppress(queue.Empty):
        while True:
            yield lines.get_nowait()
