"""The evaluation of the DreamBooth paper (Ruiz et al. 2023, section 4.2) on what jobs left, with real encoders.

    python -m benchmarks.dreambench DATASET MODELS [--base MODEL] [--dino facebook/dinov2-base]
        [--clip openai/clip-vit-base-patch32] [--token zwx] [--pictures 4] [--steps 50] [--out DIR]

``DATASET`` is the paper's (github.com/google/dreambooth): a folder of pictures for each subject, and
``prompts_and_classes.txt``, whose 25 prompts for objects and for animals are drawn. ``MODELS`` has a folder for each
subject that was trained, by the same name, with what its job left: a pipeline, or an adapter of ``--base``. ``--token``
is the rare word that they were trained with. Four pictures a prompt, as in the paper.

One JSON line a subject, then their mean: ``dino`` and ``clip_i`` say how like the subject's pictures they are,
``clip_t`` how well they show their prompts (without the rare word, which CLIP does not know), ``prior`` and
``diversity`` what became of the class. The paper's DINO is ViT-S/16 of the first DINO; DINOv2 gives other values.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.common import DEVICE, emit
from dreambooth_sm.data.folder import list_pictures
from dreambooth_sm.errors import UserError
from dreambooth_sm.fidelity import Encoders, load_encoders, measure
from dreambooth_sm.gallery import grid
from dreambooth_sm.sampling import draw

PROMPTS_FILE = "prompts_and_classes.txt"
LIVE = ("cat", "dog")
CLASS_PICTURES = 16


@dataclass(frozen=True)
class Protocol:
    """What the dataset asks for.

    Attributes:
        classes: of each subject.
        objects, live: prompts with places for the rare word, ``{0}``, and the class, ``{1}``.
    """

    classes: Mapping[str, str]
    objects: tuple[str, ...]
    live: tuple[str, ...]

    def prompts(self, subject: str, token: str) -> list[str]:
        """Of a subject, whose class ``token`` stands before; without it where it is empty."""
        name = self.classes[subject]
        templates = self.live if name in LIVE else self.objects
        return [" ".join(template.format(token, name).split()) for template in templates]


def read_protocol(path: Path) -> Protocol:
    """Reads the dataset's list of classes and prompts.

    Raises:
        UserError: where it is missing or has another form.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); name the folder of the paper's dataset") from None
    head, *lists = text.split("prompt_list")
    classes = dict(re.findall(r"^([a-z0-9_]+),([a-z ]+)$", head, re.MULTILINE))
    classes.pop("subject_name", None)
    found = [tuple(re.findall(r"'([^'\n]*\{0\}[^'\n]*)'", each)) for each in lists]
    if not classes or len(found) != 2 or not all(found):
        raise UserError(f"{path} is not the paper's list of classes and prompts; take it from the dataset as it is")
    return Protocol(classes, *found)


def open_model(directory: Path, base: str | None) -> Any:
    """What a job left, ready to draw.

    Raises:
        UserError: for an adapter without its base model.
    """
    from diffusers import DiffusionPipeline

    dtype = torch.float16 if DEVICE.type == "cuda" else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "safety_checker": None}
    if (directory / "model_index.json").is_file():
        pipeline = DiffusionPipeline.from_pretrained(directory, **options)
    elif base is None:
        raise UserError(f"{directory} is not a whole model; name the base model of its adapter with --base")
    else:
        pipeline = DiffusionPipeline.from_pretrained(base, **options)
        pipeline.load_lora_weights(str(directory))
    return pipeline.to(DEVICE)


def drawn(pipeline: Any, prompt: str, first: int, count: int, steps: int, side: int) -> Iterator[Image.Image]:
    seeds = list(range(first, first + count))
    for batch in draw(pipeline, prompt, seeds, resolution=side, batch_size=count, steps=steps):
        yield from batch


def examine(
    pipeline: Any,
    protocol: Protocol,
    subject: str,
    real: Sequence[Image.Image],
    dino: Encoders,
    clip: Encoders,
    options: argparse.Namespace,
) -> dict[str, float | None]:
    """The measures of one subject's model."""
    side = options.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    pictures: list[Image.Image] = []
    told: list[str] = []
    asked = zip(protocol.prompts(subject, options.token), protocol.prompts(subject, ""), strict=True)
    for number, (prompt, shown) in enumerate(asked):
        found = drawn(pipeline, prompt, number * options.pictures, options.pictures, options.steps, side)
        pictures += found
        told += [shown] * options.pictures
    class_prompt = f"a photo of a {protocol.classes[subject]}"
    classes = list(drawn(pipeline, class_prompt, 10_000, CLASS_PICTURES, options.steps, side))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        grid([picture.resize((256, 256)) for picture in (*real[:5], *pictures[:: options.pictures])], 5).save(
            options.out / f"{subject}.jpg"
        )
    by_dino = measure(dino, training=real, generated=pictures, class_pictures=classes)
    by_clip = measure(clip, training=real, generated=pictures, prompts=told)
    return {
        "dino": by_dino.subject,
        "clip_i": by_clip.subject,
        "clip_t": by_clip.prompt,
        "prior": by_dino.prior,
        "diversity": by_dino.diversity,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--dino", default="facebook/dinov2-base")
    parser.add_argument("--clip", default="openai/clip-vit-base-patch32")
    parser.add_argument("--token", default="zwx")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--resolution", type=int, help="side of the pictures; that of the model if left out")
    parser.add_argument("--out", type=Path, help="directory for a picture of each subject")
    options = parser.parse_args()
    try:
        run(options)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def run(options: argparse.Namespace) -> None:
    protocol = read_protocol(options.dataset / PROMPTS_FILE)
    trained = [name for name in protocol.classes if (options.models / name).is_dir()]
    if not trained:
        raise UserError(f"{options.models} has no folder with the name of a subject, such as {min(protocol.classes)}")
    dino, clip = (load_encoders(spec, DEVICE) for spec in (f"dino={options.dino}", f"clip={options.clip}"))
    rows = []
    for subject in trained:
        real = [Image.open(path).convert("RGB") for path in list_pictures(options.dataset / subject)]
        pipeline = open_model(options.models / subject, options.base)
        rows.append(examine(pipeline, protocol, subject, real, dino, clip, options))
        emit(subject=subject, **_rounded(rows[-1]))
    means = {name: statistics.fmean(float(row[name] or 0) for row in rows) for name in rows[0]}
    emit(subjects=len(rows), **_rounded(means))


def _rounded(row: Mapping[str, float | None]) -> dict[str, object]:
    return {name: None if value is None else round(value, 4) for name, value in row.items()}


if __name__ == "__main__":
    main()
