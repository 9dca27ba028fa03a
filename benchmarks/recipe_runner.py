"""Runs recipes, one after the other, in the process of one worker of :mod:`benchmarks.recipes`.

    python -m benchmarks.recipe_runner [--a-place 4] [--of-class 64] [--drawing-steps 25] [--eager]

Reads a run a line, and answers each with a line: its rows, and what went wrong where something did.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import DEVICE, PROMPTS
from benchmarks.recipe_list import COMMON, Recipe
from benchmarks.studio import (
    CLASS_GUIDANCE,
    Case,
    Drawn,
    draw_together,
    figures,
    make_case,
    prompts,
    save_pictures,
    seeds_of_class,
    seeds_to_train_on,
    train_on,
)
from dreambooth_sm.errors import UserError
from dreambooth_sm.fidelity import Fidelity, load_encoders, measure, measure_real, score, verdict
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.memory import free_memory
from dreambooth_sm.methods import METHODS, Trainable
from dreambooth_sm.models import PretrainedModel, load_base
from dreambooth_sm.planning.cards import detect_card
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.quiet import quiet_libraries
from dreambooth_sm.training.loop import Trainer, TrainingError


class Runner:
    """Trains and judges, with a base model and pictures that all runs share.

    Args:
        work: directory for pictures.
        a_place: judged pictures of the subject in each place.
        of_class: judged pictures of the class.
        eager: never to capture a training step as a CUDA graph.
    """

    def __init__(
        self, work: Path, *, a_place: int = 4, of_class: int = 64, drawing_steps: int = 25, eager: bool = False
    ) -> None:
        quiet_libraries()
        self._work, self._a_place, self._of_class, self._drawing_steps = work, a_place, of_class, drawing_steps
        self._fixed: dict[str, Any] = {"cuda_graph": False} if eager else {}
        self._base = load_base(Hyperparameters.parse(COMMON))
        self._encoders = load_encoders(device=DEVICE)
        self._card = detect_card()
        self._plain = make_plan(Hyperparameters.parse(COMMON), self._card)
        # Each is made once.
        self._class_pictures = functools.cache(self._make_class_pictures)
        self._case = functools.cache(self._make_case)
        self._of_base: dict[tuple[str, int], Fidelity] = {}

    def run(self, recipe: Recipe, toy: str, seed: int) -> list[dict[str, Any]]:
        """One row each time that the weights are judged.

        Raises:
            TrainingError: where the weights are not finite any more.
            UserError: for values that can't work.
        """
        started = time.perf_counter()
        h = Hyperparameters.parse(
            {**COMMON, **self._fixed, **recipe.values, "seed": seed, "max_train_steps": recipe.steps}
        )
        plan = make_plan(h, self._card)
        case = self._case(toy, seed, h.num_class_images)
        steps = max((recipe.steps, *recipe.judged))
        trainable = METHODS[h.method].attach(copy.deepcopy(self._base), plan, h, seed)
        copied = trainable.drawable(torch.float32)  # before training, as jobs do
        trainer = train_on(case, trainable, h, plan, steps)
        rows = []
        try:
            prepared, training, judging = time.perf_counter() - started, 0.0, 0.0
            for until in sorted({recipe.steps, *recipe.judged}):
                started = time.perf_counter()
                _train(trainer, until)
                training, started = training + time.perf_counter() - started, time.perf_counter()
                _copy_weights(trainer, copied)
                row = self._judge(case, copied.model, plan)
                judging += time.perf_counter() - started
                seconds = {"prepared": prepared, "training": training, "judging": judging}
                rows.append({"steps": until, "is_last": until == recipe.steps, **row} | _rounded(seconds))
        finally:
            trainer.make_step.close()
            del trainer, trainable, copied
            free_memory()
        return rows

    def _judge(self, case: Case, model: PretrainedModel, plan: Plan) -> dict[str, Any]:
        found, base = self._measure(case, self._draw(model, plan, case.seed)), self._base_figures(case)
        words = verdict(found, base, measure_real(self._encoders, case.training))
        return {
            **figures(found),
            "kept": round((found.diversity or 0.0) / (base.diversity or 1.0), 4),
            "drift": round((found.prior or 0.0) - (base.prior or 0.0), 4),
            "score": round(score(found, base), 4),
            "verdict": words.word,
            "reason": words.reason,
        }

    def _base_figures(self, case: Case) -> Fidelity:
        name = (case.subject, case.seed)
        if name not in self._of_base:
            self._of_base[name] = self._measure(case, self._draw(self._base, self._plain, case.seed))
        return self._of_base[name]

    def _measure(self, case: Case, drawn: Drawn) -> Fidelity:
        return measure(
            self._encoders,
            training=case.training,
            generated=drawn.subject,
            prompts=prompts(self._a_place),
            class_pictures=drawn.of_class,
        )

    def _draw(self, model: PretrainedModel, plan: Plan, seed: int) -> Drawn:
        """The same noise for every model."""
        of_subject = prompts(self._a_place)
        asked = [*of_subject, *[PROMPTS["class_prompt"]] * self._of_class]
        seeds = [10**4 * (seed + 1) + number for number in range(len(of_subject))]
        seeds += seeds_of_class(seed, self._of_class)
        pictures = draw_together(model, plan, asked, seeds, steps=self._drawing_steps)
        return Drawn(pictures[: len(of_subject)], pictures[len(of_subject) :])

    def _make_class_pictures(self, seed: int, count: int) -> tuple[Path, ...]:
        pictures = draw_together(
            self._base,
            self._plain,
            [PROMPTS["class_prompt"]] * count,
            seeds_to_train_on(seed, count),
            guidance=CLASS_GUIDANCE,
            steps=self._drawing_steps,
        )
        return save_pictures(pictures, self._work / f"class-{seed}-{count}")

    def _make_case(self, toy: str, seed: int, class_images: int) -> Case:
        return make_case(toy, seed, self._class_pictures(seed, class_images), self._work / str(class_images))


def _train(trainer: Trainer, until: int) -> None:
    while trainer.step < until:
        trainer.optimizer_step(trainer.rate_after(trainer.step))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def _copy_weights(trainer: Trainer, copied: Trainable) -> None:
    parameters = copied.parameters
    for name, value in trainer.weights_now():
        if not bool(value.isfinite().all()):
            raise TrainingError(f"{name} is not finite after step {trainer.step}")
        parameters[name].copy_(value)


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--a-place", type=int, default=4)
    parser.add_argument("--of-class", type=int, default=64)
    parser.add_argument("--drawing-steps", type=int, default=25)
    parser.add_argument("--eager", action="store_true")
    options = vars(parser.parse_args())
    # What libraries print goes to stderr: the answers are read by a program.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1 if DEVICE.type == "cuda" else torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder), **options)
        for line in sys.stdin:
            asked = json.loads(line)
            recipe = Recipe(asked["recipe"], asked["values"], asked["steps"], tuple(asked["judged"]))
            answer: dict[str, Any] = {"rows": []}
            try:
                answer["rows"] = runner.run(recipe, asked["toy"], asked["seed"])
            except (TrainingError, UserError) as error:
                answer["diverged" if isinstance(error, TrainingError) else "refused"] = str(error)
            except Exception as error:
                traceback.print_exc()
                answer["broken"] = f"{type(error).__name__}: {error}"[:500]
                answer["ends"] = isinstance(error, RuntimeError)  # the device may be in any state
            print(json.dumps(answer), file=answers)
            if answer.get("ends"):
                raise SystemExit(1)


if __name__ == "__main__":
    main()
