"""The pictures that a job's report and model card open with: the subject, and what is drawn before and after."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.data.pictures import View, crop, open_picture
from dreambooth_sm.errors import UserError

SUBJECT_FILE = "subject.jpg"
# Pixels: side of a picture of the subject, and the gap between two.
_SIDE, _GAP = 192, 4
_MOST = 5
# Pictures in the page are at most this wide; the files beside it have all pixels.
_WIDTH = 384

Samples = Sequence[Mapping[str, Any]]


def write_subjects(subjects: Sequence[Subject], directory: Path) -> None:
    """Writes some pictures of each subject, cut to squares, a row for each; those that are gone by now leave a gap."""
    rows = [subject.pictures[:_MOST] for subject in subjects]
    shape, step = (_SIDE, _SIDE), _SIDE + _GAP
    sheet = Image.new("RGB", (step * max(map(len, rows)) - _GAP, step * len(rows) - _GAP), "white")
    for top, row in enumerate(rows):
        for left, path in enumerate(row):
            with contextlib.suppress(OSError, UserError):  # a trained model is worth more than its report
                sheet.paste(crop(open_picture(path, shape), shape, View()), (left * step, top * step))
    sheet.save(directory / SUBJECT_FILE, quality=88)


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side, row by row, on white.

    Raises:
        ValueError: where there is not a picture.
    """
    if not pictures:
        raise ValueError("a grid needs at least one picture")
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        sheet.paste(picture, (column * width, row * height))
    return sheet


def before_and_after(samples: Samples) -> dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]]:
    """Finds the first and the last picture of each seed, by prompt."""
    found: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for sample in samples:
        found.setdefault(sample["prompt"], {}).setdefault(sample["seed"], []).append(sample)
    return {prompt: [(rows[0], rows[-1]) for rows in seeds.values()] for prompt, seeds in found.items()}


def gallery(facts: Mapping[str, Any], directory: Path) -> str:
    """The page's pictures as HTML: the subject, then a table for each prompt, a row for each seed, a column for each
    step; the class prompts' come last.

    Args:
        facts: as :func:`dreambooth_sm.results.gather_facts` makes them.
        directory: that the samples' files are relative to.
    """
    html = []
    prompts = ", ".join(subject["instance_prompt"] for subject in facts["subjects"])
    if (directory / SUBJECT_FILE).is_file():
        html.append(f"<h3>The subject: {escape(prompts)}</h3>{_figure(directory / SUBJECT_FILE, prompts, width=1024)}")
    classes = {subject["class_prompt"] for subject in facts["subjects"]}
    for prompt, seeds in _tables(facts["samples"]).items():
        steps = sorted({step for found in seeds.values() for step in found})
        rows = "".join(
            "<tr>" + "".join(f"<td>{_sample(found, step, steps, directory)}</td>" for step in steps) + "</tr>"
            for found in seeds.values()
        )
        kind = "Class prompt" if prompt in classes else "Prompt"
        html.append(f'<h3>{kind}: {escape(prompt)}</h3><div class="wide"><table>{rows}</table></div>')
    if facts["class_files"]:
        figures = "".join(_figure(directory / file, "a class picture") for file in facts["class_files"])
        html.append(f'<h3>Class pictures that it was trained with</h3><div class="row">{figures}</div>')
    return "".join(html)


def _tables(samples: Samples) -> dict[str, dict[int, dict[int, Mapping[str, Any]]]]:
    tables: dict[str, dict[int, dict[int, Mapping[str, Any]]]] = {}
    for sample in samples:
        tables.setdefault(sample["prompt"], {}).setdefault(sample["seed"], {})[sample["step"]] = sample
    return tables


def _sample(found: Mapping[int, Mapping[str, Any]], step: int, steps: Sequence[int], directory: Path) -> str:
    if step not in found:
        return ""
    caption = "before" if step == 0 else f"after step {step}"
    sample = found[step]
    words = f"{sample['prompt']}, step {step}, seed {sample['seed']}"
    return _figure(directory / sample["file"], words, f"{caption}, seed {sample['seed']}")


def _figure(path: Path, words: str, caption: str = "", *, width: int = _WIDTH) -> str:
    with Image.open(path, formats=["PNG", "JPEG"]) as picture:
        small = picture.convert("RGB")
    small.thumbnail((width, width))
    content = BytesIO()
    small.save(content, format="JPEG", quality=88)
    data = base64.b64encode(content.getvalue()).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(words)}" src="data:image/jpeg;base64,{data}">{below}</figure>'
