"""``launcher.fit_many``: one call from a list of subjects to a model of each; and how to go on with it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.printing import redact
from dreambooth_sm.storage import S3Uri
from launcher.aws.account import Account
from launcher.aws.clients import Clients
from launcher.aws.lookup import s3_text
from launcher.draft import LOCAL
from launcher.fleets.fleet import Fleet
from launcher.fleets.here import LocalFleet
from launcher.fleets.prepare import FleetResources, PreparedFleet, prepare_fleet, prepare_local_fleet
from launcher.fleets.queue import Queue
from launcher.fleets.sources import Subjects
from launcher.options import with_options
from launcher.resources import WORKSPACE

if TYPE_CHECKING:
    from boto3.session import Session

# Given by the list of subjects.
_OF_EACH = ("images", "fleet", "fleet_outcomes")


@with_options(instance_type=LOCAL, without=_OF_EACH)
def fit_many(
    subjects: Subjects,
    *,
    skip_bad: bool = False,
    parallel: int = 4,
    subjects_per_job: int | None = None,
    alternatives: Sequence[str] = (),
    queue: str | None = None,
    share: str | None = None,
    priority: int | None = None,
    attempts: int = 1,
    directory: str | Path | None = None,
    wait: bool = True,
    log: Callable[[str], None] | None = None,
    session: Session | None = None,
    **options: Any,
) -> Fleet | LocalFleet:
    """Trains many subjects, each by itself, with a model of its own; several in a job, one after another.

    All subjects are checked first, and every problem is reported at once. Then pictures and lists go to S3, and jobs
    start, so many at a time.

    Args:
        subjects: a folder with a folder of pictures for each; a ``.csv`` or ``.jsonl``, here or at ``s3://``, with
            ``id``, ``images``, and a subject's own ``output`` and hyperparameters; or dictionaries of these.
        skip_bad: leave out subjects that can't be trained, instead of refusing all.
        parallel: jobs that run at a time, within the account's quota; with a queue, those that are expected to.
        subjects_per_job: at most; None: so many that a job is long against its start.
        alternatives: other instance types, in this order, taken where the first has no room or no capacity.
        queue: a job queue of AWS Batch for SageMaker's training jobs, by its name or ARN: all jobs go there at once,
            and wait for their turn; None: jobs go to SageMaker itself.
        share: with ``queue``: the share identifier, where the queue has a scheduling policy.
        priority: with ``queue``: of these jobs within their share, 0 to 9999; higher ones first.
        attempts: with ``queue``: how often a job may start, after faults of SageMaker's own; 1 to 10.
        directory: of a fleet on this machine, which has its ``/opt/ml`` tree; a temporary directory if left out.
        wait: follow the fleet until all subjects have ended.
        log: gets each line; default: printed.
        session: boto3's, for credentials and region; default: the standard AWS settings.
        options: of all subjects; see below.

    Raises:
        UserError: for bad input, before anything starts.

    Examples:
        >>> fleet = fit_many("toys/", instance_prompt="photo of zwx toy", class_prompt="photo of a toy",
        ...                  method="lora", instance_type="ml.g5.xlarge")  # doctest: +SKIP
        >>> fleet.status().done  # doctest: +SKIP
        ('cat', 'duck')
    """
    say = log or print
    resources = _resources(parallel, subjects_per_job, alternatives, queue, share, priority, attempts)
    if options.setdefault("instance_type", LOCAL) == LOCAL:
        _refuse_here(resources)
        local, lines = prepare_local_fleet(subjects, options, skip_bad=skip_bad)
        _tell([*lines, *local.lines()], say)
        place = Path(directory or tempfile.mkdtemp(prefix="dreambooth-sm-")).resolve()
        here = LocalFleet(place, local, local.submit(place, wait=False))
        return here.wait(log) if wait else here
    fleet = _prepared(subjects, skip_bad, resources, directory, session, options)
    _tell(fleet.lines(), say)
    started = fleet.submit(say)
    return started.wait(log) if wait else started


@with_options(instance_type=LOCAL, without=_OF_EACH)
def check_many(
    subjects: Subjects,
    *,
    skip_bad: bool = False,
    parallel: int = 4,
    subjects_per_job: int | None = None,
    alternatives: Sequence[str] = (),
    queue: str | None = None,
    share: str | None = None,
    priority: int | None = None,
    attempts: int = 1,
    log: Callable[[str], None] = print,
    session: Session | None = None,
    **options: Any,
) -> None:
    """Checks and prints all that :func:`fit_many` does before jobs start, minutes and dollars too, and starts none.

    Raises:
        UserError: with everything that is in the way.
    """
    resources = _resources(parallel, subjects_per_job, alternatives, queue, share, priority, attempts)
    if options.setdefault("instance_type", LOCAL) == LOCAL:
        _refuse_here(resources)
        local, lines = prepare_local_fleet(subjects, options, skip_bad=skip_bad)
        _tell([*lines, *local.lines()], log)
        return
    _tell(_prepared(subjects, skip_bad, resources, None, session, options).lines(), log)


def _resources(
    parallel: int,
    subjects_per_job: int | None,
    alternatives: Sequence[str],
    queue: str | None,
    share: str | None,
    priority: int | None,
    attempts: int,
) -> FleetResources:
    if queue is None and (share is not None or priority is not None or attempts != 1):
        raise UserError("share, priority and attempts are for a queue; set queue, or leave them out")
    waits = Queue(queue, share, priority, attempts) if queue else None
    return FleetResources(parallel, subjects_per_job, tuple(alternatives), waits)


def _refuse_here(resources: FleetResources) -> None:
    if resources.queue or resources.alternatives:
        raise UserError(
            "queue and alternatives are for a fleet on SageMaker; leave them out, or set instance_type='ml.g5.xlarge'"
        )


def _prepared(
    subjects: Subjects,
    skip_bad: bool,
    resources: FleetResources,
    directory: str | Path | None,
    session: Session | None,
    options: dict[str, Any],
) -> PreparedFleet:
    if directory is not None:
        raise UserError("directory is for a fleet on this machine; leave it out, or set instance_type='local'")
    account = Account(Clients(session))
    return prepare_fleet(subjects, options, account, skip_bad=skip_bad, resources=resources)


def attach_fleet(
    name: str | Path, clients: Clients | None = None, *, session: Session | None = None
) -> Fleet | LocalFleet:
    """A fleet that another process has started, to be followed, or to go on with what remains.

    Args:
        name: of the fleet; where its state is, as its start has printed it; or the directory of one of this machine.
        clients: of its services; default: those of the session.
        session: boto3's, for credentials and region; default: the standard AWS settings.

    Raises:
        UserError: the fleet can't be found.
    """
    if location := s3_text(name):
        return Fleet(S3Uri.parse(location), clients or Clients(session))
    if Path(name).is_dir():
        return LocalFleet(Path(name).resolve())
    account = Account(clients or Clients(session))
    return Fleet(S3Uri(account.find_bucket(), WORKSPACE) / "fleets" / str(name), account.clients)


def _tell(lines: Iterable[str], say: Callable[[str], None]) -> None:
    for line in lines:
        say(redact(line))
