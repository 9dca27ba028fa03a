"""The commands of ``dreambooth-launcher`` that make and run pipelines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import launcher
from dreambooth_sm.command_line import read_pairs
from dreambooth_sm.errors import UserError
from launcher.pipelines.prepare import CHECK_INSTANCE
from launcher.registry.requests import APPROVED, PENDING, REJECTED


def make(required: list[str], start: bool, options: Mapping[str, Any]) -> None:
    """Makes a pipeline, and runs it where that is asked for."""
    made = launcher.pipeline(**options, require=_numbers(required))
    if start:
        _follow(made.start())


def run_pipeline(name: str, parameters: list[str], no_wait: bool) -> None:
    execution = launcher.attach_pipeline(name).start(**read_pairs("parameters", parameters))
    print(f"execution: {execution.arn}")
    if not no_wait:
        _follow(execution)


def delete_pipeline(name: str) -> None:
    launcher.attach_pipeline(name).delete()
    print(f"deleted: {name}")


def _follow(execution: launcher.PipelineExecution) -> None:
    execution.wait()
    if package := execution.package:
        print(f"package: {package.arn}")
    else:
        print("not registered: the model has not reached what is required")


def _numbers(pairs: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, text in read_pairs("require", pairs).items():
        try:
            found[name] = float(text)
        except ValueError:
            raise UserError(f"require: {name}={text} is not a number; set {name}=0.2, say") from None
    return found


def add_options_of_pipelines(command: argparse.ArgumentParser) -> None:
    """Adds those that are not of a job."""
    command.add_argument("--group", required=True, help="of the registry, that models go to; made if missing")
    command.add_argument(
        "--require",
        nargs="+",
        required=True,
        metavar="MEASURE=NUMBER",
        help="what a model has to reach to be registered: score=0.2; the least, of prior the most",
    )
    command.add_argument("--approval", default=PENDING, help=f"of it: {PENDING}, {APPROVED} or {REJECTED}")
    command.add_argument("--check_instance", default=CHECK_INSTANCE, help="type of the steps around the training")
    command.add_argument("--dry_run", action="store_true", help="only check, and print the definition as JSON")
    command.add_argument("--start", action="store_true", help="run it once, and follow it")


def add_run(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the commands that run and delete a pipeline."""
    command = add(run_pipeline, "run_pipeline", "Run a pipeline that was made, and follow it")
    command.add_argument("name", help="of the pipeline")
    command.add_argument(
        "--parameters", nargs="+", default=[], help="NAME=VALUE: Images, InstancePrompt, ClassPrompt, LeastScore ..."
    )
    command.add_argument("--no_wait", action="store_true", help="only start it")
    add(delete_pipeline, "delete_pipeline", "Delete a pipeline that was made; its models stay").add_argument(
        "name", help="of the pipeline"
    )
