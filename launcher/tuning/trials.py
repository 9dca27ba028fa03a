"""What the trials of a tuning job have in common: their hyperparameters, how they are measured, what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.planning.length import length_of
from launcher.estimates import Estimate, estimate_on
from launcher.instances import PRICES, Instance
from launcher.measured import caching, measuring, with_values
from launcher.parts import NOTHING, Known, in_minutes
from launcher.tuning.ranges import Range, Ranges, read_ranges, settings
from launcher.tuning.search import Search

# Measures of a trial whose length nobody says a step for: enough to fall behind, few enough to cost little.
_MEASURES = 5


@dataclass(frozen=True)
class Trials:
    """The trials of a tuning job, before values are chosen.

    Attributes:
        hyperparameters: that all have.
        ranges: what is searched over.
        measures: how often a trial says its measures, at most.
        notes: lines for people.
    """

    hyperparameters: Hyperparameters
    ranges: tuple[Range, ...]
    measures: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class TuningEstimate:
    """The time and money that a tuning job needs.

    Attributes:
        trials, parallel: training jobs in all, and at a time.
        least, most: of a trial, by the values that it is tried with.
    """

    trials: int
    parallel: int
    least: Estimate
    most: Estimate

    def lines(self) -> list[str]:
        """For people: what a trial runs on, and time and cost of all."""
        lines = self.most.lines()[:2]
        shortest, longest = self.least.whole_minutes, self.most.whole_minutes
        if shortest is None or longest is None:
            return [*lines, "time: no estimate for CPUs; choose an instance type with a GPU for more than a try"]
        rounds = -(-self.trials // self.parallel)
        lines.append(
            f"estimate: about {_span(shortest * rounds, longest * rounds, '{:.0f}')} minutes in all, "
            f"{_span(shortest, longest, '{:.0f}')} a trial"
        )
        low, high = self.least.usd, self.most.usd
        if low is None or high is None:
            return [*lines, "cost: at an unknown price"]
        whole = _span(low * self.trials, high * self.trials, "${:.2f}")
        return [*lines, f"cost: about {whole} in all, {_span(low, high, '${:.2f}')} a trial, on demand ({PRICES})"]


def _span(low: float, high: float, form: str) -> str:
    first, last = form.format(low), form.format(high)
    return first if first == last else f"{first} to {last}"


def plan_trials(
    h: Hyperparameters,
    ranges: Ranges | None,
    search: Search,
    *,
    pictures: int,
    processes: int = 1,
    isolated: bool = False,
    class_cache: str | None = None,
) -> Trials:
    """Reads the ranges, and adds what trials need to be compared with each other.

    Args:
        pictures: of the subject.
        processes: that train together.
        isolated: whether trials have no network.
        class_cache: where they may share their class images; None: nowhere.

    Raises:
        UserError: with everything that is wrong.
    """
    found = read_ranges(ranges, h)
    added = measuring(h, isolated=isolated)
    if h.seed is None and all(each.name != "seed" for each in found):
        added["seed"] = 0
    added |= caching(h, class_cache, isolated=isolated)
    shortest, longest = _lengths(h, found, pictures, processes)
    every = h.fidelity_steps
    if search.looks_while_training and not every:
        chosen = h.save_steps if 0 < h.save_steps < shortest and not h.save_use_epochs else shortest // _MEASURES
        added["fidelity_steps"] = every = max(1, chosen)
    problems = Problems()
    if search.looks_while_training and every >= shortest:
        problems.found.append(
            f"fidelity_steps={every}: trials of {shortest} steps can't be compared on the way; set "
            f"{max(1, shortest // _MEASURES)}"
        )
    whole = h
    with problems.collected():
        whole = with_values(h, added)
        problems.found += search.problems_with(found, whole)
    problems.raise_any()
    on_the_way = (longest - 1) // every if every else 0
    chooses = h.checkpoints_total_limit + 1 if h.select_best else 0
    notes = [f"search: {each.words}" for each in found]
    notes += [f"{name}: {value}, for all trials" for name, value in added.items()]
    return Trials(whole, tuple(found), on_the_way + 1 + chooses, tuple(notes))


def estimate_trials(
    trials: Trials,
    search: Search,
    instance: Instance,
    *,
    instance_count: int = 1,
    pictures: int = 5,
    max_minutes: int | None = None,
    known: Known = NOTHING,
) -> TuningEstimate:
    """Checks and estimates trials at the ends of the ranges.

    Raises:
        UserError: where some of them are refused, do not fit, or take too long; each reason once.
    """
    problems: dict[str, str] = {}
    found: list[tuple[str, Estimate]] = []
    for words, h in _checked(trials, problems):
        try:
            estimate = estimate_on(h, instance, instance_count=instance_count, pictures=pictures, known=known)
        except UserError as error:
            for problem in error.problems:
                problems.setdefault(problem, f"{words}: {problem}")
            continue
        found.append((words, estimate))
    found.sort(key=lambda each: each[1].minutes or 0.0)
    if found and max_minutes is not None and (longest := found[-1][1].minutes or 0.0) > max_minutes:
        problems["max_minutes"] = (
            f"max_minutes={max_minutes}: a trial with {found[-1][0]} is expected to take about {in_minutes(longest)} "
            f"on {instance.name}; allow more, or search over fewer steps"
        )
    if problems:
        raise UserError(problems.values())
    count = search.trials(trials.ranges)
    return TuningEstimate(count, min(search.parallel, count), found[0][1], found[-1][1])


def check_trials(trials: Trials) -> None:
    """Raises UserError where trials at the ends of the ranges are refused; each reason once."""
    problems: dict[str, str] = {}
    for _ in _checked(trials, problems):
        pass
    if problems:
        raise UserError(problems.values())


def _checked(trials: Trials, problems: dict[str, str]) -> Iterator[tuple[str, Hyperparameters]]:
    """Trials that hyperparameters' rules allow; why others are refused goes to ``problems``."""
    for values in settings(trials.ranges):
        words = _words(values)
        try:
            yield words, with_values(trials.hyperparameters, values)
        except UserError as error:
            for problem in error.problems:
                problems.setdefault(problem, f"{words}: {problem}")


def _lengths(h: Hyperparameters, ranges: Sequence[Range], pictures: int, processes: int) -> tuple[int, int]:
    """Steps of the shortest and of the longest trial."""
    lengths = [each for each in ranges if each.name in ("max_train_steps", "num_train_epochs", "train_batch_size")]
    steps = []
    for values in settings(lengths):
        with suppress(UserError):  # which is told later, with these values
            steps.append(length_of(with_values(h, values), pictures, processes).steps)
    return min(steps, default=1), max(steps, default=1)


def _words(values: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )
