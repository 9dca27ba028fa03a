"""Class images for prior preservation: those the user has, and generated ones for the rest."""

from __future__ import annotations

import dataclasses
import io
import os
import threading
from pathlib import Path

from diffusers import StableDiffusionPipeline

from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.distributed import World
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
    guidance: float,
    seed: int,
    scratch: Path,
    report: Reporter,
    stop: threading.Event,
    world: World = World(),  # noqa: B008 - frozen
) -> Subject:
    """Generates the class images that are missing.

    They go beside the existing ones, or into ``scratch`` where that directory is read-only (a channel in FastFile
    mode, for example). Picture k is drawn from ``seed + k``, whatever the batch size. Several processes draw a share
    each and exchange their pictures.

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
    share = missing[world.rank :: world.size]
    made: list[Path] = []
    batches = draw(
        pipeline,
        subject.class_prompt,
        [seed + number for number in share],
        resolution=resolution,
        batch_size=batch_size,
        guidance=guidance,
    )
    total = -(-len(share) // batch_size)
    for pictures in report.progress(batches, total, "class images"):
        for picture in pictures:
            content = io.BytesIO()
            picture.save(content, format="PNG")
            made.append(_write(directory / f"class-{seed + share[len(made)]:010d}.png", content.getvalue()))
        if stop.is_set() and world.size == 1:
            raise StopRequested(f"while class images were made; {len(made)} of {len(share)} are in {directory}")
    if world.size > 1:
        shares = world.gather([(path.name, path.read_bytes()) for path in made])
        made = sorted(_write(directory / name, content) for part in shares for name, content in part)
    return dataclasses.replace(subject, class_pictures=(*subject.class_pictures, *made))


def _write(path: Path, content: bytes) -> Path:
    """Writes a file so that a job that is killed meanwhile leaves no damaged one."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.rename(path)
    return path


def _writable(directory: Path) -> Path | None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return directory if os.access(directory, os.W_OK) else None
