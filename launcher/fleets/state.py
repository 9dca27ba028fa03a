"""The state of a fleet in S3: what ran, what remains. Any process goes on with it.

``fleet.json`` holds the request of its jobs and where models go; ``jobs/JOB/list/fleet.jsonl`` the subjects of each
job, started or not; ``jobs/JOB/outcomes/ID/`` a copy of the manifest or the failure of each subject that has ended in
it. Names of jobs sort as they are planned: one listing, from the first open job on, tells of all that can be new.
``jobs/~stopped``, which sorts behind them, is there while nothing more is to be started.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from dreambooth_sm.errors import UserError
from dreambooth_sm.fleet.outcome import FAILURE_NAME, Failure
from dreambooth_sm.fleet.subjects import FleetSubject, read_list, write_list
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.manifest import MANIFEST_NAME
from dreambooth_sm.storage import S3Options, S3Uri, create_object, delete_directory, get_object, put_object
from launcher.aws.clients import Clients
from launcher.aws.service_errors import asking

FLEET_CHANNEL, LIST_FILE, OUTCOMES = "fleet", "fleet.jsonl", "outcomes"
_STOPPED = "~stopped"
_ROUND = re.compile(r"-r(\d+)-\d+$")
_WORKERS = 16
T = TypeVar("T")


@dataclass(frozen=True)
class Ended:
    """How a subject has ended.

    Attributes:
        done: whether it has a model.
        job: that it ended in.
        at: seconds since 1970.
    """

    done: bool
    job: str
    at: float


class FleetState:
    """What S3 holds of a fleet.

    Args:
        root: where it is.
        clients: of S3.

    Attributes:
        facts: of ``fleet.json``.
        lists: the subjects of each job that is planned.
        subjects: all of them, by their ids.
        job_of: the last job of each.
        ended: those that have ended.
        is_stopped: whether nothing more is to be started.

    Raises:
        UserError: there is none.
    """

    def __init__(self, root: S3Uri, clients: Clients) -> None:
        self.root, self._clients = root, clients
        content = get_object(root / "fleet.json", client=clients("s3"))
        if content is None:
            raise UserError(f"{root} holds no fleet: check its name, or name it as s3://bucket/prefix")
        self.facts: dict[str, Any] = json.loads(content)
        self.lists: dict[str, tuple[FleetSubject, ...]] = {}
        self.subjects: dict[str, FleetSubject] = {}
        self.job_of: dict[str, str] = {}
        self.ended: dict[str, Ended] = {}
        self.is_stopped = False
        # What is written later is written as its jobs write.
        self._options = Hyperparameters.parse(self.facts["request"]["HyperParameters"]).s3_options
        self._failures: dict[str, Failure] = {}

    @property
    def name(self) -> str:
        return str(self.facts["name"])

    def look(self, settled: Iterable[str] = ()) -> int:
        """Reads what is new.

        Args:
            settled: jobs whose subjects have all been told of, by an earlier look after their end.

        Returns:
            the number of requests that it took.

        Raises:
            ServiceError: S3 can't be reached, or not with these credentials.
        """
        start = f"{(self.root / 'jobs').prefix}/"
        done = {*settled}
        first = min((job for job in self.lists if job not in done), default=max(self.lists, default=""))
        self.ended = {subject: end for subject, end in self.ended.items() if end.job < first}
        pages, new, self.is_stopped = 0, list[str](), False
        paginator = self._clients("s3").get_paginator("list_objects_v2")
        with asking(f"{self.root} can't be listed"):
            for page in paginator.paginate(Bucket=self.root.bucket, Prefix=start, StartAfter=start + first):
                pages += 1
                for item in page.get("Contents", []):
                    job, _, rest = item["Key"].removeprefix(start).partition("/")
                    if job == _STOPPED:
                        self.is_stopped = True
                    elif rest == f"list/{LIST_FILE}":
                        new += [job] if job not in self.lists else []
                    else:
                        self._take(job, rest, item["LastModified"].timestamp())
        self._know(dict(zip(new, self.in_parallel(self._read, new), strict=True)))
        return pages + len(new)

    def _know(self, lists: Mapping[str, tuple[FleetSubject, ...]]) -> None:
        self.lists |= lists
        for job in sorted(lists):
            for subject in lists[job]:
                self.subjects[subject.id] = subject
                self.job_of[subject.id] = max(job, self.job_of.get(subject.id, ""))

    def _take(self, job: str, rest: str, at: float) -> None:
        folder, _, place = rest.partition("/")
        subject, _, name = place.partition("/")
        if folder != OUTCOMES or name not in (MANIFEST_NAME, FAILURE_NAME):
            return
        known, done = self.ended.get(subject), name == MANIFEST_NAME
        if known is None or done or not known.done:
            self.ended[subject] = Ended(done, job, at)

    def _read(self, job: str) -> tuple[FleetSubject, ...]:
        content = get_object(self._list_of(job), self._options, client=self._clients("s3")) or b""
        return read_list(content.decode(), job)

    def _list_of(self, job: str) -> S3Uri:
        return self.root / "jobs" / job / "list" / LIST_FILE

    def model_of(self, subject: FleetSubject) -> str:
        """Where its model lies, or will."""
        return subject.output or f"{self.facts['models']}/{subject.id}"

    def failure(self, subject: str) -> Failure | None:
        """What a subject has failed with; None where that can't be read."""
        if subject not in self._failures:
            place = self.root / "jobs" / self.ended[subject].job / OUTCOMES / subject / FAILURE_NAME
            with suppress(ValueError):
                content = get_object(place, self._options, client=self._clients("s3"))
                self._failures[subject] = Failure.from_json(content or b"")
        return self._failures.get(subject)

    def read_failures(self, subjects: Sequence[str]) -> None:
        """Reads those that are new, several at a time."""
        self.in_parallel(self.failure, [subject for subject in subjects if subject not in self._failures])

    def request(self, job: str) -> dict[str, Any]:
        """The request of one of its jobs."""
        request: dict[str, Any] = copy.deepcopy(self.facts["request"])
        request["TrainingJobName"] = job
        request["HyperParameters"]["fleet_outcomes"] = str(self.root / "jobs" / job / OUTCOMES)
        for channel in request["InputDataConfig"]:
            if channel["ChannelName"] == FLEET_CHANNEL:
                channel["DataSource"]["S3DataSource"]["S3Uri"] = f"{self.root / 'jobs' / job / 'list'}/"
        request["CheckpointConfig"]["S3Uri"] = str(self.root / "checkpoints" / job)
        return request

    def plan_again(self, subjects: Sequence[str]) -> bool:
        """Writes new lists for subjects, as long as those of the jobs that they were in; what they failed with goes.

        Of several processes one does it: the first of the lists is written where none is.

        Returns:
            whether this process has; otherwise the next look tells what another one has planned.
        """
        if not subjects:
            return True
        largest = max(len(self.lists[self.job_of[subject]]) for subject in subjects)
        parts = [subjects[first : first + largest] for first in range(0, len(subjects), largest)]
        names = job_names(self.name, len(parts), 1 + max(map(round_of, self.lists)))
        lists = {name: tuple(self.subjects[each] for each in part) for name, part in zip(names, parts, strict=True)}
        client = self._clients("s3")
        if not create_object(
            self._list_of(names[0]), write_list(lists[names[0]]).encode(), self._options, client=client
        ):
            return False
        write_lists(self.root, {name: lists[name] for name in names[1:]}, self._options, self._clients)
        for subject in subjects:
            if subject in self.ended:
                place = self.root / "jobs" / self.ended.pop(subject).job / OUTCOMES / subject
                delete_directory(place, self._options, client=client)
                self._failures.pop(subject, None)
        self._know(lists)
        return True

    def stop(self) -> None:
        """Says to all who go on with the fleet that nothing more is to be started."""
        put_object(self.root / "jobs" / _STOPPED, b"", self._options, client=self._clients("s3"))
        self.is_stopped = True

    def go_on(self) -> None:
        """Takes that back."""
        place = self.root / "jobs" / _STOPPED
        with asking(f"{place} can't be removed"):
            self._clients("s3").delete_object(Bucket=place.bucket, Key=place.prefix)
        self.is_stopped = False

    def in_parallel(self, act: Callable[[str], T], names: Sequence[str]) -> list[T]:
        """What a function comes to for each name; several requests at a time."""
        if not names:
            return []
        with ThreadPoolExecutor(_WORKERS) as pool:
            return list(pool.map(act, names))


