"""The outputs of a job: the trained model in its directory and in S3, and nothing that is not the job's."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dreambooth_sm import storage
from dreambooth_sm.checksums import encoded, extended
from dreambooth_sm.context import upload_client
from dreambooth_sm.convert import EXPORT_DTYPES
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.manifest import MANIFEST_NAME, Manifest, ManifestEntry
from dreambooth_sm.report import Reporter
from dreambooth_sm.sagemaker import Contract
from dreambooth_sm.storage import S3Uri
from dreambooth_sm.stored.files import OutOfRange
from dreambooth_sm.training.checkpoint import all_checkpoints
from dreambooth_sm.training.train import TrainedModel
from dreambooth_sm.validation import SAMPLES


def save(trained: TrainedModel, h: Hyperparameters, shown: Path, checkpoints: Path) -> set[str]:
    """Puts the trained model, in the format and precision that are asked for, into its directory.

    Args:
        shown: pictures of class images, which come with it.

    Returns:
        the names of the files that were written; what else lies in the directory is not the job's.

    Raises:
        UserError: where the weights are too large for the precision; the model is there in full precision then.
    """
    directory, too_large = Path(h.models_path), None
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
        fresh = Path(scratch) / "model"
        fresh.mkdir()
        try:
            trained.export(fresh, h, EXPORT_DTYPES[h.export_precision])
        except OutOfRange as error:
            too_large = error
            shutil.rmtree(fresh)
            fresh.mkdir()
            trained.export(fresh, h, None)
        for picture in sorted(shown.glob("*.png")):
            (fresh / SAMPLES).mkdir(exist_ok=True)
            shutil.copy2(picture, fresh / SAMPLES)
        written = {path.relative_to(fresh).as_posix() for path in fresh.rglob("*") if path.is_file()}
        for name in written:
            make_way(directory, name)
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).replace(directory / name)
    if too_large:
        kept = f", and checkpoints in {checkpoints}" if all_checkpoints(checkpoints) else ""
        raise UserError(
            f"export_precision={h.export_precision} can't hold the trained model: {too_large}. If training made it "
            "worse, lower learning_rate; otherwise set export_precision to bf16 or fp32. What was trained is in "
            f"{directory}, in fp32{kept}"
        )
    return written


def make_way(directory: Path, name: str) -> None:
    """Removes links on the way to a file of the job, which would otherwise be written to where they lead."""
    path = directory
    for segment in Path(name).parts:
        path /= segment
        if path.is_symlink():
            path.unlink()


def discard_checkpoints(root: Path, identity: dict[str, Any]) -> None:
    """Removes this job's checkpoints, and the directory if nothing else is in it."""
    own = [checkpoint.directory for checkpoint in all_checkpoints(root) if checkpoint.belongs_to(identity)]
    for directory in (*own, *root.glob(".partial-step-*"), *root.glob(".sending-step-*")):
        shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        root.rmdir()


def upload(
    directory: Path,
    written: set[str],
    target: S3Uri,
    h: Hyperparameters,
    step: int,
    contract: Contract,
    report: Reporter,
) -> None:
    """Sends the job's files to S3 and, once every object is verified, leaves SageMaker only a pointer to pack.

    Args:
        written: names of the files, relative to the directory; whatever else is in it stays, and stays here.
    """
    pointer = directory / "model_location.txt"
    pointer.unlink(missing_ok=True)  # of an earlier job in this directory
    manifest = storage.upload_directory(
        directory, target, h.s3_options, names=written, job=contract.job_name, step=step, client=upload_client(h)
    )
    report.metrics(uploaded=str(target), files=len(manifest.files), bytes=manifest.size)
    for name in written:
        (directory / name).unlink()
    folders = {folder for name in written for folder in Path(name).parents if folder != Path()}
    for folder in sorted(folders, reverse=True):
        with contextlib.suppress(OSError):  # something else is in it
            (directory / folder).rmdir()
    pointer.write_text(f"{target}\n")


def seal(directory: Path, written: set[str], job: str, step: int) -> None:
    """Lists the job's files in a manifest, as an upload does, where they stay on this machine."""
    entries = []
    for name in sorted(written):
        content = (directory / name).read_bytes()
        entries.append(ManifestEntry(name, len(content), encoded(extended(0, content))))
    manifest = Manifest(tuple(entries), datetime.now(UTC).isoformat(timespec="seconds"), job, step)
    partial = directory / f".{MANIFEST_NAME}.partial"
    partial.write_text(manifest.to_json(), encoding="utf-8")
    partial.rename(directory / MANIFEST_NAME)


@contextlib.contextmanager
def with_checkpoint_named(checkpoints: Path, identity: dict[str, Any], step: int) -> Iterator[None]:
    """Adds to any error where what was trained is, if it is in a checkpoint of this job and step."""
    try:
        yield
    except Exception as error:
        for checkpoint in all_checkpoints(checkpoints):
            if checkpoint.belongs_to(identity) and checkpoint.step == step:
                error.add_note(f"what was trained is in {checkpoint.directory}; the same job is resumed from it")
        raise


def scratch_directory(h: Hyperparameters) -> Path:
    """Returns where class images go that can't go elsewhere: beside the model, which is empty before training."""
    return Path(h.models_path).parent / "class_images"
