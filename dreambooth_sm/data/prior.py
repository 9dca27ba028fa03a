"""Class images for prior preservation: those the user has, and generated ones for the rest."""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path

from diffusers import StableDiffusionPipeline

from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.errors import StopRequested
from dreambooth_sm.report import Reporter
from dreambooth_sm.sampling import draw


def complete_class_images(
    subject: Subject,
    pipeline: StableDiffusionPipeline,
    *,
    wanted: int,
    resolution: int,
    batch_size: int,
    seed: int,
    scratch: Path,
    report: Reporter,
    stop: threading.Event,
) -> Subject:
    """Generates the class images that are missing.

    They go beside the existing ones, or into ``scratch`` where that directory is read-only (a channel in FastFile
    mode, for example). Picture k is drawn from ``seed + k``, whatever the batch size.

    Returns:
        the subject with ``wanted`` class pictures.

    Raises:
        StopRequested: between two batches, when ``stop`` is set.
    """
    missing = range(len(subject.class_pictures), wanted)
    if subject.class_prompt is None or not missing:
        return subject
    directory = _writable(subject.class_directory) or _writable(scratch)
    assert directory is not None, f"{scratch} has to be writable"
    made: list[Path] = []
    batches = draw(
        pipeline,
        subject.class_prompt,
        [seed + number for number in missing],
        resolution=resolution,
        batch_size=batch_size,
    )
    total = -(-len(missing) // batch_size)
    for pictures in report.progress(batches, total, "class images"):
        for picture in pictures:
            path = directory / f"class-{seed + missing[len(made)]:010d}.png"
            partial = path.with_suffix(".partial")  # a job that is killed here leaves no damaged picture
            picture.save(partial, format="PNG")
            partial.rename(path)
            made.append(path)
        if stop.is_set():
            raise StopRequested(f"while class images were made; {len(made)} of {len(missing)} are in {directory}")
    return dataclasses.replace(subject, class_pictures=(*subject.class_pictures, *made))


def _writable(directory: Path) -> Path | None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return directory if os.access(directory, os.W_OK) else None