def write_state(
    root: S3Uri,
    facts: Mapping[str, Any],
    lists: Mapping[str, tuple[FleetSubject, ...]],
    options: S3Options,
    clients: Clients,
) -> None:
    """Writes the state of a fleet that starts: ``fleet.json`` last, so that the fleet is whole where it is.

    Args:
        facts: ``name``, ``request`` of a job, ``parallel``, ``models``, and what else :class:`launcher.Fleet` reads.
        lists: the subjects of each job.
    """
    write_lists(root, lists, options, clients)
    put_object(root / "fleet.json", json.dumps(facts, indent=1).encode(), options, client=clients("s3"))


def write_lists(
    root: S3Uri, lists: Mapping[str, tuple[FleetSubject, ...]], options: S3Options, clients: Clients
) -> None:
    """Writes the subjects of jobs that are to be started."""
    client = clients("s3")

    def write(job: str) -> None:
        put_object(root / "jobs" / job / "list" / LIST_FILE, write_list(lists[job]).encode(), options, client=client)

    with ThreadPoolExecutor(_WORKERS) as pool:
        list(pool.map(write, lists))


def job_names(fleet: str, count: int, round: int = 0) -> list[str]:
    """Names of a fleet's jobs, which sort as they are planned.

    Args:
        round: how often their subjects were tried before.
    """
    width = max(4, len(str(count)))
    return [f"{fleet}{f'-r{round:02d}' if round else ''}-{number:0{width}d}" for number in range(1, count + 1)]


def round_of(job: str) -> int:
    """How often the subjects of a job were tried before."""
    found = _ROUND.search(job)
    return int(found[1]) if found else 0
