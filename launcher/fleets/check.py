"""Checks of all subjects of a fleet at once, before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from dreambooth_sm.data.captions import read_dataset_info
from dreambooth_sm.data.check import check_folder
from dreambooth_sm.errors import UserError
from dreambooth_sm.fleet.subjects import FleetSubject
from dreambooth_sm.hyperparameters import Hyperparameters
from launcher.aws.lookup import Lookup, pictures_in
from launcher.channels import FOLDER, Channel
from launcher.staging import Files, picture_files

_WORKERS = 16


@dataclass
class SubjectCheck:
    """What was found of one subject.

    Attributes:
        files: its pictures, where they lie on this machine.
        problems: why it can't be trained; none where it can.
        warnings: what is odd about its pictures.
    """

    subject: FleetSubject
    files: Files | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_subjects(
    subjects: Sequence[FleetSubject], fleet: Hyperparameters, look: Lookup, base: str | None
) -> list[SubjectCheck]:
    """Checks hyperparameters and pictures of each, as its job will, several at a time.

    Args:
        fleet: what all subjects have.
        look: looks at pictures in S3.
        base: the base model, where it lies now.
    """
    look.look_ahead(subject.images for subject in subjects if subject.images.startswith("s3://"))
    with ThreadPoolExecutor(_WORKERS) as pool:
        return list(pool.map(lambda subject: _check(subject, fleet, look, base), subjects))


def _check(subject: FleetSubject, fleet: Hyperparameters, look: Lookup, base: str | None) -> SubjectCheck:
    found = SubjectCheck(subject)
    folder = None if subject.images.startswith("s3://") else Path(subject.images)
    try:
        if folder is None:
            _look(subject.images, look)
        elif not folder.is_dir():
            raise UserError(f"images: {folder} is not a folder; name one with 4 to 20 pictures, or s3://bucket/prefix")
        beside = read_dataset_info(folder) if folder else {}
        own = subject.hyperparameters(fleet, beside)
        if folder:
            found.files = picture_files(folder)
            findings = check_folder(folder, own, name="images", base=base)
            found.problems += findings.errors
            found.warnings += findings.warnings
            # What lies beside the pictures does not travel with them.
            used = {name: text for name, text in beside.items() if getattr(own, name) == text}
            found.subject = replace(subject, values={**used, **subject.values})
    except UserError as error:
        found.problems += error.problems
    except OSError as error:
        found.problems.append(f"images: {error}")
    found.problems, found.warnings = (
        [f"{subject.id}: {line}" for line in dict.fromkeys(lines)] for lines in (found.problems, found.warnings)
    )
    return found


def _look(images: str, look: Lookup) -> None:
    """Raises UserError unless a folder of pictures lies there."""
    channel = look.find([images])
    if not isinstance(channel, Channel) or channel.kind != FOLDER:
        raise UserError(f"images: {images} is not a folder; a fleet's pictures lie below s3://bucket/prefix/")
    if channel.objects is not None and not pictures_in(channel.objects):
        raise UserError(f"images: there are {len(channel.objects)} objects below {images}, and no pictures")
