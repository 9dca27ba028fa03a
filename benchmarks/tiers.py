"""Each tier's plan under that card's memory: does it run, how fast, and how good is the predicted peak.

    python -m benchmarks.tiers [CARD ...] [--steps 100] [--model sdxl] [--method hypernetwork]
        [--lora-targets attention] [--text-encoder] [--write dreambooth_sm/planning/measured]

A large card stands in for the small ones: PyTorch's allocator is capped at what such a card leaves to a process, and
cards before Ampere get fp16 and neither flash nor cuDNN attention. Speeds are those of the card that it runs on. A
batch of class images is drawn first, in few steps, for the peak of that.
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
    MODELS,
    PROMPTS,
    describe,
    emit,
    hyperparameters,
    in_fresh_processes,
    limit_memory,
    make_trainer,
    measure_steps,
    reset_peaks,
)
from benchmarks.figures import add_write_option, step_figures, write_figures
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.cards import find_card
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.planning.memory import sampling_peak_gb
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.sampling import draw, make_sampler

CARDS = {
    "sd15": ("H100", "A10G", "T4", "12GB", "10GB", "8GB", "6GB", "4GB"),
    "sdxl": ("H100", "A100-80", "A100-40", "L40S", "A10G", "L4", "T4", "12GB"),
    "z_image": ("H100", "A100-40", "L40S", "A10G", "L4"),
    "sd35_medium": ("H100", "A100-40", "L40S", "A10G", "L4", "12GB", "8GB", "6GB"),
    "chroma": ("H200", "H100", "A100-40", "L40S", "A10G", "L4", "12GB"),
    "flux1": ("H200", "H100", "A100-40", "L40S", "A10G", "L4", "12GB"),
    "flux2_klein": ("H100", "A100-40", "L40S", "A10G", "L4", "12GB", "8GB"),
    "krea2": ("H200", "H100", "A100-40", "L40S", "A10G", "L4"),
    "qwen_image": ("H100", "A100-40", "L40S", "A10G", "L4"),
}


def sampling_peak(base: PretrainedModel, plan: Plan, h: Hyperparameters) -> dict[str, object]:
    """Peak memory of one batch of class images, decoded."""
    seeds = list(range(plan.sample_batch_size))
    reset_peaks()
    pipeline = make_sampler(base, plan, [PROMPTS["class_prompt"]])
    next(draw(pipeline, PROMPTS["class_prompt"], seeds, resolution=h.resolution, batch_size=len(seeds), steps=3))
    return {
        "sample_batch_size": plan.sample_batch_size,
        "predicted_sampling_gb": round(sampling_peak_gb(plan.sample_batch_size, h), 2),
        "sampling_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }


def run_tier(name: str, model: str, wishes: dict[str, object], steps: int, work: Path) -> dict[str, object]:
    base = MODELS[model]()  # before the cap: a job would load it on the CPU
    card = find_card(name)
    cap_gb = limit_memory(card)
    h = hyperparameters(model, **wishes)
    plan = make_plan(h, card)
    sampling = sampling_peak(base, plan, h)
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
        **sampling,
        "prediction_off_percent": round(error, 1),
        "setup_s": round(setup, 1),
        "setup_peak_gb": round(setup_peak, 2),
        **result,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="*")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--method", choices=METHODS, default="full")
    parser.add_argument("--lora-targets", help="other layers than jobs adapt by default, such as those of a peer")
    parser.add_argument("--text-encoder", action="store_true", help="train it as well, whatever the plan would do")
    add_write_option(parser)
    options = parser.parse_args()
    cards = options.cards or CARDS[options.model]
    if len(cards) > 1:
        write = [f"--write={options.write}"] if options.write else []
        return in_fresh_processes(
            "benchmarks.tiers",
            cards,
            f"--steps={options.steps}",
            f"--model={options.model}",
            f"--method={options.method}",
            *([f"--lora-targets={options.lora_targets}"] if options.lora_targets else []),
            *(["--text-encoder"] if options.text_encoder else []),
            *write,
        )
    name = cards[0]
    wishes: dict[str, object] = {"method": options.method}
    if options.lora_targets:
        wishes["lora_targets"] = options.lora_targets
    if options.text_encoder:
        wishes["train_text_encoder"] = True
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = run_tier(name, options.model, wishes, options.steps, Path(folder))
            emit(card=name, model=options.model, **{**wishes, **result})
            if options.write and not options.text_encoder and not options.lora_targets:
                h = hyperparameters(options.model)
                command = f"python -m benchmarks.tiers {name} --model {options.model} --steps {options.steps}"
                command += "" if options.method == "full" else f" --method {options.method}"
                figures = step_figures(options.method, str(result["tier"]), result)
                write_figures(options.write, h.architecture, figures, by=command)
        except Exception as error:
            traceback.print_exc()
            emit(card=name, model=options.model, error=f"{type(error).__name__}: {error}"[:300])


if __name__ == "__main__":
    main()
