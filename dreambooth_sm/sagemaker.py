"""SageMaker's training contract, and nothing else: paths, channels, hosts, the failure file, the stop signal.

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo.html
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.printing import safe

STANDARD_BASE = PurePosixPath("/opt/ml")
# DescribeTrainingJob shows no more than this of the failure file.
FAILURE_LENGTH = 1024
# SageMaker adds it to the hyperparameters of the training jobs that a tuning job starts.
OBJECTIVE_KEY = "_tuning_objective_metric"
# Instance families with an NVIDIA GPU.
_GPU_FAMILIES = ("ml.g", "ml.p")


@dataclass(frozen=True)
class Contract:
    """The platform's contract with a training container.

    Attributes:
        base: directory that SageMaker mounts; ``/opt/ml`` but for ``$SAGEMAKER_BASE_DIR``.
        hyperparameters: names to strings, as the platform wrote them.
        channels: input channels by name.
        current_host, hosts: this host and all hosts of the job, sorted.
        instance_type: such as ``ml.g4dn.xlarge``; empty where the platform does not say.
        job_name: name of the training job; ``local`` outside of SageMaker.
        network_interface: the one between the hosts, such as ``eth0``.
        subject: of a fleet, whose checkpoints lie by themselves; empty where the job is not one subject's of several.
    """

    base: Path
    hyperparameters: Mapping[str, str] = field(default_factory=dict)
    channels: Mapping[str, Path] = field(default_factory=dict)
    current_host: str = "algo-1"
    hosts: tuple[str, ...] = ("algo-1",)
    instance_type: str = ""
    job_name: str = "local"
    network_interface: str = ""
    subject: str = ""

    @property
    def checkpoint_directory(self) -> Path:
        return self.base / "checkpoints" / (self.job_name if self.is_trial else "") / self.subject

    @property
    def is_trial(self) -> bool:
        """Whether the job is a trial of a tuning job, whose checkpoints all go to one place."""
        return OBJECTIVE_KEY in self.hyperparameters

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether the platform does: it syncs the directory with S3."""
        return (self.base / "checkpoints").is_dir()

    @property
    def has_gpu_instance(self) -> bool:
        """Whether the instance type promises a GPU."""
        return self.instance_type.startswith(_GPU_FAMILIES)

    def localize(self, path: str) -> str:
        """A path under ``/opt/ml`` as a path under :attr:`base`; any other path as it is."""
        if PurePosixPath(path).is_relative_to(STANDARD_BASE):
            return str(self.base / PurePosixPath(path).relative_to(STANDARD_BASE))
        return path


def localize(h: Hyperparameters, contract: Contract) -> Hyperparameters:
    """Paths under ``/opt/ml`` as paths under the contract's base directory."""

    paths = h.names_where(lambda knob: knob.path)

    def move(values: dict[str, object]) -> dict[str, object]:
        return {k: contract.localize(v) for k, v in values.items() if k in paths and isinstance(v, str)}

    moved = move(h.model_dump(include=set(paths)))
    if h.inline_concepts:
        moved["concepts_list"] = tuple(c.model_copy(update=move(c.model_dump())) for c in h.inline_concepts)
    return h.moved(moved)


def base_directory() -> Path:
    return Path(os.environ.get("SAGEMAKER_BASE_DIR") or STANDARD_BASE)


def read_contract(base: Path, *, need_hyperparameters: bool = True) -> Contract:
    """Reads ``input/config/*.json`` below ``base``.

    Args:
        need_hyperparameters: whether a missing ``hyperparameters.json`` is an error.

    Raises:
        UserError: for files that are missing (hyperparameters only) or are not what the platform writes.
    """
    config = base / "input" / "config"
    problems: list[str] = []

    def read(name: str, required: bool = False) -> dict[str, Any]:
        path = config / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if required:
                problems.append(f"{path} is missing; mount it as SageMaker does, or pass --name value options")
            return {}
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{path} can't be read as JSON: {error}")
            return {}
        if not isinstance(content, dict):
            problems.append(f"{path} does not hold a JSON object")
            return {}
        return content

    hyperparameters = read("hyperparameters.json", required=need_hyperparameters)
    resources = read("resourceconfig.json")
    channels = read("inputdataconfig.json")
    hosts = resources.get("hosts") or ["algo-1"]
    if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
        problems.append(f"{config / 'resourceconfig.json'}: hosts is not a list of names: {hosts!r}")
        hosts = []
    current = resources.get("current_host") or (hosts or ["algo-1"])[0]
    if hosts and current not in hosts:
        problems.append(f"{config / 'resourceconfig.json'}: current_host {current!r} is not one of hosts: {hosts!r}")
    if problems:
        raise UserError(problems)
    return Contract(
        base=base,
        hyperparameters=hyperparameters,
        channels={name: base / "input" / "data" / name for name in channels},
        current_host=current,
        hosts=tuple(hosts),
        instance_type=str(resources.get("current_instance_type") or ""),
        job_name=os.environ.get("TRAINING_JOB_NAME") or "local",
        network_interface=str(resources.get("network_interface_name") or ""),
    )


def write_failure(base: Path, reason: str, name: str = "failure") -> None:
    """Writes the reason that SageMaker shows as FailureReason, at most 1024 characters.

    Args:
        name: of the file; ``message`` is what processing jobs show as ExitMessage.
    """
    path = base / "output" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    reason = "\n".join(safe(line) for line in reason.split("\n"))
    if len(reason) > FAILURE_LENGTH:
        reason = reason[: FAILURE_LENGTH - 2] + " …"
    path.write_text(reason, encoding="utf-8")


def stop_event() -> threading.Event:
    """An event that asks the job to stop.

    SageMaker sends SIGTERM, and 120 s later SIGKILL. A terminal that is closed (SIGHUP) and Ctrl-C do the same as
    SIGTERM; the second Ctrl-C ends the job where it is. Under ``nohup`` the job outlives its terminal.
    """
    event = threading.Event()

    def interrupt(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, lambda *_: event.set())
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: event.set())
    signal.signal(signal.SIGINT, interrupt)
    return event
