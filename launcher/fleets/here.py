"""A fleet on this machine: one job, whose ``/opt/ml`` tree has the list of its subjects and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dreambooth_sm.errors import UserError
from dreambooth_sm.fleet.outcome import FAILURE_NAME, Failure, states
from dreambooth_sm.fleet.subjects import FleetSubject, read_list
from dreambooth_sm.manifest import MANIFEST_NAME
from launcher.fleets.state import FLEET_CHANNEL, LIST_FILE
from launcher.fleets.status import FleetStatus
from launcher.jobs.job import Job, JobFailed
from launcher.prepare import PreparedLocalJob


class LocalFleet:
    """A fleet of this machine.

    Args:
        directory: the job's tree.
        prepared: the job, which can be started again; None where it is only looked at.
        job: that was started.

    Raises:
        UserError: the directory holds no fleet.
    """

    def __init__(self, directory: Path, prepared: PreparedLocalJob | None = None, job: Job | None = None) -> None:
        self.directory, self._prepared, self.job = directory, prepared, job
        self._list = directory / "input" / "data" / FLEET_CHANNEL / LIST_FILE
        if prepared is None and not self._list.is_file():
            raise UserError(f"{directory} holds no fleet: name the directory that its job was given")

    def __repr__(self) -> str:
        return f"LocalFleet({str(self.directory)!r})"

    def subjects(self) -> list[FleetSubject]:
        """All of them; none before the job has its tree."""
        return [*read_list(self._list.read_text(encoding="utf-8"), LIST_FILE)] if self._list.is_file() else []

    def status(self) -> FleetStatus:
        """How far it is, now. What goes to S3 is not looked at."""
        models = self.directory / "model"
        found = [each for name in (MANIFEST_NAME, FAILURE_NAME) for each in models.glob(f"*/{name}")]
        ended = states(each.relative_to(models).as_posix() for each in found)
        failed = [subject for subject, is_done in ended.items() if not is_done]
        status = {self.job.name: self.job.status} if self.job else {}
        open_yet = tuple(subject.id for subject in self.subjects() if subject.id not in ended)
        runs = "InProgress" in status.values()
        return FleetStatus(
            tuple(subject for subject, is_done in ended.items() if is_done),
            {name: Failure.from_json((models / name / FAILURE_NAME).read_bytes()).reason for name in failed},
            open_yet if runs else (),
            () if runs else open_yet,
            status,
        )

    def models(self) -> dict[str, str]:
        """Where the models of the subjects lie that are done, by their ids."""
        return {subject: str(self.directory / "model" / subject) for subject in self.status().done}

    def wait(self, log: Callable[[str], None] | None = None) -> LocalFleet:
        """Follows the job until it has ended.

        Raises:
            JobFailed: it has ended before all of its subjects had.
        """
        try:
            if self.job:
                self.job.wait(log)
        except JobFailed:
            if self.status().remaining or not self.subjects():
                raise
        return self

    def retry(self, log: Callable[[str], None] | None = None) -> LocalFleet:
        """Tries again all subjects that have no model, and waits for their end.

        Raises:
            UserError: another process has started the fleet.
        """
        if self._prepared is None:
            raise UserError("another process has started the fleet; call launcher.fit_many with the same directory")
        self.job = self._prepared.submit(self.directory, wait=False)
        return self.wait(log)
