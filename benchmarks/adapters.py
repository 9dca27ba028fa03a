"""Speed and memory of adapters: kinds, layers, and recomputation, at the model's resolution with one class image.

    python -m benchmarks.adapters [--model sdxl] [--steps 20] [--variants lora dora ...] [--targets attention ...]
        [--base-weights plain int8 nf4] [--text-encoder] [--write dreambooth_sm/planning/measured]

One JSON line each, all in one process. ``implied_gb`` is the figure of activations with which the plan would have
predicted the peak; ``--write`` writes it down.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import traceback
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.common import MODELS, describe, emit, hyperparameters, make_trainer, measure_steps, reset_peaks
from benchmarks.figures import add_write_option, write_figures
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.memory import free_memory
from dreambooth_sm.methods import METHODS
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.cards import detect_card
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.planning.figures import figure

FIELDS = Hyperparameters.model_fields


def run(base: PretrainedModel, model: str, steps: int, checkpoints: bool, **wishes: object) -> dict[str, Any]:
    """One measurement; the base model is as it was before, but for its precision."""
    h = hyperparameters(model, method="lora", gradient_checkpointing=checkpoints, **wishes)
    name = METHODS[h.method].activations(h) + ("checkpointed_gb" if checkpoints else "activations_gb")
    rows = h.train_batch_size * (2 if h.prior_preservation else 1) * (h.resolution / 512) ** 2
    plan = make_plan(h, detect_card())
    with tempfile.TemporaryDirectory() as folder:
        reset_peaks()
        before = torch.cuda.memory_allocated() / 1e9  # workspaces of streams that earlier runs captured on
        trainer = make_trainer(base.with_parts({}), plan, h, Path(folder), steps)
        reset_peaks()
        result = measure_steps(trainer, steps, profile=False)
        trainer.make_step.close()
        for part in base.modules.values():
            part.to("cpu")
    result["peak_allocated_gb"] = round(float(result["peak_allocated_gb"]) - before, 2)
    implied = figure(h.architecture, name) + (result["peak_allocated_gb"] - plan.predicted_peak_gb) / rows
    return {"figure": name, "implied_gb": round(implied, 3), **describe(plan), **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--variants", nargs="+", default=list(get_args(FIELDS["lora_variant"].annotation)))
    parser.add_argument("--targets", nargs="+", default=list(get_args(FIELDS["lora_targets"].annotation)))
    parser.add_argument("--base-weights", nargs="+", default=["plain"])
    parser.add_argument("--text-encoder", action="store_true", help="adapters of the text encoders as well")
    add_write_option(parser)
    options = parser.parse_args()
    base = MODELS[options.model]()
    family = base.family.facts.name
    runs = itertools.product(options.variants, options.targets, options.base_weights, (False, True))
    for variant, targets, base_weights, checkpoints in runs:
        wishes = {"lora_variant": variant, "lora_targets": targets, "train_text_encoder": options.text_encoder}
        wishes["base_weights"] = base_weights
        try:
            result = run(base, options.model, options.steps, checkpoints, **wishes)
            emit(model=options.model, **{**wishes, **result})
            if options.write and not options.text_encoder and base_weights == "plain":
                command = f"python -m benchmarks.adapters --model {options.model} --variants {variant}"
                command += f" --targets {targets}"
                write_figures(options.write, family, {result["figure"]: result["implied_gb"]}, by=command)
        except Exception as error:
            traceback.print_exc()
            emit(model=options.model, **wishes, checkpoints=checkpoints, error=f"{type(error).__name__}: {error}"[:300])
        free_memory()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
