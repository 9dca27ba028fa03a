"""The subjects of a job: their pictures, their prompts, and the class pictures that exist already."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreambooth_sm.data.buckets import assign, class_shapes
from dreambooth_sm.data.captions import fill
from dreambooth_sm.data.check import check_class_folder, check_folder, picture_shapes
from dreambooth_sm.data.folder import list_pictures
from dreambooth_sm.data.pictures import Shape, read_size
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.concepts import clean_concepts


@dataclass(frozen=True)
class Subject:
    """One concept, with everything that the job was told about it.

    Attributes:
        pictures: pictures of the subject; at least one, each readable.
        prompt: the instance prompt, without ``[filewords]``; the first picture's where nothing else is in it.
        class_prompt: None without prior preservation.
        class_directory: where class images are, and missing ones go.
        class_pictures: class images that are there already, readable, at most as many as are wanted.
        prompts: what each picture is shown with, captions included; empty where it is ``prompt`` for all.
        generated_shapes: width and height of the last class pictures, which were generated and are kept as latents.
    """

    pictures: tuple[Path, ...]
    prompt: str
    class_prompt: str | None
    class_directory: Path
    class_pictures: tuple[Path, ...]
    prompts: tuple[str, ...] = ()
    generated_shapes: tuple[Shape, ...] = ()


def find_subjects(h: Hyperparameters, warn: Callable[[str], None] = lambda line: None) -> tuple[Subject, ...]:
    """Finds the pictures of every concept and reads each one to the end, before anything costs money.

    Args:
        warn: gets a line for each finding that does not stop the job.

    Raises:
        UserError: with every folder and picture that is missing or can't be used.
    """
    problems: list[str] = []
    concepts = _concepts(h)
    directories = _class_directories(concepts, problems)
    subjects = [
        _find(concept, directory, problems, warn) for concept, directory in zip(concepts, directories, strict=True)
    ]
    if problems:
        raise UserError(dict.fromkeys(problems))
    return tuple(subject for subject in subjects if subject)


def shapes_of(subjects: Sequence[Subject], h: Hyperparameters) -> list[list[Shape]]:
    """The shape that each instance picture is trained in; one list a subject."""
    shapes = iter(picture_shapes([read_size(path) for subject in subjects for path in subject.pictures], h))
    return [[next(shapes) for _ in subject.pictures] for subject in subjects]


def shapes_of_class_pictures(subject: Subject, instances: Sequence[Shape]) -> list[Shape]:
    """The shape that each class picture of a subject is trained in.

    Args:
        instances: the subject's own of :func:`shapes_of`.
    """
    own = subject.class_pictures[: len(subject.class_pictures) - len(subject.generated_shapes)]
    shapes = assign([read_size(path) for path in own], class_shapes(instances, len(own)))
    return [*shapes, *subject.generated_shapes]


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
        raise UserError(f"concepts_list: {path} does not hold a JSON list; write [{{...}}, ...], one object a concept")
    return Hyperparameters.parse({**h.model_dump(exclude_unset=True), "concepts_list": clean_concepts(content)})


def _concepts(h: Hyperparameters) -> tuple[Hyperparameters, ...]:
    """The job's hyperparameters once for each concept, with the concept's own values in place."""
    if h.concepts_list is None:
        return (h,)
    concepts = read_concepts(h).inline_concepts
    return tuple(h.model_copy(update=concept.model_dump(exclude_none=True)) for concept in concepts)


def _class_directories(concepts: Sequence[Hyperparameters], problems: list[str]) -> list[Path]:
    """Finds each concept's class pictures. Concepts of different classes that name one directory get a
    subdirectory each, by their class prompt, or they would take each other's pictures for their own."""
    prompts: dict[str, list[str]] = {}
    for h in concepts:
        if h.prior_preservation and h.class_prompt:
            prompts.setdefault(h.class_data_dir, []).append(h.class_prompt)
    shared = {directory: list(dict.fromkeys(its)) for directory, its in prompts.items() if len(set(its)) > 1}
    for directory, its in shared.items():
        if any(path.parent == Path(directory) for path in list_pictures(Path(directory))):
            places = ", ".join(f"those of {prompt!r} to {_folder_of(prompt, its)}" for prompt in its)
            problems.append(f"class_data_dir: {directory} holds pictures of several classes; move {places} in it")
    return [
        Path(h.class_data_dir, _folder_of(h.class_prompt, shared[h.class_data_dir]))
        if h.class_prompt and h.class_data_dir in shared
        else Path(h.class_data_dir)
        for h in concepts
    ]


def _folder_of(prompt: str, prompts: Sequence[str]) -> str:
    """``photo-of-a-toy``; with a number where another of ``prompts`` would have the same name."""
    names = [re.sub(r"\W+", "-", text).strip("-").lower()[:60] or "class" for text in prompts]
    number = prompts.index(prompt)
    return names[number] if names.count(names[number]) == 1 else f"{names[number]}-{number}"


def _find(
    h: Hyperparameters, class_directory: Path, problems: list[str], warn: Callable[[str], None]
) -> Subject | None:
    findings = check_folder(Path(h.instance_data_dir), h)
    problems += findings.errors
    for line in findings.warnings:
        warn(line)
    class_pictures: tuple[Path, ...] = ()
    if h.prior_preservation and h.prior == "images":
        of_class = check_class_folder(class_directory, h)
        class_pictures = of_class.pictures
        problems += of_class.errors
        for line in of_class.warnings:
            warn(line)
    if not findings.pictures or h.instance_prompt is None:
        return None
    return Subject(
        pictures=tuple(picture.path for picture in findings.pictures),
        prompt=fill(h.instance_prompt, "") or findings.pictures[0].prompt,
        class_prompt=h.class_prompt if h.prior_preservation else None,
        class_directory=class_directory,
        class_pictures=class_pictures,
        prompts=tuple(picture.prompt for picture in findings.pictures),
    )
