"""From a list of subjects to a prepared fleet: all of them checked, and jobs, minutes and dollars known."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from dreambooth_sm.errors import Problems
from dreambooth_sm.fleet.subjects import FleetSubject, write_list
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.storage import S3Uri, put_object
from launcher.aws.account import Account
from launcher.aws.lookup import Lookup
from launcher.channels import Channel
from launcher.estimates import estimate_on
from launcher.fleets.check import SubjectCheck, check_subjects
from launcher.fleets.fleet import FLEET_CHANNEL, LIST_FILE, OUTCOMES, Fleet, job_names
from launcher.fleets.sources import Subjects, read_subjects
from launcher.fleets.split import FleetEstimate, split, subjects_a_job
from launcher.prepare import PreparedJob, PreparedLocalJob, prepare, prepare_local
from launcher.staging import digest, stage
from launcher.training_request import CHANNELS, IMAGES_CHANNEL, training_request

# Of a fleet; names of its jobs are longer.
_LONGEST_NAME = 48
_WORKERS = 16
# Where a job finds its list.
LIST = f"{CHANNELS}/{FLEET_CHANNEL}/{LIST_FILE}"


@dataclass
class PreparedFleet:
    """A fleet for SageMaker that has been checked.

    Attributes:
        name: of the fleet, with which those of its jobs begin.
        job: a job of it, without its list.
        subjects: those that will be trained.
        left_out: what is wrong with the others.
    """

    name: str
    job: PreparedJob
    subjects: list[SubjectCheck]
    left_out: list[str]
    estimate: FleetEstimate

    def lines(self) -> list[str]:
        """Tells people what will be done."""
        job = self.job.lines()
        kept = [line for line in job if line.startswith(("image:", "bucket:", "files:", "warning:"))]
        warnings = [f"warning: {line}" for check in self.subjects for line in check.warnings]
        left_out = [f"left out: {line}" for line in self.left_out]
        return [f"name: {self.name}", *self.estimate.lines(), *kept, *warnings, *left_out]

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
        state = {
            "name": self.name,
            "parallel": self.estimate.parallel,
            "models": h.manual_upload_model_path,
            "request": training_request(h, first, channels),
        }
        rest = iter(subjects)
        for job, size in zip(job_names(self.name, len(self.estimate.sizes)), self.estimate.sizes, strict=True):
            lines = write_list(next(rest) for _ in range(size))
            put_object(root / "jobs" / job / LIST_FILE, lines.encode(), options, client=s3)
        # The last one: where it is, the fleet is whole.
        put_object(root / "fleet.json", json.dumps(state, indent=1).encode(), options, client=s3)
        fleet = Fleet(root, account.clients)
        say(f"fleet: {root}")
        fleet.advance(say)
        return fleet


def _with_places(h: Hyperparameters, root: S3Uri, key: str | None) -> Hyperparameters:
    """With the places of models and outcomes, in the fleet's own folder where none are asked for.

    Args:
        key: that files are encrypted with; None: as the hyperparameters say.
    """
    models = h.manual_upload_model_path or str(root / "models")
    places = {"manual_upload_model_path": models, "fleet_outcomes": str(root / OUTCOMES)}
    if key:
        places["s3_kms_key_id"] = key
    return Hyperparameters.parse({**h.model_dump(exclude_unset=True), **places})


def prepare_fleet(
    subjects: Subjects,
    options: Mapping[str, Any],
    account: Account,
    *,
    skip_bad: bool,
    parallel: int,
    subjects_per_job: int | None,
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
    if parallel < 1:
        problems.found.append(f"parallel={parallel}: set 1 or more")
    if subjects_per_job is not None and subjects_per_job < 1:
        problems.found.append(f"subjects_per_job={subjects_per_job}: set 1 or more, or leave it out")
    with problems.collected():
        job = prepare({**options, "images": None, "fleet": LIST, "name": name}, account)
    with problems.collected():
        found = read_subjects(subjects, lambda: account.clients("s3"))
        if job:
            checks = check_subjects(found, job.hyperparameters, Lookup(lambda: account.clients("s3")), _base(options))
    good, left_out = _sorted_out(checks, problems, skip_bad=skip_bad)
    problems.raise_any()
    assert job is not None
    instance = job.estimate.instance
    alone = estimate_on(job.hyperparameters, replace(instance, count=1))
    limit = job.resources.max_minutes
    largest = subjects_per_job or subjects_a_job(len(good), alone, parallel, cards=instance.count, limit=limit)
    estimate = FleetEstimate(split(len(good), largest), parallel, alone, instance.count)
    return PreparedFleet(str(name), job, good, left_out, estimate)


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
