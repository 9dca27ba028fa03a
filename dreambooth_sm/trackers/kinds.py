"""The trackers, each by accelerate's own class for it, and what accelerate has no call for by the tracker's library."""

from __future__ import annotations

import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dreambooth_sm.errors import EXIT_OK, EXIT_STOPPED
from dreambooth_sm.knobs.tracking import MLFLOW, TENSORBOARD, WANDB
from dreambooth_sm.report import ValidationPicture

# Files of the report that trackers of files keep.
_REPORT, _CARD = ("report.html", "report.json"), "README.md"
# MLflow would try for a quarter of an hour, and the job's end waits for it; and it would print where the run is.
_USUALLY = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",  # the image has no git
}
# Of W&B's settings: nothing but what the job tells, and how busy its machine is. Not its log, code or packages, and no
# names of SageMaker's in place of the run's. And it gives up in time, as the job's end waits for it.
_ALONE = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "init_timeout": 30.0,
    "sagemaker_disable": True,
    "silent": True,
    "x_disable_meta": True,
    "x_file_stream_retry_max": 3,
    "x_file_transfer_retry_max": 3,
    "x_graphql_retry_max": 3,
    "x_save_requirements": False,
}
_PICTURE = re.compile(r"!\[[^]]*\]\([^)]*\)")


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker shows of one job.

    Attributes:
        name: for people.
        project: that it belongs to, where the tracker has projects.
        uri: of MLflow's server.
        events: directory that TensorBoard reads.
        files: directory for what a tracker keeps by itself.
        id: of the run that a resumed job continues; None for one that begins.
        step: that the job has taken before.
    """

    name: str
    project: str
    uri: str | None
    events: Path
    files: Path
    id: str | None
    step: int


class Tracker(ABC):
    """One tracker of one job. It is made where others import as well; all calls then come from one thread, and may take
    their time or raise anything."""

    name: ClassVar[str]

    @abstractmethod
    def start(self, run: TrackedRun, settings: Mapping[str, bool | float | str]) -> str:
        """Begins or continues a run; its id.

        Args:
            settings: of the job, for a run that begins.
        """

    @abstractmethod
    def measure(self, values: Mapping[str, float], step: int) -> None:
        """Takes values of a step, by name."""

    @abstractmethod
    def show(self, pictures: Sequence[ValidationPicture]) -> None:
        """Takes pictures of one step."""

    @abstractmethod
    def report(self, facts: Mapping[str, Any], directory: Path) -> None:
        """Takes the report."""

    @abstractmethod
    def finish(self, code: int) -> None:
        """Ends the run.

        Args:
            code: that the job exits with; a job that was stopped may continue the run.
        """


class TensorBoard(Tracker):
    """Writes events into a directory of the run's name."""

    name = TENSORBOARD

    def __init__(self) -> None:
        from torch.utils.tensorboard.summary import hparams

        self._make, self._summaries = _of_accelerate("TensorBoardTracker"), hparams

    def start(self, run: TrackedRun, settings: Mapping[str, bool | float | str]) -> str:
        name = run.id or run.name
        # What an interrupted job told after its last checkpoint, or before its first one, is told again.
        self._tracker = self._make(name, str(run.events), purge_step=run.step + 1 if run.id else 0)
        self._tracker.start()
        if not run.id:
            # accelerate would put them into a run of their own.
            for summary in self._summaries(dict(settings), {}):
                self._tracker.writer.file_writer.add_summary(summary)
        self._tracker.writer.flush()
        return name

    def measure(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def show(self, pictures: Sequence[ValidationPicture]) -> None:
        import numpy as np

        for prompt, paths in _by_prompt(pictures).items():
            batch = np.stack([np.asarray(_opened(path)) for path in paths])
            self._tracker.log_images({f"samples/{prompt}": batch}, step=pictures[0].step, dataformats="NHWC")
        self._tracker.writer.flush()

    def report(self, facts: Mapping[str, Any], directory: Path) -> None:
        card = (directory / _CARD).read_text(encoding="utf-8").split("---\n", 2)[-1]  # without what is for the hub
        self._tracker.log({"report": _PICTURE.sub("", card)}, step=facts["attempts"][-1]["last_step"])

    def finish(self, code: int) -> None:
        self._tracker.finish()


class MLflow(Tracker):
    """A run in an experiment of MLflow's server."""

    name = MLFLOW

    def __init__(self) -> None:
        for name, value in _USUALLY.items():
            os.environ.setdefault(name, value)
        import mlflow

        # The plugin for SageMaker's servers complains at each request to any other.
        logging.getLogger("mlflow.tracking.request_header.registry").setLevel(logging.ERROR)
        self._make, self._library = _of_accelerate("MLflowTracker"), mlflow

    def start(self, run: TrackedRun, settings: Mapping[str, bool | float | str]) -> str:
        self._library.set_tracking_uri(run.uri)
        name = None if run.id else run.name
        self._tracker = self._make(experiment_name=run.project, run_id=run.id, run_name=name)
        self._tracker.start()
        if not run.id:
            self._tracker.store_init_configuration(dict(settings))
        return str(self._tracker.tracker.info.run_id)

    def measure(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def show(self, pictures: Sequence[ValidationPicture]) -> None:
        for picture in pictures:
            self._tracker.log_artifact(str(picture.path), "samples")

    def report(self, facts: Mapping[str, Any], directory: Path) -> None:
        for file in _REPORT:
            self._tracker.log_artifact(str(directory / file), "report")
        self._library.set_tags({f"verdict_{n}": text for n, text in enumerate(facts["verdicts"], start=1)})

    def finish(self, code: int) -> None:
        self._library.end_run({EXIT_OK: "FINISHED", EXIT_STOPPED: "KILLED"}.get(code, "FAILED"))


class WeightsAndBiases(Tracker):
    """A run in a project of Weights & Biases."""

    name = WANDB

    def __init__(self) -> None:
        import wandb

        self._make, self._library = _of_accelerate("WandBTracker"), wandb

    def start(self, run: TrackedRun, settings: Mapping[str, bool | float | str]) -> str:
        run.files.mkdir(parents=True, exist_ok=True)
        self._tracker = self._make(
            run.project,
            name=run.name,
            id=run.id,
            resume="allow" if run.id else None,
            dir=str(run.files),
            settings=self._library.Settings(**_ALONE),
        )
        self._tracker.start()
        # A resumed job tells some steps again, and W&B's own steps only rise.
        self._tracker.tracker.define_metric("*", step_metric="step")
        if not run.id:
            self._tracker.store_init_configuration(dict(settings))
        return str(self._tracker.tracker.id)

    def measure(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log({**values, "step": step})

    def show(self, pictures: Sequence[ValidationPicture]) -> None:
        shown = {
            f"samples/{prompt}": [self._library.Image(_opened(path), caption=prompt) for path in paths]
            for prompt, paths in _by_prompt(pictures).items()
        }
        self._tracker.log({**shown, "step": pictures[0].step})

    def report(self, facts: Mapping[str, Any], directory: Path) -> None:
        page = self._library.Html((directory / _REPORT[0]).read_text(encoding="utf-8"), inject=False)
        self._tracker.log({"report": page, "step": facts["attempts"][-1]["last_step"]})
        self._tracker.tracker.summary["verdicts"] = list(facts["verdicts"])

    def finish(self, code: int) -> None:
        self._tracker.tracker.finish(exit_code=code)


TRACKERS: dict[str, type[Tracker]] = {kind.name: kind for kind in (TensorBoard, MLflow, WeightsAndBiases)}


def _of_accelerate(name: str) -> Callable[..., Any]:
    """Makes trackers of one of accelerate's classes, which don't ask whether this is accelerate's main process."""
    from accelerate import PartialState, tracking

    PartialState()  # without which they can't log

    def make(*arguments: Any, **options: Any) -> Any:
        tracker = getattr(tracking, name)(*arguments, **options)
        tracker.main_process_only = False
        return tracker

    return make


def _by_prompt(pictures: Sequence[ValidationPicture]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for picture in pictures:
        found.setdefault(picture.prompt, []).append(picture.path)
    return found


def _opened(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.convert("RGB")
