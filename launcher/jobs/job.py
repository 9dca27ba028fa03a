"""A training job after its start, on AWS or on the embedded services: its state, log, figures, pictures and model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.printing import redact
from launcher.aws.advice import advice_for
from launcher.aws.clients import Clients
from launcher.aws.service_errors import Kind, ServiceError, asking, stopping
from launcher.endpoints.api import deploy
from launcher.endpoints.endpoint import Endpoint
from launcher.instances import INSTANCES
from launcher.jobs.logs import LogReader
from launcher.jobs.outputs import ENDED, Outputs
from launcher.jobs.progress import Progress
from launcher.jobs.views import Display, Page, Pictures, Standing, choose_view
from launcher.registry.api import register
from launcher.registry.packages import ModelPackage
from launcher.registry.requests import PENDING

# Seconds between two looks at a job: of AWS, and of this machine.
_POLL, _POLL_LOCAL = 2.0, 0.25
# CloudWatch shows a line some seconds after it was written: how long an ended job's log has to stay silent.
_SETTLE = 8.0
# How long SageMaker, and a service of this machine, may give no answer before a job is not followed any further.
_PATIENCE, _PATIENCE_LOCAL = 900.0, 10.0
_LAST_LINES = 12


class JobFailed(RuntimeError):  # noqa: N818 - what the caller wants to catch reads like this
    """A job that ended without a model; the message is the reason, the last lines of its log, and what to do.

    Attributes:
        name: of the job.
        reason: as the job or SageMaker gave it.
        lines: the last lines of the log.
        advice: what to do about it; None where nothing is known.
    """

    def __init__(self, name: str, reason: str, lines: list[str] | None = None, advice: str | None = None) -> None:
        self.name, self.reason, self.lines, self.advice = name, reason, lines or [], advice
        parts = [f"{name}: {reason}"]
        if self.lines:
            parts.append("the last lines of its log:\n" + "\n".join(f"  {line}" for line in self.lines))
        if advice:
            parts.append(f"what to do: {advice}")
        super().__init__("\n".join(parts))


class JobStopped(JobFailed):
    """A job that was stopped, by a person or by its time limit."""


class Job:
    """A training job that was started, by whatever SDK.

    Args:
        name: of the training job.
        clients: of SageMaker, CloudWatch Logs and S3; default: those of the standard AWS settings.
        price: of an instance, in dollars an hour, for :attr:`cost`; default: of the launcher's table.
        directory: a local job's ``/opt/ml`` tree.

    Examples:
        >>> job = Job("toy-20261122")
        >>> job.wait().download("my-model")  # doctest: +SKIP
        PosixPath('my-model')
    """

    def __init__(
        self,
        name: str,
        clients: Clients | None = None,
        *,
        price: float | None = None,
        directory: Path | None = None,
    ) -> None:
        self.name = name
        self.price = price
        self.directory = directory
        self._clients = clients or Clients()
        self._reader: LogReader | None = None
        self._lines: list[str] = []
        self._progress: Progress | None = None
        self._ended: dict[str, Any] | None = None
        self._log_is_whole = False
        # Whether it is of no use to ask for it.
        self._log_is_off = False

    def __repr__(self) -> str:
        return f"Job({self.name!r})"

    # State

    def describe(self) -> dict[str, Any]:
        """SageMaker's own description of the job; that of an ended job is asked for once.

        Raises:
            UserError: there is no such job in this account and region.
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        if self._ended:
            return self._ended
        sagemaker = self._clients("sagemaker")
        try:
            with asking(f"{self.name} can't be looked at"):
                description: dict[str, Any] = sagemaker.describe_training_job(TrainingJobName=self.name)
        except ServiceError as error:
            if error.kind is Kind.MISSING:
                raise UserError(f"there is no training job {self.name!r} in {sagemaker.meta.region_name}") from None
            raise
        if description["TrainingJobStatus"] in ENDED:
            self._ended = description
        return description

    @property
    def status(self) -> str:
        """``InProgress``, ``Stopping``, ``Completed``, ``Failed`` or ``Stopped``, now."""
        return str(self.describe()["TrainingJobStatus"])

    @property
    def cost(self) -> float | None:
        """Dollars so far, of the instances alone, on demand; None on this machine, and where the price is not known."""
        return self._cost(self.describe())

    # Log

    def lines(self) -> list[str]:
        """All lines of the log so far.

        Raises:
            ServiceError: the log can't be read.
        """
        self._read_log()
        return list(self._lines)

    def logs(self, *, follow: bool = False) -> Iterator[str]:
        """The lines of the log; with ``follow``, also those that come until the job has ended.

        Raises:
            ServiceError: the log can't be read.
        """
        shown = 0
        for _ in self._polls(self._read_log) if follow else [self._read_log()]:
            yield from self._lines[shown:]
            shown = len(self._lines)

    def history(self) -> list[dict[str, float]]:
        """One entry for each metrics line of training, names to numbers: step, loss, lr, steps_per_s ..."""
        return list(self._follow_progress().history)

    def metrics(self) -> Any:
        """The same as a pandas DataFrame with the step as its index; :meth:`history` where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            return self.history()
        history = self.history()
        return pandas.DataFrame(history).set_index("step") if history else pandas.DataFrame()

    @property
    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds of each phase that has ended, in order."""
        return dict(self._follow_progress().seconds)

    # Following

    def wait(self, log: Callable[[str], None] | None = None) -> Job:
        """Follows the job until it has ended.

        Ctrl-C leaves a job on AWS running and says how to follow it again; a job of this machine is stopped by it,
        with a checkpoint. Nothing else that goes wrong here stops a job: without rights to the log its status alone
        is followed, a network that is away is waited for, and where the display or ``log`` fails, following continues
        without it, with a warning.

        Args:
            log: gets each line of the log. Default: lines with a progress display, as terminal and notebook can.

        Returns:
            this job.

        Raises:
            JobFailed: with the job's own reason, the last lines of its log and what to do.
            JobStopped: somebody stopped it, or its time was up.
            ServiceError: the job can't be followed any further, and keeps running: credentials have expired, say.
        """
        shown = 0
        display = Display(choose_view(self.name, log))

        def read_log() -> list[str]:
            try:
                return self._read_log()
            except ServiceError as error:
                # What SageMaker answers decides about credentials and the network.
                if error.kind is not Kind.CREDENTIALS and not error.kind.passes:
                    self._log_is_off = True
                    display.say(f"the log can't be read, so this follows the status alone: {error}")
                return []

        try:
            with display:
                for description in self._polls(read_log, display.say):
                    for line in self._lines[shown:]:
                        display.say(line)
                    shown = len(self._lines)
                    display.show(partial(self._standing, description))
        except KeyboardInterrupt:
            self._interrupted()
            raise
        return self._end(description)

    def stop(self) -> None:
        """Asks SageMaker to stop the job, which saves a checkpoint first; :meth:`wait` waits until it has ended.

        Raises:
            UserError: there is no such job.
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        with stopping(self.name, lambda: self.status in ENDED):
            self._clients("sagemaker").stop_training_job(TrainingJobName=self.name)

    def _polls(
        self, read_log: Callable[[], object], notice: Callable[[str], None] = lambda line: None
    ) -> Iterator[dict[str, Any]]:
        """The job's description, each time after the log was read, until the job has ended.

        Raises:
            ServiceError: the job can't be followed any further.
        """
        pause = _POLL_LOCAL if self.is_local else _POLL
        while (description := self._describe_patiently(notice))["TrainingJobStatus"] not in ENDED:
            read_log()
            yield description
            time.sleep(pause)
        silent_since = time.monotonic()
        while True:
            if read_log():
                silent_since = time.monotonic()
            yield description
            silent = self._log_is_off or time.monotonic() - silent_since >= _SETTLE
            if self.is_local or silent or _ended_long_ago(description):
                self._log_is_whole = True
                return
            time.sleep(pause)

    def _describe_patiently(self, notice: Callable[[str], None]) -> dict[str, Any]:
        """The job's description; AWS that does not answer is asked again for a while."""
        patience = _PATIENCE_LOCAL if self.is_local else _PATIENCE
        since = time.monotonic()
        told = False
        while True:
            try:
                return self.describe()
            except ServiceError as error:
                if not error.kind.passes or time.monotonic() - since >= patience:
                    raise ServiceError(
                        f"the job {self.name} keeps running{'' if self.is_local else ' on SageMaker'}, and can't be "
                        f"followed from here ({error.reason}): {error.advice or 'put that right'}, then "
                        f'launcher.attach("{self.name}").wait() follows it again',
                        error.kind,
                        error.reason,
                        error.advice,
                    ) from error
                if not told:
                    notice(f"no answer from SageMaker, trying again: {error.reason}")
                told = True
                time.sleep(_POLL)

    def _interrupted(self) -> None:
        """Decides what becomes of the job on Ctrl-C."""
        if not self.is_local:
            print(
                f"{self.name} keeps running: launcher.attach({self.name!r}).wait() follows it again, .stop() ends it.",
                flush=True,
            )
            return
        self.stop()  # it lives no longer than this process
        for _ in self._polls(lambda: None):
            pass
        if self.directory and list(self.directory.glob("checkpoints/step-*")):
            print(
                f"{self.name} is stopped. Its checkpoint is in {self.directory / 'checkpoints'}: the same call with "
                f"directory={str(self.directory)!r} resumes from it.",
                flush=True,
            )

    def _end(self, description: dict[str, Any]) -> Job:
        status, last = description["TrainingJobStatus"], self._lines[-_LAST_LINES:]
        if status == "Completed":
            return self
        reason = redact(description.get("FailureReason") or description.get("SecondaryStatus", status))
        if status == "Stopped":
            raise JobStopped(self.name, f"the job was stopped ({reason})", last, advice_for(reason))
        raise JobFailed(self.name, reason, last, advice_for(reason) or advice_for("\n".join(last)))

    def _standing(self, description: dict[str, Any]) -> Standing:
        return Standing(
            status=description["TrainingJobStatus"],
            doing=description.get("SecondaryStatus", ""),
            progress=self._follow_progress(description, read=False),
            seconds=_seconds(description),
            cost=self._cost(description),
        )

    def _cost(self, description: dict[str, Any]) -> float | None:
        resources = description.get("ResourceConfig", {})
        instance = INSTANCES.get(resources.get("InstanceType", ""))
        price = self.price or (instance.usd_per_hour if instance else None)
        if price is None or self.is_local:
            return None
        seconds: float = description.get("BillableTimeInSeconds") or _seconds(description)
        count: int = resources.get("InstanceCount", 1)
        return price * count * seconds / 3600

    def _read_log(self) -> list[str]:
        """Reads what is new in the log."""
        if self._log_is_whole or self._log_is_off:
            return []
        if self._reader is None:
            self._reader = LogReader(self._clients("logs"), self.name)
        with asking(f"the log of {self.name} can't be read"):
            new = self._reader.read()
        self._lines += new
        if self._progress:
            for line in new:
                self._progress.read(line)
        return new

    def _follow_progress(self, description: dict[str, Any] | None = None, *, read: bool = True) -> Progress:
        if self._progress is None:
            description = description or self.describe()
            self._progress = Progress(_steps(description.get("HyperParameters", {})))
            for line in self._lines:
                self._progress.read(line)
        if read:
            self._read_log()
        return self._progress

    # Results

    @property
    def is_local(self) -> bool:
        """Whether the job runs on this machine."""
        return self._clients.is_local("sagemaker")

    @property
    def model_uri(self) -> str:
        """Where the trained pipeline lies: an ``s3://`` prefix, a ``model.tar.gz`` there, or a local directory.

        Raises:
            UserError: there is no model yet.
        """
        return self._outputs().model_uri

    def download(self, directory: str | Path) -> Path:
        """Fetches the trained pipeline, each file checked against the upload's manifest where there is one.

        Args:
            directory: where the diffusers directory is to lie; made if missing.

        Returns:
            the directory; ``StableDiffusionPipeline.from_pretrained`` takes it.

        Raises:
            UserError: there is no model, or it can't be read.
            TransferError: what came is not what was sent.
        """
        return self._outputs().download(Path(directory))

    def samples(self) -> Pictures:
        """The pictures that the job has drawn so far, a list of Pillow's by name; a notebook shows them.

        Raises:
            UserError: the model lies in a ``model.tar.gz``, which :meth:`download` unpacks.
        """
        return self._outputs().samples()

    def report(self) -> Page:
        """The job's report page, text in HTML; a notebook shows it.

        Raises:
            UserError: the job wrote none, or it lies in a ``model.tar.gz``.
        """
        return self._outputs().report()

    @property
    def events_uri(self) -> str:
        """Where TensorBoard's events lie, for ``tensorboard --logdir``, also while the job runs.

        Raises:
            UserError: the job was not started with ``report_to=tensorboard``.
        """
        return self._outputs().events_uri

    def register(
        self,
        group: str,
        *,
        approval: str = PENDING,
        base_model: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> ModelPackage:
        """Puts the trained model into SageMaker's registry, with the report's facts, pictures and measures as its card.

        Args:
            group: of its versions; made if missing.
            approval: ``PendingManualApproval``, ``Approved`` or ``Rejected``.
            base_model: that an adapter lies beside: an ``s3://`` prefix, or a hub id.
            tags: of a group that is made; default: the job's.

        Returns:
            the version; ``launcher.deploy(package.arn)`` deploys it once it is approved.

        Raises:
            UserError: with everything that is in the way.
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        return register(self, group, self._clients, approval=approval, base_model=base_model, tags=tags)

    def deploy(self, **options: Any) -> Endpoint:
        """Makes an endpoint that draws with the trained model: see :func:`launcher.deploy`, whose options these are.

        Raises:
            UserError: there is no model yet; or with everything else that is in the way.
            EndpointFailed: it can't draw.
        """
        # A job of this process alone does not say whose account an endpoint is for.
        own = {} if self.directory or "session" in options else {"clients": self._clients}
        return deploy(self, **{**own, **options})

    def _outputs(self) -> Outputs:
        return Outputs(self.name, self.describe(), self._clients, self.directory)


def _ended_long_ago(description: dict[str, Any]) -> bool:
    ended = description.get("TrainingEndTime") or description.get("LastModifiedTime")
    return ended is not None and datetime.now(UTC) - ended > timedelta(minutes=1)


def _steps(hyperparameters: dict[str, str]) -> int | None:
    """Training steps in all; None where nobody set them: then the job says how many it takes."""
    steps = hyperparameters.get("max_train_steps", "").strip('"')
    return int(steps) if steps.isascii() and steps.isdecimal() else None


def _seconds(description: dict[str, Any]) -> float:
    """Counts the seconds that the job has run, without the wait for its instance."""
    started: datetime | None = description.get("TrainingStartTime")
    if started is None:
        return 0.0
    ended: datetime = description.get("TrainingEndTime") or datetime.now(UTC)
    return (ended - started).total_seconds()
