"""Base models with one thing wrong: each value of each configuration, and each file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Mutation = Callable[[Path], None]
REMOVED = "removed"
VALUES: tuple[Any, ...] = (None, "seven", -3, [], [1, "a"], {"a": 1}, 10**9, 2.5, True, REMOVED)


def _set(file: str, key: str, value: Any) -> Mutation:
    def mutate(directory: Path) -> None:
        path = directory / file
        config = json.loads(path.read_text())
        if value == REMOVED:
            del config[key]
        else:
            config[key] = value
        path.write_text(json.dumps(config))

    return mutate


def _content(file: str, make: Callable[[bytes], bytes]) -> Mutation:
    return lambda directory: (directory / file).write_bytes(make((directory / file).read_bytes())) and None


def mutations(base: Path) -> Iterator[tuple[str, Mutation]]:
    """All of them, with what each is called."""
    for path in sorted(path for path in base.rglob("*") if path.is_file()):
        file = str(path.relative_to(base))
        yield f"{file} empty", _content(file, lambda content: b"")
        yield f"{file} cut", _content(file, lambda content: content[: len(content) // 2])
        yield f"{file} junk", _content(file, lambda content: b"\x93\0junk" * 20)
        yield f"{file} of another kind", _content(file, lambda content: b'[1, {"a": null}]')
        yield f"{file} missing", lambda directory, file=file: (directory / file).unlink()
        if path.suffix == ".json" and path.name not in ("tokenizer.json", "vocab.json"):
            for key in json.loads(path.read_text()):
                for value in VALUES:
                    yield f"{file}: {key}={json.dumps(value)}", _set(file, key, value)
