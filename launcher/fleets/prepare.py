"""From a list of subjects to a prepared fleet: all of them checked, and jobs, minutes and dollars known."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.fleet.subjects import FleetSubject, write_list
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.storage import S3Uri
from launcher.aws.account import Account
from launcher.aws.lookup import Lookup
from launcher.aws.service_errors import ServiceError
from launcher.channels import Channel
from launcher.estimates import estimate_on
from launcher.fleets.check import SubjectCheck, check_subjects
from launcher.fleets.fleet import Fleet
from launcher.fleets.queue import Queue
from launcher.fleets.sources import Subjects, read_subjects
from launcher.fleets.split import FleetEstimate, split, subjects_a_job
from launcher.fleets.state import FLEET_CHANNEL, LIST_FILE, OUTCOMES, job_names, write_state
from launcher.instances import find_instance
from launcher.prepare import PreparedJob, PreparedLocalJob, prepare, prepare_local
from launcher.staging import digest, stage
from launcher.training_request import CHANNELS, IMAGES_CHANNEL, training_request

# Of a fleet; names of its jobs are longer.
_LONGEST_NAME = 48
_WORKERS = 16
# Of InstancePreferences.
_MOST_TYPES = 5
# Where a job finds its list.
LIST = f"{CHANNELS}/{FLEET_CHANNEL}/{LIST_FILE}"


@dataclass(frozen=True)
class FleetResources:
    """How a fleet is spread over jobs, and where these run.

    Attributes:
        parallel: jobs that run at a time; with a queue, those that are expected to.
        subjects_per_job: at most; None: so many that a job is long against its start.
        alternatives: other instance types, taken where the first has no room.
        queue: of AWS Batch; None: jobs go to SageMaker itself.
    """

    parallel: int = 4
    subjects_per_job: int | None = None
    alternatives: tuple[str, ...] = ()
    queue: Queue | None = None

    def problems(self) -> Iterator[str]:
        """What is wrong with it, whatever the jobs are."""
        if self.parallel < 1:
            yield f"parallel={self.parallel}: set 1 or more"
        if self.subjects_per_job is not None and self.subjects_per_job < 1:
            yield f"subjects_per_job={self.subjects_per_job}: set 1 or more, or leave it out"
        if len(self.alternatives) >= _MOST_TYPES or len({*self.alternatives}) < len(self.alternatives):
            yield f"alternatives: set at most {_MOST_TYPES - 1} instance types, each once"
        if self.queue:
            yield from self.queue.problems()


@dataclass
class PreparedFleet:
    """A fleet for SageMaker that has been checked.

    Attributes:
        name: of the fleet, with which those of its jobs begin.
        job: a job of it, without its list.
        subjects: those that will be trained.
        left_out: what is wrong with the others.
        resources: where its jobs run.
        notes: lines for people about these.
    """

    name: str
    job: PreparedJob
    subjects: list[SubjectCheck]
    left_out: list[str]
    estimate: FleetEstimate
    resources: FleetResources = FleetResources()
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Tells people what will be done."""
        job = self.job.lines()
        kept = [line for line in job if line.startswith(("image:", "bucket:", "files:", "warning:"))]
        warnings = [f"warning: {line}" for check in self.subjects for line in check.warnings]
        left_out = [f"left out: {line}" for line in self.left_out]
        return [f"name: {self.name}", *self.estimate.lines(), *self.notes, *kept, *warnings, *left_out]

    def submit(self, say: Callable[[str], None] = lambda line: None) -> Fleet:
        """Puts pictures and lists into S3, and starts as many jobs as may run at a time."""
        self.job.stage(say)
        resources, account = self.job.resources, self.job.account
        assert account is not None
        s3, options = account.clients("s3"), self.job.options

        def staged(check: SubjectCheck) -> FleetSubject:
            if check.files is None:
                return check.subject
            place = resources.workspace / IMAGES_CHANNEL / digest(check.files)
            stage(check.files, place, s3, options)
            return replace(check.subject, images=str(place))

        with ThreadPoolExecutor(_WORKERS) as pool:
            subjects = list(pool.map(staged, self.subjects))
        say(f"pictures: of {len(subjects)} subjects in S3")
        root = resources.workspace / "fleets" / self.name
        h = _with_places(self.job.hyperparameters, root, options.kms_key)
        first = resources.model_copy(update={"name": self.name})
        channels = {**self.job.channels, FLEET_CHANNEL: Channel(root / "jobs" / self.name)}
        facts = {
            "name": self.name,
            "parallel": self.estimate.parallel,
            "minutes": self.estimate.minutes,
            "models": h.manual_upload_model_path,
            "alternatives": self.resources.alternatives,
            "queue": self.resources.queue.facts() if self.resources.queue else None,
            "request": training_request(h, first, channels),
        }
        write_state(root, facts, _lists(self.name, self.estimate.sizes, subjects), options, account.clients)
        fleet = Fleet(root, account.clients)
        say(f"fleet: {root}")
        try:
            fleet.advance(say)
        except ServiceError as error:
            if not error.kind.passes:
                raise
            say(f"not all jobs have started that may ({error}); launcher.attach_fleet({str(root)!r}).wait() goes on")
        return fleet


