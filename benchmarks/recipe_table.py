"""What the runs of :mod:`benchmarks.recipes` come to: choices, means, differences with their errors, tables."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.recipe_list import Choice

Row = Mapping[str, Any]
# Of each row: similarity to the subject, prompts shown, the share of the base's diversity that class pictures have,
# how far they moved towards the subject, and all in one.
FIGURES = ("subject", "prompt", "kept", "drift", "score")
# Scores that are nearer to the best one than this are as good; the fewest steps are chosen among them.
_AS_GOOD = 0.01
# Differences of less than so many standard errors are called noise.
NOISE = 2.0


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of JSON lines; a last line that was cut off is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def choose(rows: Iterable[Row]) -> dict[str, Choice]:
    """The best values and steps of each search: of the mean score over the subjects that all of a search's points were
    judged on. Points that diverged on any are out.

    Args:
        rows: of searches.
    """
    scores: dict[str, dict[tuple[str, int], dict[tuple[str, int], float]]] = defaultdict(lambda: defaultdict(dict))
    diverged: set[tuple[str, str]] = set()
    for row in rows:
        values = json.dumps(row["values"], sort_keys=True)
        if "error" in row:
            diverged.add((row["recipe"], values))
        else:
            scores[row["recipe"]][values, row["steps"]][row["toy"], row["seed"]] = row["score"]
    found = {}
    for name, points in scores.items():
        sound = {point: its for point, its in points.items() if (name, point[0]) not in diverged}
        most = max((len(its) for its in sound.values()), default=0)
        means = {point: statistics.fmean(its.values()) for point, its in sound.items() if len(its) == most}
        if not means:
            continue
        best = max(means.values())
        good = [point for point, mean in means.items() if mean >= best - _AS_GOOD]
        values, steps = min(good, key=lambda point: (point[1], -means[point]))
        found[name] = Choice(json.loads(values), steps, means[values, steps])
    return found


@dataclass(frozen=True)
class Figure:
    """One figure of a recipe.

    Attributes:
        mean, deviation: over its runs.
        difference: mean of the differences to the reference's run of the same subject and seed.
        error: standard error of that; NaN for fewer than two runs, and for the reference itself.
    """

    mean: float
    deviation: float
    difference: float
    error: float

    @property
    def is_noise(self) -> bool:
        """Whether the difference is within noise; also where that can't be told."""
        return not abs(self.difference) >= NOISE * self.error


@dataclass(frozen=True)
class Line:
    """What a recipe comes to after some steps."""

    recipe: str
    values: Mapping[str, Any]
    steps: int
    runs: int
    diverged: int
    figures: Mapping[str, Figure]


def summarise(rows: Sequence[Row], reference: str) -> list[Line]:
    """One line a recipe and number of steps, in the order of the rows; paired by subject and seed with ``reference`` at
    its own number of steps, which has ``is_last``."""
    runs: dict[tuple[str, int], dict[tuple[str, int], Row]] = defaultdict(dict)
    diverged: dict[str, int] = defaultdict(int)
    for row in rows:
        if "error" in row:
            diverged[row["recipe"]] += 1
        else:
            runs[row["recipe"], row["steps"]][row["toy"], row["seed"]] = row
    of_reference = {
        (row["toy"], row["seed"]): row
        for row in rows
        if row["recipe"] == reference and "error" not in row and row["is_last"]
    }
    return [
        Line(
            recipe,
            next(iter(its.values()))["values"],
            steps,
            len(its),
            diverged[recipe],
            {name: _figure(name, its, of_reference) for name in FIGURES},
        )
        for (recipe, steps), its in runs.items()
    ]


def _figure(name: str, its: Mapping[tuple[str, int], Row], others: Mapping[tuple[str, int], Row]) -> Figure:
    values = [row[name] for row in its.values()]
    differences = [row[name] - others[case][name] for case, row in its.items() if case in others]
    return Figure(
        statistics.fmean(values),
        statistics.stdev(values) if len(values) > 1 else 0.0,
        statistics.fmean(differences) if differences else math.nan,
        statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan,
    )


def final_lines(rows: Sequence[Row], reference: str) -> list[Line]:
    """Those of recipes at their own number of steps."""
    last = {(row["recipe"], row["steps"]) for row in rows if row.get("is_last")}
    return [line for line in summarise(rows, reference) if (line.recipe, line.steps) in last]


def as_json(lines: Iterable[Line]) -> list[dict[str, Any]]:
    return [
        {
            "recipe": line.recipe,
            "values": line.values,
            "steps": line.steps,
            "runs": line.runs,
            "diverged": line.diverged,
            **{
                name: {
                    "mean": round(figure.mean, 4),
                    "deviation": round(figure.deviation, 4),
                    "difference": _or_none(figure.difference),
                    "error": _or_none(figure.error),
                    "within_noise": figure.is_noise,
                }
                for name, figure in line.figures.items()
            },
        }
        for line in lines
    ]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def markdown(lines: Sequence[Line], reference: str) -> str:
    """A table, a line a recipe, the best score first: means, and differences to the reference with their standard
    errors; those within noise are in brackets."""
    heads = ["recipe", "rate", "steps", "runs", "similarity", "prompts shown", "diversity kept", "score"]
    heads += [f"{head}, difference" for head in ("similarity", "diversity", "score")]
    rows = [
        [
            line.recipe,
            f"{line.values['learning_rate']:g}" if "learning_rate" in line.values else "",
            str(line.steps),
            str(line.runs) + (f", {line.diverged} diverged" if line.diverged else ""),
            *(f"{line.figures[name].mean:.3f}" for name in ("subject", "prompt", "kept", "score")),
            *(
                "" if line.recipe == reference else _difference(line.figures[name])
                for name in ("subject", "kept", "score")
            ),
        ]
        for line in sorted(lines, key=lambda line: -line.figures["score"].mean)
    ]
    return _table(heads, rows)


def curves(lines: Sequence[Line]) -> str:
    """A table, a line a recipe and a column for each number of steps: similarity; diversity kept."""
    steps = sorted({line.steps for line in lines})
    cells = {
        (line.recipe, line.steps): "; ".join(f"{line.figures[name].mean:.3f}" for name in ("subject", "kept"))
        for line in lines
    }
    recipes = dict.fromkeys(line.recipe for line in lines)
    rows = [[recipe, *(cells.get((recipe, step), "") for step in steps)] for recipe in recipes]
    return _table(["recipe", *map(str, steps)], rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def _difference(figure: Figure) -> str:
    if math.isnan(figure.error):
        return ""
    said = f"{figure.difference:+.3f} ± {figure.error:.3f}"
    return f"({said})" if figure.is_noise else said
