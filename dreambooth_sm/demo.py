"""The main job end to end on a laptop: no AWS account, no GPU, no network.

An embedded S3 server holds the example pictures and takes the model; the job itself is ``container/train.py`` as
SageMaker runs it.
"""

from __future__ import annotations

import time
from pathlib import Path

from tqdm import tqdm

from dreambooth_sm import storage
from dreambooth_sm.quiet import quiet_libraries
from dreambooth_sm.report import parse_metrics
from dreambooth_sm.storage import S3Uri

EXAMPLES = Path(__file__).parent / "examples"
INSTANCE_PROMPT = "photo of zwx toy"
CLASS_PROMPT = "photo of a toy"
BUCKET = "dreambooth-demo"
PICTURES = S3Uri(BUCKET, "images/duck_toy")
MODEL = S3Uri(BUCKET, "models/duck_toy")
STEPS = 150
RESOLUTION = 64
_SEEDS = [1, 2, 3, 4]


class DemoFailed(RuntimeError):  # noqa: N818
    """The demo ran and did not show what it has to show."""


def main(output: Path) -> None:
    """Runs the demo and prints what came of it.

    Args:
        output: directory for the picture grid; the job's tree lies in it as well.

    Raises:
        DemoFailed, JobFailed, StorageError: where anything of it failed.
    """
    started = time.monotonic()
    quiet_libraries()
    import launcher
    from dreambooth_sm.tiny import save_tiny_pipeline

    output.mkdir(parents=True, exist_ok=True)
    work = output / time.strftime("job-%Y%m%d-%H%M%S")
    base = save_tiny_pipeline(work / "base")
    with launcher.local_s3() as s3:
        s3.client().create_bucket(Bucket=BUCKET)
        storage.upload_directory(EXAMPLES / "duck_toy", PICTURES)
        with tqdm(total=STEPS, desc="starting", unit="step", leave=False) as bar:
            job = launcher.fit(
                str(PICTURES),
                instance_prompt=INSTANCE_PROMPT,
                class_prompt=CLASS_PROMPT,
                base_model=base,
                output=str(MODEL),
                directory=work / "opt-ml",
                log=lambda line: _show(line, bar),
                resolution=RESOLUTION,
                num_class_images=8,
                max_train_steps=STEPS,
                learning_rate=1e-3,
                save_steps=STEPS // 2,
                train_batch_size=2,
                use_ema=True,
                seed=0,
            )
        files = storage.list_objects(MODEL)
        trained = work / "trained"
        storage.download_directory(MODEL, trained)
    first, last = job.metrics[0]["loss"], job.metrics[-1]["loss"]
    if not last < first:
        raise DemoFailed(f"the loss did not fall: {first:.4f} at the start, {last:.4f} at the end")
    grid = draw_grid(base, trained, output / "before-after.png")

    print(f"\nmodel     {MODEL}")
    for key, size in files.items():
        print(f"          {size:>10,} bytes  {key}")
    print(f"loss      {first:.4f} at step 1, {last:.4f} at step {STEPS}")
    print(f"pictures  {grid}: the subject, before, after")
    print("          (the demo's base model has random weights: it shows the way a job takes, and draws noise)")
    print("seconds   " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in job.seconds.items()))
    print(f"          {time.monotonic() - started:.1f} in all")


def _show(line: str, bar: tqdm) -> None:
    pairs = parse_metrics(line)
    if pairs.get("state") == "started":
        bar.set_description(pairs["phase"])
    elif "step" in pairs and "loss" in pairs:
        bar.update(int(pairs["step"]) - bar.n)
        bar.set_postfix(loss=pairs["loss"])
    elif line.startswith(("error", "warning")):
        bar.write(line)


def draw_grid(base: Path, trained: Path, target: Path) -> Path:
    """Rows of four: the subject's pictures, the base model's and the trained model's for the instance prompt."""
    import torch
    from diffusers import StableDiffusionPipeline
    from PIL import Image

    from dreambooth_sm.data.pictures import View, crop, list_pictures, open_picture
    from dreambooth_sm.sampling import draw

    rows = [[crop(open_picture(p), RESOLUTION, View()) for p in list_pictures(EXAMPLES / "duck_toy")]]
    for directory in (base, trained):
        pipeline = StableDiffusionPipeline.from_pretrained(directory, safety_checker=None, dtype=torch.float32)
        batches = draw(pipeline, INSTANCE_PROMPT, _SEEDS, resolution=RESOLUTION, batch_size=len(_SEEDS), guidance=3.0)
        rows.append([picture for batch in batches for picture in batch])
    size = 192
    canvas = Image.new("RGB", (size * len(_SEEDS), size * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            canvas.paste(picture.resize((size, size), Image.Resampling.NEAREST), (x * size, y * size))
    canvas.save(target)
    return target
