"""Shared by both command lines: flags that are spelled out, near names, errors for people and as JSON, exit codes.

0: done. 1: it failed. 2: bad input. As a shell reports signals: 130, Ctrl-C; 141, whoever read the output went away;
129 and 143, SIGHUP and SIGTERM.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from pydantic.fields import FieldInfo

from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_FAILURE, UserError
from dreambooth_sm.knobs.declare import meaning, spellings, translated_aliases
from dreambooth_sm.knobs.docs import help_text
from dreambooth_sm.knobs.takes import expected

EXIT_INTERRUPTED, EXIT_READER_GONE = 130, 141
Redact = Callable[[str], str]


class UsageError(UserError):
    """A command line that can't be read."""


class _Once(argparse.Action):
    """A value that is given once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        seen = namespace.__dict__.setdefault("given_flags", set())
        if option_string and self.dest in seen:
            parser.error(f"{option_string} is given twice; keep one")
        seen.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags and none twice, and names the nearest of a flag that it does not know."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        self.register("action", None, _Once)
        self.set_defaults(command_parser=self)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, rest = self.parse_known_args(args, namespace)
        command: Parser = options.__dict__.pop("command_parser", self)
        options.__dict__.pop("given_flags", None)
        if rest:
            raise UsageError([*command._unknown(rest)])
        return options

    def error(self, message: str) -> NoReturn:
        if choice := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            message += _near(choice[1], re.findall(r"[\w-]+", choice[2]))
        raise UsageError(f"{message} ({self._how})")

    @property
    def _how(self) -> str:
        return " ".join(self.format_usage().split())

    def _unknown(self, rest: Sequence[str]) -> list[str]:
        names = [word.partition("=")[0] for word in rest if word.startswith("-") and len(word) > 1]
        flags = [f"{name}: unknown flag{self._instead_of(name)}" for name in dict.fromkeys(names)]
        return flags or [f"{rest[0]!r} is one word too many ({self._how})"]

    def _instead_of(self, name: str) -> str:
        near = _near(name.lower().replace("-", "_").strip("_"), self._option_string_actions)
        return near or f"; {self.prog} --help lists those that exist"


def _near(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    plain = {name.lstrip("-").replace("-", "_"): name for name in known}
    found = difflib.get_close_matches(word, plain, n=1, cutoff=0.6)
    return f"; did you mean {plain[found[0]]}?" if found else ""


def add_options(
    parser: argparse.ArgumentParser,
    fields: Mapping[str, FieldInfo],
    group_of: Callable[[str], str],
    *,
    everything: bool,
    defaults: Mapping[str, object] | None = None,
) -> None:
    """A flag for each option; words up to the next flag belong to one value.

    Args:
        everything: show all of them in the help text, and not only what people set.
        defaults: those that differ from the fields' own.
    """
    groups: dict[str, Any] = {}
    for name, field in fields.items():
        title = group_of(name)
        group = groups.setdefault(title, parser.add_argument_group(title))
        flags = [f"--{each}" for each in spellings(name, field)]
        text = help_text(field, {name: field.default, **(defaults or {})}[name]).replace("%", "%%")
        metavar = "TRUE|FALSE" if field.annotation is bool else "VALUE"
        shown = text if everything or meaning(field).common else argparse.SUPPRESS
        group.add_argument(*flags, dest=name, nargs="*", help=shown, metavar=metavar)
    for name in translated_aliases(fields):
        parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--help-all", action="help", help="show every option, and exit")


def read_options(options: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> dict[str, list[str]]:
    """The words of each option that was given.

    Raises:
        UserError: one that is not a switch stands alone.
    """
    known = {**fields, **translated_aliases(fields)}
    given = {name: words for name, words in options.items() if name in known and words is not None}
    alone = [name for name, words in given.items() if not words and "true" not in expected(known[name])]
    if alone:
        raise UserError([f"--{name} needs a value" for name in alone])
    return given


def joined(words: Sequence[str]) -> str:
    """Words as one value; a switch that stands alone is on."""
    return " ".join(words) if words else "true"


def read_pairs(name: str, words: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE ...`` as a dictionary.

    Args:
        name: of the option, for messages.

    Raises:
        UserError: a word is not a pair, or a name is given twice.
    """
    pairs = [word.partition("=")[::2] for word in words]
    problems = [f"{name}: {word!r} is not NAME=VALUE" for word in words if "=" not in word]
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    problems += [f"{name}: {key} is given twice; keep one" for key in twice]
    if problems:
        raise UserError(problems)
    return dict(pairs)


def run(
    command: Callable[[Sequence[str]], int],
    arguments: Sequence[str] | None,
    failures: tuple[type[Exception], ...],
    redact: Redact = str,
) -> int:
    """Runs a command line; returns its exit code.

    Args:
        command: gets the arguments; returns an exit code.
        arguments: default: those of this process.
        failures: what ends with exit code 1 and a line, without a traceback.
        redact: takes secrets out of what is shown.

    Raises:
        SystemExit: with 2, for a command line that can't be read; with 0, after ``--help`` and ``--version``.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    expected_failures: tuple[type[Exception], ...] = (*failures, OSError)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # file names, on an ASCII terminal

    def tell(problems: Sequence[str]) -> None:
        shown = [redact(problem) for problem in problems]
        print(*(f"error: {problem}" for problem in shown), sep="\n", file=sys.stderr)
        if "--json" in given:
            print(json.dumps({"errors": shown}, indent=2))

    try:
        try:
            with _ended_in_order():
                return command(given)
        except UsageError as error:
            tell(error.problems)
            raise SystemExit(EXIT_BAD_INPUT) from None
        except UserError as error:
            tell(error.problems)
            return EXIT_BAD_INPUT
        except BrokenPipeError:
            raise
        except expected_failures as error:
            tell([str(error)])
            return EXIT_FAILURE
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end
        return EXIT_READER_GONE


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """A closed terminal and a request to end stop a job of this machine first, as they would without this process."""
    before: dict[int, Any] = {}

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
