"""Speed and memory of one training step with prior preservation, batch 1: SD 1.5 at 512 pixels, SDXL, Z-Image, FLUX.2
klein, FLUX.1, Qwen-Image, Chroma, SD 3.5 Medium or Krea 2 at 1,024.

    python -m benchmarks.train_step [VARIANT ...] [--model sdxl] [--peer path/to/train_dreambooth.py] [--steps 60]
        [--write dreambooth_sm/planning/measured]

One JSON line a variant. ``--peer`` runs diffusers' own script in the same settings, on the same pictures:
``train_dreambooth.py``, ``train_dreambooth_lora.py`` or, with another model, ``train_dreambooth_lora_sdxl.py`` or
``train_dreambooth_lora_z_image.py``, ``train_dreambooth_lora_flux2_klein.py``, ``train_dreambooth_lora_flux.py``,
``train_dreambooth_lora_qwen_image.py``, ``train_dreambooth_lora_sd3.py`` or ``train_dreambooth_lora_krea2.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from benchmarks.common import (
    MODELS,
    PROMPTS,
    describe,
    emit,
    hyperparameters,
    in_fresh_processes,
    make_pictures,
    make_trainer,
    measure_steps,
    reset_peaks,
)
from benchmarks.figures import add_write_option, step_figures, write_figures
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.planning.cards import detect_card
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.planning.memory import predict_peak_gb
from dreambooth_sm.planning.plan import Plan

UNET: dict[str, object] = {"train_text_encoder": False, "use_ema": False}
# The layers that diffusers' scripts train.
LORA: dict[str, object] = {"method": "lora", "lora_targets": "attention"}
# One picture a step.
LORA_ALONE = LORA | {"with_prior_preservation": False}
LORA_LINEAR: dict[str, object] = {"method": "lora", "lora_targets": "linear"}
HYPERNETWORK: dict[str, object] = {"method": "hypernetwork"}
TEXTUAL_INVERSION: dict[str, object] = {"method": "textual_inversion"}
PIVOTAL: dict[str, object] = {"method": "pivotal"}
BOTH: dict[str, object] = {"train_text_encoder": True, "use_ema": False}
# Variant: (hyperparameters, changes to the plan).
VARIANTS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "unet": (UNET, {}),
    "unet_in_backward": (UNET, {"update_in_backward": True, "max_grad_norm": None}),
    "unet_in_backward_compiled": (UNET | {"torch_compile": True}, {"update_in_backward": True, "max_grad_norm": None}),
    "unet_stochastic": (UNET, {"update_in_backward": True, "max_grad_norm": None, "weights": "stochastic"}),
    "unet_nchw": (UNET, {"update_in_backward": True, "max_grad_norm": None, "channels_last": False}),
    "unet_faithful_small": (UNET, {"update_in_backward": True, "max_grad_norm": None, "gradient_checkpointing": True}),
    "unet_smallest": (
        UNET,
        {"update_in_backward": True, "max_grad_norm": None, "gradient_checkpointing": True, "weights": "stochastic"},
    ),
    "unet_4bit": (
        UNET,
        {
            "update_in_backward": True,
            "max_grad_norm": None,
            "gradient_checkpointing": True,
            "weights": "stochastic",
            "state_bits": 4,
        },
    ),
    "unet_fp16_faithful_small": (
        UNET | {"mixed_precision": "fp16"},
        {"update_in_backward": True, "max_grad_norm": None, "gradient_checkpointing": True},
    ),
    "unet_fp16_smallest": (
        UNET | {"mixed_precision": "fp16"},
        {"update_in_backward": True, "max_grad_norm": None, "gradient_checkpointing": True, "weights": "stochastic"},
    ),
    "unet_reference": (UNET | {"optimizer": "adamw"}, {}),
    "unet_reference_eager": (UNET | {"optimizer": "adamw", "cuda_graph": False}, {}),
    "unet_flash": (UNET | {"attention": "flash_attention"}, {}),
    "unet_ema_on_cpu": (UNET | {"use_ema": True}, {"ema": "cpu"}),
    "both": (BOTH, {}),
    "both_in_backward": (BOTH, {"update_in_backward": True, "max_grad_norm": None}),
    "both_smallest": (
        BOTH,
        {"update_in_backward": True, "max_grad_norm": None, "gradient_checkpointing": True, "weights": "stochastic"},
    ),
    "lora": (LORA, {}),
    "lora_small": (LORA, {"gradient_checkpointing": True}),
    "lora_alone": (LORA_ALONE, {}),
    "lora_alone_small": (LORA_ALONE, {"gradient_checkpointing": True}),
    "lora_alone_nf4": (LORA_ALONE | {"base_weights": "nf4"}, {"gradient_checkpointing": True}),
    "lora_linear": (LORA_LINEAR, {}),
    "lora_linear_small": (LORA_LINEAR, {"gradient_checkpointing": True}),
    "lora_linear_int8": (LORA_LINEAR | {"base_weights": "int8"}, {"gradient_checkpointing": True}),
    "lora_linear_nf4": (LORA_LINEAR | {"base_weights": "nf4"}, {"gradient_checkpointing": True}),
    "lora_text_encoder": (LORA | {"train_text_encoder": True}, {}),
    "lora_text_encoder_small": (LORA | {"train_text_encoder": True}, {"gradient_checkpointing": True}),
    "hypernetwork": (HYPERNETWORK, {}),
    "hypernetwork_small": (HYPERNETWORK, {"gradient_checkpointing": True}),
    "textual_inversion": (TEXTUAL_INVERSION, {}),
    "textual_inversion_small": (TEXTUAL_INVERSION, {"gradient_checkpointing": True}),
    "pivotal": (PIVOTAL, {}),
    "pivotal_small": (PIVOTAL, {"gradient_checkpointing": True}),
    "everything": ({"train_text_encoder": True, "use_ema": True}, {}),
}
# Those that the others are measured with.
OTHERS_VARIANTS = {
    "sdxl": (*(name for name in VARIANTS if name.startswith("unet")), "lora", "lora_small", "lora_linear"),
    **dict.fromkeys(
        ("z_image", "flux2_klein", "flux1", "qwen_image", "chroma", "sd35_medium", "krea2"),
        ("lora", "lora_small", "lora_alone", "lora_alone_small", "lora_alone_nf4", "lora_linear"),
    ),
}
# The variants that estimates are made from, and what their figures are called; of adapters, where they lie beside the
# layers that a job adapts by default. `lean` is a rung that no card of benchmarks.tiers gets.
FIGURES = {
    "unet": "unet",
    "both": "both",
    "unet_faithful_small": "lean",
    "unet_reference_eager": "reference",
    "unet_reference": "reference_graph",
    "hypernetwork_small": "small",
    "lora": "roomy",
    "lora_small": "small",
    "lora_linear": "roomy",
    "lora_linear_small": "small",
    "lora_linear_int8": "tight",
    "lora_linear_nf4": "tiny",
    "textual_inversion": "roomy",
    "textual_inversion_small": "small",
    "pivotal": "roomy",
    "pivotal_small": "small",
}
_PRIOR = ["--with_prior_preservation"]
_LORA = ["--mixed_precision=bf16", "--rank=16", *_PRIOR]
# Z-Image's script of 0.42 fails with prior preservation: one picture a step, as `lora_alone`.
_ALONE = ["--mixed_precision=bf16", "--rank=16", "--cache_latents"]
_FLOW = {"diffusers_lora_alone": _ALONE, "diffusers_lora_alone_small": [*_ALONE, "--gradient_checkpointing"]}
# SD 3's script of 0.42 fails with cached latents under bf16: it encodes a picture in each step.
_SD3 = {name: [option for option in options if option != "--cache_latents"] for name, options in _FLOW.items()}
# diffusers' settings of the same jobs, by script.
PEERS = {
    "train_dreambooth": {
        "diffusers_a": ["--mixed_precision=fp16", "--use_8bit_adam", "--gradient_checkpointing", *_PRIOR],
        "diffusers_b": ["--mixed_precision=bf16", *_PRIOR],
        "diffusers_c": ["--mixed_precision=bf16", "--train_text_encoder", *_PRIOR],
    },
    "train_dreambooth_lora": {"diffusers_lora": _LORA, "diffusers_lora_small": [*_LORA, "--gradient_checkpointing"]},
    "train_dreambooth_lora_sdxl": {"diffusers_lora": _LORA},
    "train_dreambooth_lora_z_image": _FLOW,
    "train_dreambooth_lora_flux2_klein": _FLOW,
    "train_dreambooth_lora_qwen_image": _FLOW,
    "train_dreambooth_lora_flux": _FLOW,
    "train_dreambooth_lora_krea2": _FLOW,
    "train_dreambooth_lora_sd3": _SD3,
}


def plan_for(model: str, wishes: dict[str, object], changes: dict[str, object]) -> tuple[Hyperparameters, Plan]:
    h = hyperparameters(model, **wishes)
    plan = dataclasses.replace(make_plan(h, detect_card()), **changes)  # type: ignore[arg-type]
    return h, dataclasses.replace(plan, predicted_peak_gb=predict_peak_gb(plan, h))


def run_variant(name: str, model: str, steps: int, work: Path) -> dict[str, object]:
    h, plan = plan_for(model, *VARIANTS[name])
    base = MODELS[model]()
    reset_peaks()
    started = time.perf_counter()
    trainer = make_trainer(base, plan, h, work, steps)
    torch.cuda.synchronize()
    setup = time.perf_counter() - started
    reset_peaks()
    result = measure_steps(trainer, steps)
    trainer.make_step.close()
    whole = setup + float(result["warm_up_s"]) + (800 - 6) * float(result["ms_per_step"]) / 1e3
    return {**describe(plan), "setup_s": round(setup, 1), "s_of_800_steps": round(whole, 1), **result}


def run_peer(name: str, script: Path, model_name: str, steps: int, work: Path) -> None:
    """diffusers' script in a process of its own, timed from inside by ``benchmarks.peer``."""
    model = work / model_name
    h = hyperparameters(model_name)
    if not model.is_dir():
        base = MODELS[model_name]()
        base.save(model, torch.bfloat16 if base.family.facts.overflows else torch.float32)
    make_pictures(work / "instance", 5, h.resolution)
    make_pictures(work / "class", 7, h.resolution)
    command = [sys.executable, "-m", "benchmarks.peer", name, str(script), str(steps)]
    options = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": work / "instance",
        "class_data_dir": work / "class",
        **PROMPTS,
        "num_class_images": 7,
        "resolution": h.resolution,
        "train_batch_size": 1,
        "learning_rate": 2e-6,
        "max_train_steps": steps + 20,
        "output_dir": work / "peer",
        "prior_loss_weight": 0.5,
        "seed": 0,
    }
    command += [*(f"--{key}={value}" for key, value in options.items()), *PEERS[script.stem][name]]
    subprocess.run(command, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*")
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    add_write_option(parser)
    options = parser.parse_args()
    model = options.model
    variants = options.variants or OTHERS_VARIANTS.get(model, [*VARIANTS])
    if len(variants) > 1:
        write = [f"--write={options.write}"] if options.write else []
        in_fresh_processes("benchmarks.train_step", variants, f"--steps={options.steps}", f"--model={model}", *write)
    with tempfile.TemporaryDirectory() as folder:
        for name in variants if len(variants) == 1 else ():
            try:
                result = run_variant(name, model, options.steps, Path(folder))
                emit(variant=name, model=model, **result)
                h = hyperparameters(model, **VARIANTS[name][0])
                usual = hyperparameters(model, method=h.method).lora_targets
                if options.write and name in FIGURES and h.lora_targets == usual:
                    command = f"python -m benchmarks.train_step {name} --model {model} --steps {options.steps}"
                    figures = step_figures(h.method, FIGURES[name], result)
                    write_figures(options.write, h.architecture, figures, by=command)
            except Exception as error:
                traceback.print_exc()
                emit(variant=name, model=model, error=f"{type(error).__name__}: {error}"[:300])
        for name in PEERS[options.peer.stem] if options.peer else ():
            run_peer(name, options.peer, model, options.steps, Path(folder))


if __name__ == "__main__":
    main()
