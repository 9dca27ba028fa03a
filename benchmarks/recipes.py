"""Which recipe teaches best? Methods, rates, steps, priors and optimizers on the toybox, subjects the base never saw.

    python -m benchmarks.recipes --out DIR [--workers N] [--minutes SEARCH COMPARISON] [--eager] [--only NAME ...]
                                 [--stages search compare] [--from DIR] [--subjects 6] [--seeds 3]
    python -m benchmarks.recipes --table DIR [--figure FILE.svg]
    python -m benchmarks.recipes --out DIR --stages try

Two stages, whose runs are lines of files in ``DIR``. ``search.jsonl``: a grid of learning rates for each way of
teaching, judged after several steps, on two subjects and a seed of its own. ``compare.jsonl``: what was found (in
``--from``, or else here), and other hyperparameters beside it, on all subjects and seeds. A recipe's values are
hyperparameters as a job takes them (``recipe_list.py``), and the plan is that of the device.

Workers are processes that share a GPU, or are dealt out to all there are. A GPU computes for several at once where
NVIDIA's MPS runs (``nvidia-cuda-mps-control -d`` before, ``echo quit | nvidia-cuda-mps-control`` after): two H200 with
``--workers 32`` made 896 runs of the comparison in 7.5 minutes. Runs whose lines stand in ``DIR`` are not run again.
After ``--minutes`` of a stage none is started any more; the most important ones come first.

``--stages try`` trains each recipe of the comparison for two steps, on few pictures: on a CPU, whether all of them run.

``--table`` prints the comparison in Markdown, and writes ``DIR/summary.json``: means and standard deviations over
subjects and seeds, and the mean of the differences to ``lora`` on the same subject and seed with its standard error.
Differences within noise are in brackets. ``--figure`` draws it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.recipe_figure import svg
from benchmarks.recipe_list import REFERENCE, SEARCHES, Recipe, recipes_to_compare, recipes_to_try
from benchmarks.recipe_table import as_json, choose, curves, final_lines, markdown, read_rows, summarise
from toybox.toys import HELD_OUT

STAGES = ("search", "compare", "try")
# Of the search; its seed is none of the comparison's.
SEARCHED_TOYS, SEARCHED_SEED = ("teal_hatter", "tiger_cat"), 100


@dataclass(frozen=True)
class Run:
    """A recipe on a subject and a seed."""

    recipe: Recipe
    toy: str
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.recipe.key, self.toy, self.seed

    def asked(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.name,
            "values": dict(self.recipe.values),
            "steps": self.recipe.steps,
            "judged": self.recipe.judged,
            "toy": self.toy,
            "seed": self.seed,
        }


class Worker:
    """A process that runs recipes, and is started again where one breaks it.

    Args:
        options: of :mod:`benchmarks.recipe_runner`.
        device: its GPU, as CUDA_VISIBLE_DEVICES names it; empty on a CPU.
        log: for what it prints.
    """

    def __init__(self, options: Sequence[str], device: str, log: Path) -> None:
        self._command = [sys.executable, "-m", "benchmarks.recipe_runner", *options]
        self._environment = {"CUDA_VISIBLE_DEVICES": device, "OMP_NUM_THREADS": "1"} if device else {}
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def run(self, run: Run) -> dict[str, Any]:
        """The answer of :mod:`benchmarks.recipe_runner`."""
        process = self._process or self._start()
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(json.dumps(run.asked()) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        ended = {"rows": [], "broken": f"it ended; see {self._log}", "ends": True}
        answer: dict[str, Any] = json.loads(line) if line else ended
        if answer.get("ends"):
            self.close()
        return answer

    def _start(self) -> subprocess.Popen[str]:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | self._environment,
            )
        return self._process

    def close(self) -> None:
        if self._process:
            assert self._process.stdin
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
            self._process = None


def run_all(runs: Sequence[Run], workers: Sequence[Worker], file: Path, minutes: float | None) -> None:
    """Appends the rows of all runs to a file; starts none after so many minutes, or where all that ran broke."""
    until = time.monotonic() + 60 * (minutes or float("inf"))
    waiting, lock, told = iter(runs), threading.Lock(), Counter[str]()

    def work(worker: Worker) -> None:
        while time.monotonic() < until and (told.keys() != {"broken"} or told["broken"] < 2 * len(workers)):
            with lock:
                run = next(waiting, None)
            if run is None:
                return
            started = time.monotonic()
            answer = worker.run(run)
            with lock:
                _note(run, answer, file, time.monotonic() - started, told)

    with ThreadPoolExecutor(len(workers)) as pool:
        for done in [pool.submit(work, worker) for worker in workers]:
            done.result()
    left = sum(1 for _ in waiting)
    print(f"{file.stem}: {dict(told)}, {left} not started", file=sys.stderr, flush=True)


def _note(run: Run, answer: dict[str, Any], file: Path, seconds: float, told: Counter[str]) -> None:
    """Writes down an answer; one that is of the machine and not of the recipe is told alone."""
    known = {**run.asked(), "key": run.recipe.key}
    rows = [{**known, **row, "seconds": round(seconds, 1)} for row in answer["rows"]]
    if "diverged" in answer:
        rows.append({**known, "error": answer["diverged"], "seconds": round(seconds, 1)})
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    kind = next((kind for kind in ("diverged", "refused", "broken") if kind in answer), "done")
    told[kind] += 1
    if kind in ("refused", "broken"):
        print(f"{kind}: {run.recipe.key}, {run.toy}, {run.seed}: {answer[kind]}", file=sys.stderr, flush=True)


def visible_devices() -> list[str]:
    """The GPUs, as CUDA_VISIBLE_DEVICES names them; an empty name where there are none."""
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(number) for number in range(count)])[:count] or [""]


def runs_of_search() -> Iterator[Run]:
    """The first searches first."""
    for search in SEARCHES:
        for recipe in search.recipes():
            for toy in SEARCHED_TOYS:
                yield Run(recipe, toy, SEARCHED_SEED)


def runs_to_compare(recipes: Sequence[Recipe], toys: Sequence[str], seeds: int) -> Iterator[Run]:
    """All of a recipe, then of the next."""
    for recipe in recipes:
        for seed in range(seeds):
            for toy in toys:
                yield Run(recipe, toy, seed)


def runs_of(stage: str, options: argparse.Namespace) -> Iterator[Run]:
    if stage == "search":
        return runs_of_search()
    if stage == "try":
        return runs_to_compare(list(recipes_to_try(2)), SEARCHED_TOYS[:1], 1)
    choices = choose(read_rows((options.source or options.out) / "search.jsonl"))
    return runs_to_compare(list(recipes_to_compare(choices)), list(HELD_OUT)[: options.subjects], options.seeds)


def missing(runs: Iterator[Run], file: Path, only: Sequence[str]) -> list[Run]:
    """Those that have no lines yet."""
    done = {(row["key"], row["toy"], row["seed"]) for row in read_rows(file)}
    return [run for run in runs if run.key not in done and (not only or run.recipe.name in only)]


def show(directory: Path, figure: Path | None) -> None:
    rows = read_rows(directory / "compare.jsonl")
    lines = final_lines(rows, REFERENCE)
    everything = summarise(rows, REFERENCE)
    on_the_way = [line for line in everything if line not in lines]
    choices = choose(read_rows(directory / "search.jsonl"))
    found = {name: {"values": choice.values, "steps": choice.steps} for name, choice in choices.items()}
    summary = {"reference": REFERENCE, "found": found, "recipes": as_json(lines), "on_the_way": as_json(on_the_way)}
    (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(markdown(lines, REFERENCE))
    if on_the_way:
        followed = {line.recipe for line in on_the_way}
        print("\nBy steps, similarity; diversity kept:\n")
        print(curves([line for line in everything if line.recipe in followed]))
    if figure:
        figure.write_text(svg(lines, REFERENCE), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["search", "compare"])
    parser.add_argument("--from", type=Path, dest="source", metavar="DIR")
    parser.add_argument("--workers", type=int, help="8 for each GPU, if left out")
    parser.add_argument("--minutes", type=float, nargs="+", help="of each stage")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of recipes")
    parser.add_argument("--subjects", type=int, default=len(HELD_OUT))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="train without CUDA graphs")
    parser.add_argument("--count", action="store_true", help="print how many runs there are, and run none")
    parser.add_argument("--table", type=Path, metavar="DIR")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    if not options.table and not options.out:
        parser.error("name a directory with --out, or with --table")
    if options.minutes and len(options.minutes) != len(options.stages):
        parser.error("--minutes: one number for each of the stages")
    return options


def main() -> None:
    options = parse_arguments()
    if options.table:
        show(options.table, options.figure)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = ("1", "2", "2") if options.stages == ["try"] else ("4", "64", "25")
    told = [*zip(("--a-place", "--of-class", "--drawing-steps"), pictures, strict=True)]
    arguments = [word for pair in told for word in pair] + ["--eager"] * options.eager
    devices = visible_devices()
    workers = [
        Worker(arguments, devices[number % len(devices)], options.out / f"worker-{number}.log")
        for number in range(options.workers or sum(8 if device else 1 for device in devices))
    ]
    try:
        for number, stage in enumerate(options.stages):
            file = options.out / f"{stage}.jsonl"
            runs = missing(runs_of(stage, options), file, options.only)
            print(f"{stage}: {len(runs)} runs", file=sys.stderr, flush=True)
            if not options.count:
                run_all(runs, workers, file, options.minutes[number] if options.minutes else None)
    finally:
        for worker in workers:
            worker.close()
    if "compare" in options.stages and not options.count:
        show(options.out, options.figure)


if __name__ == "__main__":
    main()
