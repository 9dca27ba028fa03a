"""Both command lines, as shells and scripts use them: what is mistyped, what comes out where, how they end."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest

import launcher.cli
import launcher.tool
from dreambooth_sm import cli
from dreambooth_sm.command_line import EXIT_INTERRUPTED, EXIT_READER_GONE, run
from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_FAILURE, UserError
from dreambooth_sm.knobs.declare import meaning
from launcher.options import all_options
from tests.helpers.patience import PATIENCE
from tests.helpers.services import eventually

Main = Callable[[list[str]], int]
TOOLS: dict[str, Main] = {"dreambooth-sm": launcher.tool.main, "dreambooth-launcher": launcher.cli.main}
PARSERS = {"dreambooth-sm": partial(cli._parser, demo=True), "dreambooth-launcher": launcher.cli._parser}
MODULES = {"dreambooth-sm": "launcher.tool", "dreambooth-launcher": "launcher.cli"}


def refused(command: str) -> None:
    """Runs a command that is to end with 2."""
    tool, *arguments = command.split()
    try:
        assert TOOLS[tool](arguments) == EXIT_BAD_INPUT
    except SystemExit as error:
        assert error.code == EXIT_BAD_INPUT  # noqa: PT017


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("dreambooth-sm convert a b --precison fp16", "--precison: unknown flag; did you mean --precision?"),
        ("dreambooth-sm convert a b --prec fp16", "--prec: unknown flag"),
        ("dreambooth-sm plan --gp T4", "--gp: unknown flag; did you mean --gpu?"),
        ("dreambooth-sm plan --js", "--js: unknown flag; did you mean --json?"),
        ("dreambooth-sm plan --learning-rate 1", "did you mean --learning_rate?"),
        ("dreambooth-sm plan --learning_rat=1", "--learning_rat: unknown flag; did you mean --learning_rate?"),
        ("dreambooth-sm plan --gpu T4 --gpu A10G", "--gpu is given twice"),
        ("dreambooth-sm plan T4", "'T4' is one word too many"),
        ("dreambooth-sm plan --learning_rate", "--learning_rate needs a value"),
        ("dreambooth-sm check a b", "'b' is one word too many"),
        ("dreambooth-sm check a --shet b", "--shet: unknown flag; did you mean --sheet?"),
        ("dreambooth-sm check --instance_prompt photo of zwx toy a", "required: directory"),
        ("dreambooth-sm check --instance_data_dir elsewhere a", "--instance_data_dir: unknown flag"),
        ("dreambooth-sm verify s3://b/p --requester_pay", "did you mean --requester-pays?"),
        ("dreambooth-sm chek a", "did you mean check?"),
        ("dreambooth-launcher fit a --max-train-steps 3", "did you mean --max_train_steps?"),
        ("dreambooth-launcher fit a --max_trian_steps=3", "did you mean --max_train_steps?"),
        ("dreambooth-launcher fit a --seed 1 --seed 2", "--seed is given twice"),
        ("dreambooth-launcher fit a --instance-typ x", "did you mean --instance_type?"),
        ("dreambooth-launcher fit a --no-wait", "did you mean --no_wait?"),
        ("dreambooth-launcher fit a --instance_prompt --class_prompt x", "--instance_prompt needs a value"),
        ("dreambooth-launcher fit a --tags --seed 1", "--tags needs a value"),
        ("dreambooth-launcher list --lim 3", "--lim: unknown flag; did you mean --limit?"),
        ("dreambooth-launcher list more", "'more' is one word too many"),
        ("dreambooth-launcher stop a b", "'b' is one word too many"),
        ("dreambooth-launcher atach a", "did you mean attach?"),
        ("dreambooth-launcher", "required: COMMAND"),
        ("dreambooth-launcher iam b --acount 1", "did you mean --account?"),
    ],
)
def test_what_is_mistyped_is_refused_with_the_nearest(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(command)
    shown = capsys.readouterr()
    assert words in shown.err
    assert all(line.startswith("error: ") for line in shown.err.splitlines())
    assert shown.out == ""


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_no_flag_of_any_command_is_abbreviated_or_swallowed(
    tool: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each flag, without its last letters and with a letter too many, whatever command it belongs to."""
    parser = PARSERS[tool](everything=True)
    program = {"dreambooth-sm": cli, "dreambooth-launcher": launcher.cli}[tool]
    monkeypatch.setattr(program, "_parser", cache(program._parser))  # made once, not for each of 1,500 commands
    [subcommands] = [action for action in parser._actions if action.choices and action.nargs]
    for name, command in subcommands.choices.items():  # type: ignore[union-attr]
        for flag in [flag for flag in command._option_string_actions if len(flag) > 5]:
            for mistyped in (flag[:-1], f"{flag}x", flag.swapcase()):
                if mistyped not in command._option_string_actions:
                    refused(f"{tool} {name} {mistyped}")
                    shown = capsys.readouterr()
                    assert shown.err.startswith("error: "), (name, mistyped, shown)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("dreambooth-sm plan --json", 0),
        ("dreambooth-sm plan --gpu T4 --json", 0),
        ("dreambooth-sm plan --gpu T5 --json", 2),
        ("dreambooth-sm plan --json --resolution 5", 2),
        ("dreambooth-sm plan --json --unknown", 2),
        ("dreambooth-sm check /nowhere --json", 2),
        ("dreambooth-sm check --json", 2),
        ("dreambooth-sm verify nowhere --json", 2),
        ("dreambooth-sm verify s3://bucket/model --json", 1),
    ],
)
def test_json_is_all_there_is_on_standard_output(
    command: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("dreambooth_sm.storage.verify", _fail)
    try:
        assert launcher.tool.main(command.split()[1:]) == code
    except SystemExit as error:
        assert error.code == code  # noqa: PT017
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert bool(code) == ("errors" in found)
    if code:
        assert [f"error: {each}" for each in found["errors"]] == shown.err.splitlines()


def _fail(source: object, options: object) -> None:
    from dreambooth_sm.storage import DownloadError, S3Uri

    S3Uri.parse(str(source))
    raise DownloadError("no network")


def test_help_shows_what_people_set_and_help_all_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as caught:
            launcher.cli.main(["fit", flag])
        assert caught.value.code == 0
        texts[flag] = capsys.readouterr().out
    # From Python 3.13 on, spellings of one option stand side by side.
    shown, all_shown = ({n for n in all_options() if re.search(rf"--{n}[ ,]", text)} for text in texts.values())
    assert shown == {name for name, field in all_options().items() if meaning(field).common}
    assert len(shown) == 22
    assert len(texts["--help"].splitlines()) < 105
    assert all_shown == set(all_options()) - {"images"}
    for text in texts.values():
        assert "Default: None" not in text
        assert "Default: ()" not in text
        assert "Default: {}" not in text
        assert "--help-all" in text


def test_the_help_names_the_instance_type_that_is_really_taken(capsys: pytest.CaptureFixture[str]) -> None:
    for command, default in (("fit", "local"), ("check", "local"), ("estimate", "auto"), ("request", "auto")):
        with pytest.raises(SystemExit):
            launcher.cli.main([command, "--help"])
        text = " ".join(capsys.readouterr().out.partition("--instance_type")[2].partition("--max_minutes")[0].split())
        assert text.endswith(f"Default: {default}.")


@pytest.mark.parametrize(
    "command", ["dreambooth-sm hyperparameters", "dreambooth-launcher instances", "dreambooth-sm check {pictures}"]
)
def test_a_reader_that_goes_away_is_no_traceback(command: str, pictures: Path) -> None:
    tool, *arguments = command.format(pictures=pictures).split()
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-m", MODULES[tool], *arguments], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (EXIT_READER_GONE, "")


def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "dreambooth_sm.cli", "hyperparameters"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == EXIT_FAILURE
    assert ended.stderr == "error: [Errno 28] No space left on device\n"


def test_names_that_an_ascii_terminal_can_not_show() -> None:
    code = "from dreambooth_sm.command_line import run; run(lambda given: print('Kätzchen 子猫') or 0, [], ())"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "K\\xe4tzchen \\u5b50\\u732b\n"


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, EXIT_INTERRUPTED, "interrupted\n"),
        (signal.SIGTERM, 128 + signal.SIGTERM, ""),
        (signal.SIGHUP, 128 + signal.SIGHUP, ""),
    ],
)
def test_signals_end_it_in_order_and_without_a_traceback(
    tmp_path: Path, number: signal.Signals, code: int, said: str
) -> None:
    reached = tmp_path / "reached"
    program = (
        "import atexit, sys, time, pathlib; from dreambooth_sm.command_line import run\n"
        "atexit.register(print, 'jobs are stopped')\n"
        f"def command(given): pathlib.Path({str(reached)!r}).touch(); time.sleep(3600)\n"
        "sys.exit(run(command, [], ()))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    eventually(reached.exists)
    process.send_signal(number)
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output, errors) == (code, "jobs are stopped\n", said)


