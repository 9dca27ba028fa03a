"""The subjects of a job: their pictures, their prompts, and the class pictures that exist already."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from dreambooth_sm.data.pictures import check_pictures, list_pictures
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters, clean_concepts


@dataclass(frozen=True)
class Subject:
    """One concept, with everything that the job was told about it.

    Attributes:
        pictures: pictures of the subject; at least one, each readable.
        prompt: the instance prompt.
        class_prompt: None without prior preservation.
        class_directory: where class images are, and missing ones go.
        class_pictures: class images that are there already, readable, at most as many as are wanted.
    """

    pictures: tuple[Path, ...]
    prompt: str
    class_prompt: str | None
    class_directory: Path
    class_pictures: tuple[Path, ...]


def find_subjects(h: Hyperparameters) -> tuple[Subject, ...]:
    """Finds the pictures of every concept and reads each one to the end, before anything costs money.

    Raises:
        UserError: with every folder and picture that is missing or can't be used.
    """
    problems: list[str] = []
    subjects = [_find(concept, problems) for concept in _concepts(h)]
    if problems:
        raise UserError(dict.fromkeys(problems))
    return tuple(subject for subject in subjects if subject)


def read_concepts(h: Hyperparameters) -> Hyperparameters:
    """The hyperparameters with the concepts themselves where ``concepts_list`` names a file.

    Raises:
        UserError: where the file is missing, or does not hold what inline JSON would have to hold.
    """
    if not isinstance(h.concepts_list, str):
        return h
    path = Path(h.concepts_list)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"concepts_list: {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"concepts_list: {path} can't be read as JSON: {error}") from None
    if not isinstance(content, list):
        raise UserError(f"concepts_list: {path} holds no JSON list; write [{{...}}, ...], one object a concept")
    return Hyperparameters.parse({**h.model_dump(exclude_unset=True), "concepts_list": clean_concepts(content)})


def _concepts(h: Hyperparameters) -> tuple[Hyperparameters, ...]:
    """The job's hyperparameters once for each concept, with the concept's own values in place."""
    if h.concepts_list is None:
        return (h,)
    concepts = read_concepts(h).inline_concepts
    return tuple(h.model_copy(update=concept.model_dump(exclude_none=True)) for concept in concepts)


def _find(h: Hyperparameters, problems: list[str]) -> Subject | None:
    pictures = _pictures_in(Path(h.instance_data_dir), "instance_data_dir", problems)
    class_pictures: list[Path] = []
    if h.prior_preservation and Path(h.class_data_dir).is_file():
        problems.append(f"class_data_dir: {h.class_data_dir} is a file; name a directory")
    elif h.prior_preservation and Path(h.class_data_dir).is_dir():
        class_pictures = list_pictures(Path(h.class_data_dir))[: h.num_class_images]
        problems += check_pictures(class_pictures)
    if not pictures or h.instance_prompt is None:
        return None
    return Subject(
        pictures=tuple(pictures),
        prompt=h.instance_prompt,
        class_prompt=h.class_prompt if h.prior_preservation else None,
        class_directory=Path(h.class_data_dir),
        class_pictures=tuple(class_pictures),
    )


def _pictures_in(directory: Path, name: str, problems: list[str]) -> list[Path]:
    if directory.is_file():
        problems.append(f"{name}: {directory} is a file; name the directory with the pictures of the subject")
        return []
    if not directory.is_dir():
        channel = directory.name
        hint = (
            f"the job has no channel {channel!r}; pass it as an input, such as inputs={{{channel!r}: 's3://...'}}"
            if directory.parent.name == "data"
            else "name the directory with the pictures of the subject"
        )
        problems.append(f"{name}: {directory} does not exist; {hint}")
        return []
    pictures = list_pictures(directory)
    if not pictures:
        others = sum(1 for _, _, names in os.walk(directory) for _ in names)
        problems.append(
            f"{name}: {directory} holds no pictures ({others} other files); put 4 to 20 JPEG or PNG pictures there"
        )
    problems += check_pictures(pictures)
    return pictures