def _lists(name: str, sizes: Sequence[int], subjects: Sequence[FleetSubject]) -> dict[str, tuple[FleetSubject, ...]]:
    rest = iter(subjects)
    names = job_names(name, len(sizes))
    return {job: tuple(islice(rest, size)) for job, size in zip(names, sizes, strict=True)}


def _with_places(h: Hyperparameters, root: S3Uri, key: str | None) -> Hyperparameters:
    """With the places of models and outcomes, in the fleet's own folder where none are asked for.

    Args:
        key: that files are encrypted with; None: as the hyperparameters say.
    """
    models = h.manual_upload_model_path or str(root / "models")
    places = {"manual_upload_model_path": models, "fleet_outcomes": str(root / "jobs" / OUTCOMES)}
    if key:
        places["s3_kms_key_id"] = key
    return Hyperparameters.parse({**h.model_dump(exclude_unset=True), **places})


def prepare_fleet(
    subjects: Subjects,
    options: Mapping[str, Any],
    account: Account,
    *,
    skip_bad: bool,
    resources: FleetResources,
) -> PreparedFleet:
    """Checks everything that can be checked of a fleet on SageMaker.

    Raises:
        UserError: with everything that was found, of all subjects.
    """
    problems, checks, job = Problems(), list[SubjectCheck](), None
    name = options.get("name") or f"fleet-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if len(str(name)) > _LONGEST_NAME:
        problems.found.append(f"name: {name!r} is too long for a fleet; set at most {_LONGEST_NAME} characters")
    problems.found += _refused(options)
    problems.found += resources.problems()
    with problems.collected():
        job = prepare({**options, "images": None, "fleet": LIST, "name": name}, account)
    with problems.collected():
        found = read_subjects(subjects, lambda: account.clients("s3"))
        if job:
            checks = check_subjects(found, job.hyperparameters, Lookup(lambda: account.clients("s3")), _base(options))
    notes: list[str] = []
    with problems.collected():
        if resources.queue:
            resources.queue.check(account.clients)
    with problems.collected():
        if job:
            notes += _check_alternatives(job, resources.alternatives)
    good, left_out = _sorted_out(checks, problems, skip_bad=skip_bad)
    problems.raise_any()
    assert job is not None
    parallel, limited = _within_quota(job, resources, account)
    instance = job.estimate.instance
    alone = estimate_on(job.hyperparameters, replace(instance, count=1), known=job.estimate.known)
    limit = job.resources.max_minutes
    largest = resources.subjects_per_job or subjects_a_job(
        len(good), alone, parallel, cards=instance.count, limit=limit
    )
    estimate = FleetEstimate(split(len(good), largest), parallel, alone, instance.count)
    return PreparedFleet(str(name), job, good, left_out, estimate, resources, [*notes, *limited])


