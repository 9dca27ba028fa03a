"""The main job end to end on a laptop: no AWS account, no GPU, no network.

An embedded S3 server holds pictures of a toy that the base model has never seen and takes the trained model; the job
itself is ``container/train.py`` as SageMaker runs it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

import launcher
from dreambooth_sm import storage, toybox
from dreambooth_sm.gallery import grid
from dreambooth_sm.methods import lora
from dreambooth_sm.quiet import quiet_libraries
from dreambooth_sm.report import parse_metrics
from dreambooth_sm.storage import S3Uri

SUBJECT = "teal_hatter"
INSTANCE_PROMPT = "photo of zwx toy"
CLASS_PROMPT = "photo of a toy"
BUCKET = "dreambooth-demo"
PICTURES = S3Uri(BUCKET, f"images/{SUBJECT}")
MODEL = S3Uri(BUCKET, f"models/{SUBJECT}")
TRAINING_STEPS = 200
# What suits the toybox: class images close to what its models know.
SETTINGS: dict[str, Any] = {
    "resolution": 128,
    "num_class_images": 32,
    "sample_batch_size": 8,
    "sample_guidance_scale": 1.5,
    "train_batch_size": 4,
    "prior_loss_weight": 1.0,
    "fidelity_encoders": "judge",
    "validation_prompt": f"{INSTANCE_PROMPT}|{INSTANCE_PROMPT} on the beach",
    "num_validation_images": 2,
    "validation_guidance_scale": 3.0,
    "seed": 0,
}
# By base model: rates for their few parameters.
LEARNING: dict[str, dict[str, Any]] = {
    toybox.NAME: {"learning_rate": 2e-4},
    toybox.FLOW_NAME: {"method": lora.METHOD.name, "lora_targets": "linear", "learning_rate": 2e-3},
}
# Part of the way that the pictures have to come from the base model's to the real ones.
ENOUGH = 0.7
_PLACES = ("", "on the beach", "in the snow", "at night", "in a room")


class DemoFailed(RuntimeError):  # noqa: N818
    """The demo ran and did not show what it has to show."""


def main(output: Path, base_model: str = toybox.NAME) -> None:
    """Runs the demo and prints what came of it.

    Args:
        output: directory for the picture grid; the job's tree lies in it as well.
        base_model: one of those that come with the project.

    Raises:
        DemoFailed, JobFailed, StorageError: where anything of it failed.
    """
    started = time.monotonic()
    quiet_libraries()

    work = output / time.strftime("job-%Y%m%d-%H%M%S")
    said: list[str] = []
    with launcher.local_services() as services:
        services.client().create_bucket(Bucket=BUCKET)
        storage.upload_directory(toybox.PHOTOS, PICTURES)
        with tqdm(total=TRAINING_STEPS, desc="starting", unit="step", leave=False) as bar:

            def show(line: str) -> None:
                said.append(line)
                _show(line, bar)

            job = launcher.fit(
                str(PICTURES),
                instance_prompt=INSTANCE_PROMPT,
                class_prompt=CLASS_PROMPT,
                base_model=base_model,
                output=str(MODEL),
                directory=work / "opt-ml",
                log=show,
                max_train_steps=TRAINING_STEPS,
                **SETTINGS,
                **LEARNING[base_model],
            )
        files = storage.list_objects(MODEL)
        trained = work / "trained"
        storage.download_directory(MODEL, trained)
    drawn = draw_grid(toybox.SHIPPED[base_model], trained, output / "before-after.png")
    history = job.history()
    before, after = [pairs for line in said if "candidate" in (pairs := parse_metrics(line))]

    print(f"\nmodel     {MODEL}")
    for key, size in files.items():
        print(f"          {size:>10,} bytes  {key}")
    print(f"loss      {history[0]['loss']:.4f} at step 1, {history[-1]['loss']:.4f} at step {TRAINING_STEPS}")
    for name, meaning in (
        ("subject", "similarity to the subject"),
        ("prompt", "of what the prompts name is in the pictures"),
        ("prior", "similarity of class pictures to the subject"),
        ("diversity", "of class pictures"),
    ):
        print(f"{name:9} {float(before[name]):.2f} before, {float(after[name]):.2f} after: {meaning}")
    print(*(line for line in said if line.startswith("verdict")), sep="\n")
    print(f"pictures  {drawn}: the subject, before, after, and class pictures after")
    print(f"report    {trained / 'report.html'}: pictures, verdict, curves and settings")
    print("seconds   " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in job.seconds.items()))
    print(f"          {time.monotonic() - started:.1f} in all")
    if float(after["subject"]) < ENOUGH:
        raise DemoFailed(f"the subject was not learned: similarity {after['subject']}, and {ENOUGH} is wanted")


def _show(line: str, bar: tqdm[Any]) -> None:
    pairs = parse_metrics(line)
    if pairs.get("state") == "started":
        bar.set_description(pairs["phase"])
    elif "step" in pairs and "loss" in pairs:
        bar.update(int(pairs["step"]) - bar.n)
        bar.set_postfix(loss=pairs["loss"])
    elif line.startswith(("error", "warning")):
        bar.write(line)


def _read_trained(base: Path, trained: Path) -> Any:
    """The pipeline of what a job left: a whole model, or a LoRA beside the base model."""
    import torch
    from diffusers import DiffusionPipeline

    from dreambooth_sm.stored.locate import INDEX

    is_whole = (trained / INDEX).is_file()
    pipeline = DiffusionPipeline.from_pretrained(trained if is_whole else base, dtype=torch.float32)
    if not is_whole:
        pipeline.load_lora_weights(trained, weight_name=lora.FILE)
    return pipeline


def draw_grid(base: Path, trained: Path, target: Path) -> Path:
    """Rows of five: the subject; the instance prompt in some places, drawn by the base model and by the trained one;
    and the class prompt, drawn by the trained one."""
    import torch
    from diffusers import DiffusionPipeline

    from dreambooth_sm.sampling import draw

    rows = [Image.open(path, formats=["PNG"]).convert("RGB") for path in sorted(toybox.PHOTOS.iterdir())]
    instances = [f"{INSTANCE_PROMPT} {place}".strip() for place in _PLACES]
    before, after = DiffusionPipeline.from_pretrained(base, dtype=torch.float32), _read_trained(base, trained)
    for pipeline, prompts in ((before, instances), (after, instances), (after, [CLASS_PROMPT] * len(_PLACES))):
        for seed, prompt in enumerate(prompts):
            rows += next(draw(pipeline, prompt, [seed], resolution=toybox.SIDE, guidance=3.0))
    grid(rows, len(_PLACES)).save(target)
    return target
