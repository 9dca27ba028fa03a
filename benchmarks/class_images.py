"""Class images: how fast they are made, cold and warm, beside diffusers' way of making them.

    python -m benchmarks.class_images [ours full_guidance batch_16 diffusers ...] [--count 50]
        [--write dreambooth_sm/planning/measured]

Stable Diffusion 1.5's architecture with random weights, 512 pixels. ``cold`` is the first call of a process: moving
the model to the device, loading kernels, and all pictures as a job keeps them. ``warm`` is as many other pictures
after that. ``diffusers`` is its script's way: PNDM, 50 steps, 4 pictures at a time, decoded and saved as JPEG; it
makes 16 pictures. One JSON line each, every variant in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import tempfile
import threading
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from benchmarks.common import PROMPTS, emit, in_fresh_processes, peaks, reset_peaks, sd15
from benchmarks.figures import add_write_option, write_figures
from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.data.prior import ClassImages
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.cards import detect_card
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.report import Reporter
from dreambooth_sm.sampling import make_sampler

EVERYWHERE = (float("inf"), 0.0)
VARIANTS = ("ours", "full_guidance", "batch_16", "diffusers")
PEER_PICTURES = 16


def run_ours(name: str, base: PretrainedModel, count: int, work: Path) -> dict[str, object]:
    plan = make_plan(Hyperparameters.parse(PROMPTS), detect_card())
    if name == "batch_16":
        plan = dataclasses.replace(plan, sample_batch_size=16)
    facts = base.family.facts
    if name == "full_guidance":
        drawing = dataclasses.replace(facts.drawing, guided=EVERYWHERE)
        setattr(type(base.family), "facts", dataclasses.replace(facts, drawing=drawing))  # noqa: B010 - a class's own
    subject = Subject((), "", PROMPTS["class_prompt"], work / "class", ())
    sizes = [(512, 512)] * count
    started = time.perf_counter()
    sampler = make_sampler(base, plan)
    images = ClassImages(
        sampler.pipeline,
        weights="random",
        draw_with=lambda: sampler,
        batch_size=plan.sample_batch_size,
        guidance=7.5,
        remote=None,
        scratch=work,
        shown=work / "shown",
        report=Reporter(io.StringIO()),
        stop=threading.Event(),
    )
    torch.cuda.synchronize()
    ready = time.perf_counter() - started
    images.complete(subject, sizes)
    cold = time.perf_counter() - started
    started = time.perf_counter()
    images.complete(subject, sizes, first=count)
    warm = time.perf_counter() - started
    return {
        "batch": plan.sample_batch_size,
        "steps": facts.drawing.class_steps,
        "ready_s": round(ready, 2),
        **times(count, cold, warm),
    }


def run_diffusers(base: PretrainedModel, work: Path) -> dict[str, object]:
    started = time.perf_counter()
    pipeline: StableDiffusionPipeline = base.pipeline().to("cuda", torch.float16)
    pipeline.set_progress_bar_config(disable=True)

    def make(first: int) -> float:
        for number in range(first, first + PEER_PICTURES, 4):
            for offset, picture in enumerate(pipeline([PROMPTS["class_prompt"]] * 4).images):
                picture.save(work / f"{number + offset}.jpg")
        return time.perf_counter()

    cold = make(0) - started
    started = time.perf_counter()
    warm = make(PEER_PICTURES) - started
    return {"batch": 4, "steps": 50, **times(PEER_PICTURES, cold, warm)}


def times(count: int, cold: float, warm: float) -> dict[str, object]:
    return {"pictures": count, "cold_s": round(cold, 2), "warm_s": round(warm, 2), "per_s": round(count / warm, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--count", type=int, default=50)
    add_write_option(parser)
    options = parser.parse_args()
    if len(options.variants) > 1:
        write = [f"--write={options.write}"] if options.write else []
        in_fresh_processes("benchmarks.class_images", options.variants, f"--count={options.count}", *write)
        return
    (name,) = options.variants
    base = sd15()
    reset_peaks()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        result = run_diffusers(base, work) if name == "diffusers" else run_ours(name, base, options.count, work)
    emit(variant=name, **result, **peaks())
    if options.write and name == "ours":
        command = f"python -m benchmarks.class_images {name} --count {options.count}"
        write_figures(options.write, "sd", {"class_images_per_s": float(str(result["per_s"]))}, by=command)


if __name__ == "__main__":
    main()
