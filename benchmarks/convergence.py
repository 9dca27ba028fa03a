"""Do the fast plans learn as plain AdamW in fp32 does? Every plan on the small model, same data, order and noise.

    python -m benchmarks.convergence [PLAN ...] [--steps 500]

One JSON line a plan. ``distance_percent`` is the mean distance of the plan's losses from the reference's, step by step,
as a share of what the reference has learned; ``final_percent`` the same of the means over the last tenth.
``interrupted`` says whether a job that was stopped at a random step and resumed had the same losses, bit for bit.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from benchmarks.common import PROMPTS, emit, make_trainer, plan_of_rung
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS
from dreambooth_sm.models import load_base
from dreambooth_sm.planning.ladder import Rung
from dreambooth_sm.quiet import quiet_libraries
from dreambooth_sm.training.checkpoint import latest_checkpoint
from dreambooth_sm.training.loop import Trainer
from tests.helpers.tiny import save_tiny_pipeline

PLANS = {rung.name: rung for rung in METHODS["full"].ladder}


def trainer(rung: Rung | None, precision: str, steps: int, work: Path) -> Trainer:
    """On the small model; the reference for no rung. UNet alone, so that all losses are of one kind."""
    if not (work / "base").is_dir():
        save_tiny_pipeline(work / "base", vae_levels=2)
    h = Hyperparameters.parse(
        {
            **PROMPTS,
            "pretrained_model_name_or_path": str(work / "base"),
            "resolution": 64,
            "learning_rate": 3e-4,
            "seed": 0,
        }
    )
    plan = plan_of_rung(h, rung, precision)
    return make_trainer(load_base(h), plan, h, work, steps)


def run(trainer: Trainer, steps: int) -> list[float]:
    return [float(trainer.optimizer_step(trainer.h.learning_rate).total) for _ in range(steps)]


def interrupted(rung: Rung, precision: str, steps: int, work: Path) -> list[float]:
    """The losses of a job that is stopped at a random step, and of the one that is resumed."""
    at = random.Random(0).randrange(1, steps)
    first = trainer(rung, precision, steps, work)
    losses = run(first, at)
    first.save(work / "checkpoints" / rung.name / precision)
    first.finish()
    second = trainer(rung, precision, steps, work)
    checkpoint = latest_checkpoint(work / "checkpoints" / rung.name / precision)
    assert checkpoint is not None
    second.resume(checkpoint)
    losses += run(second, steps - at)
    second.finish()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="*", default=list(PLANS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--precisions", nargs="*", default=["bf16", "fp16"])
    options = parser.parse_args()
    quiet_libraries()
    tenth = options.steps // 10
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        reference = run(trainer(None, "fp32", options.steps, work), options.steps)
        learned = sum(reference[:tenth]) / tenth - sum(reference[-tenth:]) / tenth
        for name in options.plans:
            for precision in options.precisions:
                losses = run(trainer(PLANS[name], precision, options.steps, work), options.steps)
                apart = [abs(a - b) for a, b in zip(losses, reference, strict=True)]
                emit(
                    plan=name,
                    precision=precision,
                    steps=options.steps,
                    learned=round(learned, 4),
                    distance_percent=round(100 * sum(apart) / len(apart) / learned, 2),
                    final_percent=round(100 * (sum(losses[-tenth:]) - sum(reference[-tenth:])) / tenth / learned, 2),
                    interrupted_is_the_same=interrupted(PLANS[name], precision, options.steps, work) == losses,
                )


if __name__ == "__main__":
    main()
