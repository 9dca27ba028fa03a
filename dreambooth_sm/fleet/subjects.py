"""The list of a fleet: a line of JSON a subject. It imports no torch: the launcher writes it, and the job reads it."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.s3_uri import S3Uri

# It names directories and keys in S3; the last letter keeps "a." and "a" apart on file systems that don't.
ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_PLACES = ("id", "images", "output")


@dataclass(frozen=True)
class FleetSubject:
    """One subject of a fleet.

    Attributes:
        id: its name in the fleet: 1 to 64 letters, digits, dots, hyphens and underscores.
        images: its pictures: ``s3://bucket/prefix``, or a path from the list's own folder on.
        output: ``s3://bucket/prefix`` for its model; None: below the fleet's own, by its id.
        values: its own hyperparameters, as they were given; all others are the fleet's.
    """

    id: str
    images: str
    output: str | None = None
    values: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def line(self) -> str:
        """As it stands in a list."""
        places = {name: getattr(self, name) for name in _PLACES if getattr(self, name) is not None}
        return json.dumps({**places, **self.values}, ensure_ascii=False)

    def hyperparameters(self, fleet: Hyperparameters, beside: Mapping[str, str], **places: str) -> Hyperparameters:
        """Those of a job that trains this subject alone.

        Args:
            fleet: what all subjects have.
            beside: prompts that lie beside the pictures, which serve where none are given.
            places: hyperparameters that say where things lie.

        Raises:
            UserError: with everything that is wrong with them.
        """
        kept = fleet.model_dump(exclude_unset=True, exclude={"fleet", "fleet_outcomes"})
        return Hyperparameters.parse({**kept, **self.values, **places}, dataset_info=lambda directory: beside)


def own_knobs() -> list[str]:
    """The hyperparameters that each subject may have a value of its own of."""
    return Hyperparameters.names_where(lambda knob: knob.per_subject)


def parse_subject(row: Mapping[str, object], name: str) -> FleetSubject:
    """A subject from names and values; values that are None or an empty text are left out.

    Args:
        name: of the row, for errors.

    Raises:
        UserError: with everything that is wrong with it.
    """
    given = {str(key): value for key, value in row.items() if value is not None and value != ""}
    about = f"{name} ({given['id']})" if isinstance(given.get("id"), str) else name
    problems = [f"{about}: {problem}" for problem in _problems(given)]
    if problems:
        raise UserError(problems)
    values = {key: value for key, value in given.items() if key not in _PLACES}
    output = given.get("output")
    return FleetSubject(str(given["id"]), str(given["images"]), None if output is None else str(output), values)


def _problems(given: Mapping[str, object]) -> Iterator[str]:
    for key in ("id", "images"):
        if key not in given:
            yield f"{key} is missing"
    if isinstance(given.get("id"), str) and not ID.fullmatch(str(given["id"])):
        yield "id: set 1 to 64 letters, digits, dots, hyphens and underscores, with a letter or digit first and last"
    for key in _PLACES:
        text = given.get(key, "")
        if not isinstance(text, str):
            yield f"{key}: set a text"
        elif (key == "output" and text) or text.startswith("s3:"):
            try:
                S3Uri.parse(text)
            except UserError as error:
                yield f"{key}: {error}; set s3://bucket/prefix"
    known = [*_PLACES, *own_knobs()]
    for key in given.keys() - set(known):
        near = difflib.get_close_matches(key, known, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        if key in Hyperparameters.model_fields:
            yield f"{key} is the same for all subjects of a fleet; set it for the fleet"
        else:
            yield f"{key[:60]!r} is not known{meant}; a subject has {', '.join(known)}"


def parse_subjects(rows: Iterable[tuple[str, object]]) -> tuple[FleetSubject, ...]:
    """The subjects of a fleet.

    Args:
        rows: each with its name for errors, and what should be names and values.

    Raises:
        UserError: with everything that is wrong with any of them.
    """
    found: list[FleetSubject] = []
    problems: list[str] = []
    for name, row in rows:
        if not isinstance(row, Mapping):
            problems.append(
                f'{name} is not a subject; write {{"id": "...", "images": "...", "instance_prompt": "..."}}'
            )
            continue
        try:
            found.append(parse_subject(row, name))
        except UserError as error:
            problems += error.problems
    for what, names in (("id", [s.id for s in found]), ("output", [s.output for s in found if s.output])):
        counts = Counter(name.rstrip("/") for name in names)
        problems += [f"{what}: {name} is that of {count} subjects" for name, count in counts.items() if count > 1]
    if not found and not problems:
        problems.append("the list of subjects is empty")
    if problems:
        raise UserError(problems)
    return tuple(found)


def read_lines(text: str, name: str) -> list[tuple[str, object]]:
    """The lines of a list, each with its name for errors; what is not JSON is None."""
    rows: list[tuple[str, object]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            rows.append((f"{name}, line {number}", row))
    return rows


def read_list(text: str, name: str) -> tuple[FleetSubject, ...]:
    """Reads what :func:`write_list` wrote.

    Raises:
        UserError: with everything that is wrong with any line.
    """
    return parse_subjects(read_lines(text.removeprefix("\ufeff"), name))


def write_list(subjects: Iterable[FleetSubject]) -> str:
    """The list, a line a subject."""
    return "".join(f"{subject.line}\n" for subject in subjects)
