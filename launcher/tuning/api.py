"""``launcher.tune``: one call from pictures to the hyperparameters that they are learned best with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.printing import redact
from launcher.aws.account import Account
from launcher.aws.clients import Clients
from launcher.draft import LOCAL, ON_THIS_MACHINE
from launcher.local.run import local_tuning
from launcher.options import Images, with_options
from launcher.tuning.prepare import PreparedLocalTuning, PreparedTuning, prepare_local_tuning, prepare_tuning
from launcher.tuning.ranges import Ranges
from launcher.tuning.search import Search
from launcher.tuning.tuning import Tuning

if TYPE_CHECKING:
    from boto3.session import Session

# What a search for one subject can't have.
_NOT_OURS = ("fleet", "fleet_outcomes")


@with_options(instance_type=LOCAL, without=_NOT_OURS)
def tune(
    images: Images,
    *,
    ranges: Ranges | None = None,
    objective: str = "score",
    strategy: str = "bayesian",
    max_trials: int | None = None,
    parallel: int = 2,
    early_stopping: bool = False,
    warm_start: Sequence[str] = (),
    same_data: bool = False,
    target: float | None = None,
    patience: int | None = None,
    until_convergence: bool = False,
    max_total_minutes: int | None = None,
    search_seed: int | None = None,
    directory: str | Path | None = None,
    wait: bool = True,
    log: Callable[[str], None] | None = None,
    session: Session | None = None,
    **options: Any,
) -> Tuning:
    """Searches for the hyperparameters that a subject is learned best with, by SageMaker's automatic model tuning.

    All that :func:`fit` checks is checked first, at the ends of all ranges, and what the search itself may be; every
    problem is reported at once, and minutes and dollars in all are said. Then pictures go to S3, once for all trials.

    Args:
        images: 4 to 20 pictures, as for :func:`fit`.
        ranges: names of hyperparameters, whose own ranges are taken: ``["learning_rate", "lora_rank"]``. Or a
            dictionary of names to ``(least, most)``, ``(least, most, "log")``, a list of values, or None for their own.
            None: all that have a range of their own, belong to the method, and are not set.
        objective: what is to be best: ``score``, ``subject``, ``prompt``, ``diversity``, or ``prior`` (the least).
        strategy: ``bayesian``, ``random``, ``hyperband`` (stops trials that fall behind) or ``grid`` (all combinations
            of lists of values).
        max_trials: training jobs in all; None: 12.
        parallel: training jobs at a time, within the account's quota.
        early_stopping: stop trials that fall behind the others' median.
        warm_start: names of up to five earlier tuning jobs, whose trials count.
        same_data: these had the same pictures and image, and their best trial may be the best of all.
        target: end when a trial's objective is as good as this.
        patience: end when so many trials, 3 or more, were not better than the best one before.
        until_convergence: end when SageMaker expects nothing better.
        max_total_minutes: end after so many.
        search_seed: of the values that are drawn; None: others each time.
        directory: of a search on this machine, which holds the ``/opt/ml`` tree of each trial; a temporary directory if
            left out.
        wait: follow it until it has ended.
        log: gets each line; default: printed, with a table where a terminal or notebook can show one.
        session: boto3's, for credentials and region; default: the standard AWS settings.
        options: of all trials; see below.

    Raises:
        UserError: for bad input, before anything starts.
        JobFailed: no trial has come to an objective.

    Examples:
        >>> tuning = tune("duck/", ranges=["learning_rate", "lora_rank"], method="lora", max_train_steps=400,
        ...               instance_prompt="photo of zwx toy", class_prompt="photo of a toy",
        ...               instance_type="ml.g5.xlarge", max_trials=12, parallel=3)  # doctest: +SKIP
        >>> tuning.best.values  # doctest: +SKIP
        {'learning_rate': '0.00018', 'lora_rank': '12'}
    """
    search = Search(
        objective,
        strategy,
        max_trials,
        parallel,
        early_stopping,
        tuple(warm_start),
        same_data,
        target,
        patience,
        until_convergence,
        max_total_minutes,
        search_seed,
    )
    prepared = _prepared(images, ranges, search, directory, session, options)
    _tell(prepared.lines(), log or print)
    started = prepared.submit(directory) if isinstance(prepared, PreparedLocalTuning) else prepared.submit(log or print)
    return started.wait(log) if wait else started


@with_options(instance_type=LOCAL, without=_NOT_OURS)
def check_tuning(
    images: Images,
    *,
    ranges: Ranges | None = None,
    log: Callable[[str], None] = print,
    session: Session | None = None,
    **options: Any,
) -> None:
    """Checks and prints all that :func:`tune` does before trials start, minutes and dollars too, and starts none.

    Args:
        options: those of :func:`tune`; see below for those of a job.

    Raises:
        UserError: with everything that is in the way.
    """
    search = _search(options)
    _tell(_prepared(images, ranges, search, None, session, options).lines(), log)


@with_options(instance_type="auto", without=_NOT_OURS)
def tuning_request(
    images: Images, *, ranges: Ranges | None = None, session: Session | None = None, **options: Any
) -> dict[str, Any]:
    """The request that :func:`tune` would send: for boto3's ``create_hyper_parameter_tuning_job``, Step Functions or
    Terraform. What it needs of this machine is put into S3, unless it is there.

    Args:
        options: those of :func:`tune`; see below for those of a job.

    Raises:
        UserError: for bad input.
    """
    search = _search(options)
    prepared = prepare_tuning({"images": images, **options}, ranges, search, Account(Clients(session)))
    prepared.job.stage()
    return prepared.request


def attach_tuning(name: str, clients: Clients | None = None, *, session: Session | None = None) -> Tuning:
    """A tuning job that is running or has ended, such as one that an earlier notebook or another program started.

    Args:
        name: of the tuning job.
        clients: of its services; default: those of the session.
        session: boto3's, for credentials and region; default: the standard AWS settings.

    Raises:
        UserError: the tuning job was not found in this account and region.
    """
    here = local_tuning(name) if clients is None and session is None else None
    tuning = Tuning(name, here[0], directory=here[1]) if here else Tuning(name, clients or Clients(session))
    tuning.describe()
    return tuning


def _search(options: dict[str, Any]) -> Search:
    """Takes the options of a search out of those of a job."""
    given = {field.name: options.pop(field.name) for field in fields(Search) if field.name in options}
    return Search(**{**given, "warm_start": tuple(given.get("warm_start", ()))})


def _prepared(
    images: Images,
    ranges: Ranges | None,
    search: Search,
    directory: str | Path | None,
    session: Session | None,
    options: Mapping[str, Any],
) -> PreparedTuning | PreparedLocalTuning:
    options = {"images": images, "instance_type": LOCAL, **options}
    if options["instance_type"] in ON_THIS_MACHINE:
        return prepare_local_tuning(options, ranges, search)
    if directory is not None:
        raise UserError("directory is for a search on this machine; leave it out, or set instance_type='local'")
    return prepare_tuning(options, ranges, search, Account(Clients(session)))


def _tell(lines: Iterable[str], say: Callable[[str], None]) -> None:
    for line in lines:
        say(redact(line))
