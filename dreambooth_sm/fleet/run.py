"""A job that trains many subjects, one after another: a loop over the phases of :mod:`dreambooth_sm.job`.

What does not depend on the subject is made for the first one (:mod:`dreambooth_sm.shared`). While one trains, the
pictures of the next are fetched and checked, and the model of the last is sent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch

from dreambooth_sm import outputs
from dreambooth_sm.context import Context, upload_client
from dreambooth_sm.data.captions import read_dataset_info
from dreambooth_sm.data.folder import list_pictures
from dreambooth_sm.distributed import World, joined
from dreambooth_sm.errors import Problems, StopRequested, SubjectsFailed, UserError
from dreambooth_sm.fleet.outcome import Failure, Place
from dreambooth_sm.fleet.subjects import FleetSubject, read_list
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.job import Made, make, send
from dreambooth_sm.models import check_base
from dreambooth_sm.preflight import (
    Checked,
    check_checkpoints,
    check_target,
    check_trackers,
    find_unused_channels,
    preflight,
)
from dreambooth_sm.printing import safe, traceback_lines
from dreambooth_sm.report import Reporter
from dreambooth_sm.s3 import Store
from dreambooth_sm.sagemaker import Contract, localize
from dreambooth_sm.shared import Shared
from dreambooth_sm.storage import S3Uri, check_writable, download_directory

# So many failures for one reason, and no model, are not the subjects' own.
_SAME_FAILURES = 3
# A process that has no subjects left waits for the others; SageMaker's jobs end after 28 days.
_PATIENCE = timedelta(days=28)
Item = TypeVar("Item")
T = TypeVar("T")


@dataclass
class Prepared:
    """A subject whose pictures are here and have been checked.

    Attributes:
        job: that trains it alone, with a log that is kept until it starts.
        scratch: directory with what was fetched for it.
    """

    subject: FleetSubject
    place: Place
    job: Context
    checked: Checked
    scratch: Path


def run_fleet(h: Hyperparameters, contract: Contract, *, report: Reporter, stop: threading.Event) -> None:
    """Trains the subjects of a list; with several processes, each process its share of them.

    Raises:
        UserError: bad input that concerns all of them, before anything is downloaded where that is possible.
        SubjectsFailed: some have no model; each has a file that says why where its model would be.
        StopRequested: ``stop`` was set; the subject that was trained is in a checkpoint.
    """
    with joined(_PATIENCE) as world, tempfile.TemporaryDirectory(prefix="fleet-") as scratch:
        subjects = _read(h, contract, report, stop)
        fleet = _Fleet(h, contract, world, report, stop, Path(scratch))
        stopped: StopRequested | None = None
        try:
            fleet.train(subjects[world.rank :: world.size])
        except StopRequested as request:
            stopped = request
        told = world.gather((fleet.failures, str(stopped or ""), fleet.untried))
    if words := next((words for _, words, _ in told if words), None):
        raise StopRequested(words)
    if failures := [failure for found, _, _ in told for failure in found]:
        lines = [f"{len(failures)} of {len(subjects)} subjects failed; the others have their models"]
        if untried := sum(count for _, _, count in told):
            lines = [
                f"the first {len(failures)} of {len(subjects)} subjects failed alike, and {untried} were not tried; "
                "put right what they have in common"
            ]
        raise SubjectsFailed("\n".join([*lines, *(f"{failure.subject}: {failure.reason}" for failure in failures)]))


def _read(h: Hyperparameters, contract: Contract, report: Reporter, stop: threading.Event) -> tuple[FleetSubject, ...]:
    """The list, and a look at all that its subjects share."""
    job = Context(localize(h, contract), h, contract, World(), report, stop, contextlib.ExitStack())
    problems = Problems()
    subjects: tuple[FleetSubject, ...] = ()
    with report.phase("check_fleet"):
        path = Path(str(job.h.fleet))
        with problems.collected():
            subjects = read_list(path.read_text(encoding="utf-8"), path.name)
        with problems.collected():
            check_base(job.h)
        with problems.collected():
            check_checkpoints(contract)
        with problems.collected():
            check_trackers(job.h, job.world)
        with problems.collected():
            check_target(job.h)
        with problems.collected():
            if job.h.fleet_outcomes:
                check_writable(S3Uri.parse(job.h.fleet_outcomes), job.h.s3_options, client=upload_client(job.h))
        classes = {subject.values.get("class_prompt", h.class_prompt) for subject in subjects} - {None}
        if len(classes) > 1 and list_pictures(Path(job.h.class_data_dir)):
            problems.found.append(
                f"class_data_dir: {job.h.class_data_dir} holds pictures, and the subjects are of {len(classes)} "
                "classes; leave it out, and class images are drawn"
            )
        problems.raise_any()
    for name in find_unused_channels(job):
        report.warn(f"the channel {name} is not used: no hyperparameter names a path in it")
    return subjects


class _Fleet:
    """The subjects of this process.

    Args:
        scratch: directory for what is fetched for them.

    Attributes:
        failures: of those that have no model.
        untried: how many were left out, as those before them have failed for one reason.
    """

    def __init__(
        self,
        h: Hyperparameters,
        contract: Contract,
        world: World,
        report: Reporter,
        stop: threading.Event,
        scratch: Path,
    ) -> None:
        self.failures: list[Failure] = []
        self._h, self._contract, self._world, self._report, self._stop = h, contract, world, report, stop
        self._scratch, local = scratch, localize(h, contract)
        self._list_directory = Path(str(local.fleet)).parent
        self._shared = Shared(outputs.scratch_directory(local))
        self._store: Store | None = None
        self._ended = self._done = self.untried = 0

    def train(self, subjects: tuple[FleetSubject, ...]) -> None:
        """Trains one after another.

        Raises:
            StopRequested: between two, or in one of them.
        """
        sent: Future[None] | None = None
        with ThreadPoolExecutor(1, "sends") as sender:
            for number, (subject, found) in enumerate(_ahead(self._prepare, subjects, self._use_own_card)):
                if self._fails_alike() and sent:
                    sent.result()  # may have gone well
                if self._fails_alike():
                    _let_go(found)
                    self.untried = len(subjects) - number
                    break
                prepared = self._result(subject, found)
                if prepared:
                    self._report.metrics(subject=subject.id, state="started", ended=self._ended, of=len(subjects))
                    if made := self._made(prepared):
                        if sent:
                            sent.result()  # the disk holds one model that waits
                        sent = sender.submit(self._deliver, prepared, made)
                        continue
                    _discard(prepared)
                self._ended += 1
            if sent:
                sent.result()

    def _use_own_card(self) -> None:
        """Each thread has a current device of its own."""
        if torch.cuda.is_available() and self._world.size > 1:
            torch.cuda.set_device(self._world.local_rank)

    def _prepare(self, subject: FleetSubject) -> Prepared | Failure | None:
        """Fetches and checks what a subject needs; in a thread of its own.

        Returns:
            the failure that it has had in this job before it was interrupted; None where the model is there.
        """
        scratch, place = self._scratch / subject.id, self._place(subject)
        if place.conclude():
            return None
        failed = place.failure()
        if failed and failed.job == self._contract.job_name and self._contract.job_name != Contract.job_name:
            return failed
        pictures = self._list_directory / self._contract.localize(subject.images)
        if subject.images.startswith("s3://"):
            pictures = self._fetched(subject)
            download_directory(S3Uri.parse(subject.images), pictures)
        places = {"instance_data_dir": str(pictures), "models_path": self._models_path(subject)}
        if place.target:
            places["manual_upload_model_path"] = str(place.target)
        h = subject.hyperparameters(self._h, read_dataset_info(pictures), **places)
        contract = dataclasses.replace(self._contract, channels={}, subject=subject.id)
        report = Reporter(io.StringIO())
        world = World(local_rank=self._world.local_rank)
        job = Context(h, h, contract, world, report, self._stop, contextlib.ExitStack(), self._shared)
        return Prepared(subject, place, job, preflight(job), scratch)

    def _fetched(self, subject: FleetSubject) -> Path:
        return self._scratch / subject.id / "pictures"

    def _models_path(self, subject: FleetSubject) -> str:
        return f"{self._h.models_path.rstrip('/')}/{subject.id}"

    def _place(self, subject: FleetSubject) -> Place:
        directory = Path(self._contract.localize(self._models_path(subject)))
        below = self._h.manual_upload_model_path
        target = subject.output or (below and f"{below.rstrip('/')}/{subject.id}")
        index = self._h.fleet_outcomes
        if (target or index) and self._store is None:
            self._store = Store(upload_client(self._h), self._h.s3_options)
        places = [S3Uri.parse(text) if text else None for text in (target, index)]
        return Place(subject.id, places[0], directory, self._store, places[1])

    def _result(self, subject: FleetSubject, found: Future[Prepared | Failure | None]) -> Prepared | None:
        """What :meth:`_prepare` came to; None where there is nothing to train."""
        if self._stop.is_set():
            done = _let_go(found)
            raise StopRequested(f"before the subject {subject.id}; those before it have ended") from done
        try:
            prepared = found.result()
        except Exception as error:
            self._fail(subject, self._place(subject), error)
            return None
        if isinstance(prepared, Prepared):
            self._show(prepared)
            return prepared
        state = "failed" if prepared else "there"
        self._done += not prepared
        self._report.metrics(subject=subject.id, state=state)
        self.failures += [prepared] if prepared else []
        return None

    def _fails_alike(self) -> bool:
        """Whether what subjects fail with is not their own: the same of all that have ended."""
        return (
            not self._done
            and len(self.failures) >= _SAME_FAILURES
            and len({failure.reason for failure in self.failures}) == 1
        )

    def _show(self, prepared: Prepared) -> None:
        """Lets a subject's log go where the job's goes, from its first line on."""
        kept, prepared.job.report.stream = prepared.job.report.stream, self._report.stream
        assert isinstance(kept, io.StringIO)
        for line in kept.getvalue().splitlines():
            self._report.say(line)

    def _made(self, prepared: Prepared) -> Made | None:
        """The trained model; None where it failed."""
        made, error = self._try(prepared)
        if isinstance(error, torch.OutOfMemoryError):
            self._report.warn("out of memory: the model is loaded again, for this subject alone")
            made, error = self._try(prepared)
        if error:
            self._fail(prepared.subject, prepared.place, error)
        return made

    def _try(self, prepared: Prepared) -> tuple[Made | None, Exception | None]:
        """The trained model, or the error, after which nothing of the model is left on the device."""
        try:
            return make(prepared.job, prepared.checked), None
        except StopRequested:
            _discard(prepared)
            raise
        except Exception as error:
            self._tell(error)
            failed = error.with_traceback(None)  # whose frames hold what has to be freed
        self._shared.forget()
        return None, failed

    def _deliver(self, prepared: Prepared, made: Made) -> None:
        """Sends a model, and lets go of what it was made from; beside the training of the next one."""
        job, start = prepared.job, made.start
        try:
            if prepared.place.target:
                send(job, prepared.place.target, made)
            else:
                outputs.seal(job.directory, made.written, job.contract.job_name, start.schedule.steps)
            prepared.place.conclude()
            outputs.discard_checkpoints(start.checkpoints, start.identity)
            self._done += 1
            self._report.metrics(subject=prepared.subject.id, state="done")
        except Exception as error:
            self._fail(prepared.subject, prepared.place, error)
        finally:
            _discard(prepared)
            self._ended += 1

    def _fail(self, subject: FleetSubject, place: Place, error: Exception) -> None:
        """Writes why a subject has no model, and remembers it."""
        is_bad = isinstance(error, UserError)
        words = "; ".join(error.problems) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        reason = "; ".join([words, *getattr(error, "__notes__", ())])
        reason = reason.replace(str(self._fetched(subject)), subject.images)  # people know the place in S3
        failure = Failure(subject.id, safe(reason), is_bad, self._contract.job_name)
        self.failures.append(failure)
        self._report.metrics(subject=subject.id, state="failed")
        self._report.say(f"error: {subject.id}: {failure.reason}")
        try:
            place.fail(failure)
        except Exception as reason:
            self._report.warn(f"{subject.id}: its failure can't be written where its model would be: {reason}")

    def _tell(self, error: Exception) -> None:
        """Shows where an error comes from that is not about the input."""
        if not isinstance(error, UserError):
            for line in traceback_lines(error):
                self._report.say(line)


def _let_go(found: Future[Prepared | Failure | None]) -> BaseException | None:
    """Lets go of what was prepared and is not trained; the error that it came to, if any."""
    if (error := found.exception()) is None and isinstance(ready := found.result(), Prepared):
        _discard(ready)
    return error


def _discard(prepared: Prepared) -> None:
    prepared.job.background.close()
    shutil.rmtree(prepared.scratch, ignore_errors=True)


def _ahead(
    act: Callable[[Item], T], items: Iterable[Item], begin: Callable[[], None]
) -> Iterator[tuple[Item, Future[T]]]:
    """Acts on items in a thread, on the next one while this one is looked at.

    Args:
        begin: is called in the thread first.
    """
    with ThreadPoolExecutor(1, "prepares", begin) as pool:
        coming: tuple[Item, Future[T]] | None = None
        for item in items:
            now, coming = coming, (item, pool.submit(act, item))
            if now:
                yield now
        if coming:
            yield coming
