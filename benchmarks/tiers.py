"""Each tier's plan under that card's memory: does it run, how fast, and how good is the predicted peak.

    python -m benchmarks.tiers [CARD ...] [--steps 100]

A large card stands in for the small ones: PyTorch's allocator is capped at what such a card leaves to a process, and
cards before Ampere get fp16 and neither flash nor cuDNN attention. Speeds are those of the card that it runs on.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import traceback
from pathlib import Path

# What cuBLAS takes on every card before Hopper; a Hopper card would add 24 MB a stream.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")

import torch

from benchmarks.common import (
    PROMPTS,
    describe,
    emit,
    in_fresh_processes,
    limit_memory,
    make_trainer,
    measure_steps,
    reset_peaks,
    sd15,
)
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.plan import find_card, make_plan

CARDS = ("H100", "A10G", "T4", "12GB", "10GB", "8GB", "6GB", "4GB")


def run_tier(name: str, steps: int, work: Path) -> dict[str, object]:
    base = sd15()  # before the cap: a job would load it on the CPU
    card = find_card(name)
    cap_gb = limit_memory(card)
    h = Hyperparameters.parse({**PROMPTS, "seed": 0})
    plan = make_plan(h, card)
    reset_peaks()
    started = time.perf_counter()
    trainer = make_trainer(base, plan, h, work, steps)
    torch.cuda.synchronize()
    setup = time.perf_counter() - started
    setup_peak = torch.cuda.max_memory_allocated() / 1e9
    reset_peaks()
    result = measure_steps(trainer, steps, profile=False)
    trainer.make_step.close()
    measured = float(result["peak_allocated_gb"])
    error = 100 * (plan.predicted_peak_gb - measured) / measured
    return {
        "cap_gb": round(cap_gb, 2),
        **describe(plan),
        "prediction_off_percent": round(error, 1),
        "setup_s": round(setup, 1),
        "setup_peak_gb": round(setup_peak, 2),
        **result,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="*", default=list(CARDS))
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    if len(options.cards) > 1:
        return in_fresh_processes("benchmarks.tiers", options.cards, f"--steps={options.steps}")
    name = options.cards[0]
    with tempfile.TemporaryDirectory() as folder:
        try:
            emit(card=name, **run_tier(name, options.steps, Path(folder)))
        except Exception as error:
            traceback.print_exc()
            emit(card=name, error=f"{type(error).__name__}: {error}"[:300])


if __name__ == "__main__":
    main()