class Broken(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError(["one", "two"]), EXIT_BAD_INPUT), (Broken("one"), EXIT_FAILURE), (OSError("one"), EXIT_FAILURE)],
)
def test_what_is_expected_ends_with_a_line_and_the_rest_as_python_ends(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(given: object) -> int:
        raise error

    assert run(fail, ["--json"], (Broken,), lambda text: text.replace("one", "1")) == code
    shown = capsys.readouterr()
    assert json.loads(shown.out)["errors"][0] == "1"
    assert shown.err.startswith("error: 1\n")
    with pytest.raises(ZeroDivisionError):
        run(lambda given: 1 // 0, [], (Broken,))


def test_a_reader_that_goes_away_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    assert run(lambda given: 0, [], ()) == EXIT_READER_GONE


def documented() -> list[str]:
    """Every command with arguments that a document names."""
    root = Path(__file__).parents[2]
    pages = (root / "README.md", *sorted((root / "docs").glob("*.md")))
    texts = [page.read_text(encoding="utf-8").replace("\\\n", " ") for page in pages]  # with its continued lines
    found = [
        each
        for text in texts
        for pattern in (r"`(dreambooth-(?:sm|launcher) [^`]*)`", r"^dreambooth-(?:sm|launcher) .*")
        for each in re.findall(pattern, text, re.MULTILINE)
    ]
    return sorted({each.replace("[--json]", "--json") for each in found if each.count(" ") > 1})


@pytest.mark.parametrize("command", documented())
def test_what_documents_name_is_taken(command: str) -> None:
    tool, *arguments = shlex.split(command, comments=True)
    parser = PARSERS[tool](everything=False)
    parser.parse_args(arguments)


def test_documents_name_some() -> None:
    assert len(documented()) >= 8