def _check_alternatives(job: PreparedJob, names: Sequence[str]) -> Iterator[str]:
    """A line for each instance type that can do what the first one does.

    Raises:
        UserError: one can't.
    """
    first = job.estimate.instance
    for name in names:
        instance = find_instance(name)
        found = estimate_on(job.hyperparameters, replace(instance, count=1))
        if name == first.name:
            raise UserError(f"alternatives: {name} is the instance type itself; leave it out")
        if instance.count != first.count or instance.has_own_disk != first.has_own_disk:
            raise UserError(f"alternatives: {name} has other disks or another number of cards than {first.name}")
        cards, time = found.lines()[0].removeprefix("instance: "), found.lines()[2].removeprefix("estimate: ")
        yield f"or: {cards}: a job of one subject {time}"


def _within_quota(job: PreparedJob, resources: FleetResources, account: Account) -> tuple[int, list[str]]:
    """Jobs that may run at a time, and a line where these are fewer than were asked for."""
    if resources.queue:
        return resources.parallel, [f"queue: {resources.queue.name}"]
    types = [job.estimate.instance.name, *resources.alternatives]
    rooms = [account.room_for(name, spot=job.resources.spot) for name in types]
    known = [room for room in rooms if room is not None]
    if len(known) < len(rooms) or sum(known) >= resources.parallel:
        return resources.parallel, []
    count = max(1, sum(known))
    return count, [f"quota: {sum(known)} jobs on {' and '.join(types)} at a time, and not {resources.parallel}"]


def prepare_local_fleet(
    subjects: Subjects, options: Mapping[str, Any], *, skip_bad: bool
) -> tuple[PreparedLocalJob, list[str]]:
    """A job of this machine that trains all subjects, and what is odd about them.

    Raises:
        UserError: with everything that was found, of all subjects.
    """
    from launcher.aws.clients import Clients

    problems, checks, job = Problems(), list[SubjectCheck](), None
    with problems.collected():
        job = prepare_local({**options, "images": None, "fleet": LIST})
    with problems.collected():
        found = read_subjects(subjects, lambda: Clients()("s3"))
        if job:
            checks = check_subjects(found, job.hyperparameters, Lookup(lambda: Clients()("s3")), _base(options))
    good, left_out = _sorted_out(checks, problems, skip_bad=skip_bad)
    problems.raise_any()
    assert job is not None
    listed = write_list(check.subject for check in good).encode()
    sources = {**job.sources, FLEET_CHANNEL: {LIST_FILE: listed}}
    warnings = [line for check in good for line in check.warnings]
    lines = [f"fleet: {len(good)} subjects in a job of this machine"]
    lines += [*(f"warning: {line}" for line in warnings), *(f"left out: {line}" for line in left_out)]
    return replace(job, sources=sources), lines


def _base(options: Mapping[str, Any]) -> str | None:
    return str(options.get("base_model") or "") or None


def _sorted_out(
    checks: list[SubjectCheck], problems: Problems, *, skip_bad: bool
) -> tuple[list[SubjectCheck], list[str]]:
    """The subjects that can be trained, and what is wrong with the others, which is a problem unless they may be left
    out."""
    good = [check for check in checks if not check.problems]
    bad = [line for check in checks for line in check.problems]
    if not skip_bad:
        problems.found += bad
    elif checks and not good:
        problems.found += [*bad, "no subject can be trained"]
    return good, bad


def _refused(options: Mapping[str, Any]) -> Iterator[str]:
    for name in ("network_isolation", "compression"):
        if options.get(name):
            yield f"{name}: the jobs of a fleet send each subject's model to S3 themselves; leave {name} out"
    if options.get("instance_count", 1) != 1:
        yield "instance_count: a fleet is spread over jobs of one instance; set parallel instead"
    if options.get("checkpoint"):
        yield "checkpoint: each job of a fleet has a place of its own; leave it out"
