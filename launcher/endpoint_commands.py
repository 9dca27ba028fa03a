"""``dreambooth-launcher deploy``, ``draw`` and ``undeploy``."""

from __future__ import annotations

import argparse
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launcher
from dreambooth_sm.command_line import joined, read_pairs
from dreambooth_sm.serving.settings import ServingSettings

# What has flags of its own, or is the launcher's to set.
_OTHERS = {"base_model", "adapters", "host"}


def deploy(models: list[str], no_wait: bool, tags: list[str], **options: Any) -> None:
    given = {name: value for name, value in options.items() if value is not None}
    given |= {"tags": read_pairs("tags", tags)} if tags else {}
    endpoint = launcher.deploy(models if len(models) > 1 else models[0], wait=not no_wait, log=print, **given)
    if isinstance(endpoint, launcher.HostedEndpoint):
        print(f"draw: dreambooth-launcher draw {endpoint.name} PROMPT")
        print(f"delete: dreambooth-launcher undeploy {endpoint.name}")
        return
    with endpoint:
        print("Ctrl-C ends it", flush=True)
        threading.Event().wait()


def draw(name: str, prompt: list[str], output: Path | None, adapters: list[str] | None, **options: Any) -> None:
    asked = {key: value for key, value in {**options, "adapters": adapters}.items() if value is not None}
    first = output or Path(f"{name}.png")
    pictures = launcher.attach_endpoint(name).draw(joined(prompt) or None, **asked)
    for number, picture in enumerate(pictures, start=1):
        path = first if number == 1 else first.with_stem(f"{first.stem}-{number}")
        picture.save(path)
        print(path)


def undeploy(name: str) -> None:
    launcher.HostedEndpoint(name).delete()
    print(f"{name} is deleted, with its configuration and its model")


COMMANDS = (deploy, draw, undeploy)


def add_commands(
    add: Callable[[Callable[..., None], str, str], argparse.ArgumentParser], count: Callable[[str], int]
) -> None:
    """Adds them to the command line.

    Args:
        add: makes a command of a function, its name and its help.
        count: reads a whole number from 1.
    """
    command = add(deploy, "deploy", "Check everything, and make an endpoint that draws with trained models")
    command.add_argument(
        "models",
        nargs="+",
        help="a directory, an s3:// prefix or a package's ARN; of several, requests choose",
    )
    command.add_argument("--instance_type", default="local", help="ml.g5.xlarge, ...; auto: the cheapest that fits")
    for name, help in (
        ("name", "of the endpoint"),
        ("base_model", "that an adapter lies beside: a directory, an s3:// prefix or a hub id"),
        ("adapters", "an s3:// prefix, or a folder, with the adapters that requests may name"),
        ("bucket", "that what lies on this machine goes to; SageMaker's own if left out"),
        ("role", "name or ARN of the execution role"),
        ("image_uri", "of the image; found if left out"),
        ("asynchronous", "s3:// prefix that answers go to, of an endpoint that is asked by way of S3"),
    ):
        command.add_argument(f"--{name}", help=help)
    command.add_argument("--network_isolation", action="store_true", default=None, help="the container reaches nothing")
    command.add_argument("--instance_count", type=count, help="instances, where their number is fixed")
    command.add_argument("--min_instances", type=int, help="at any time; 0 with --asynchronous alone")
    command.add_argument("--max_instances", type=int, help="at any time")
    command.add_argument("--requests_per_instance", type=float, help="a minute, or waiting, that one is to have")
    command.add_argument("--tags", nargs="+", default=[], help="NAME=VALUE, for SageMaker")
    command.add_argument("--no_wait", action="store_true", help="only ask for it")
    settings = command.add_argument_group("server")
    for field in dataclasses.fields(ServingSettings):
        if field.name not in _OTHERS:
            meaning = f"{field.metadata['meaning']}; {str(field.default).lower()} if left out".replace("`", "")
            settings.add_argument(f"--{field.name}", help=meaning)

    command = add(draw, "draw", "Draw with an endpoint, and save the pictures")
    command.add_argument("name", help="of the endpoint")
    command.add_argument("prompt", nargs="*", help="words of the prompt")
    command.add_argument("--output", type=Path, help="file of the first picture; NAME.png if left out")
    for name, kind, help in (
        ("subject", str, "a subject that the job's report knows, or the name of an adapter"),
        ("negative_prompt", str, "what not to draw"),
        ("number", count, "of pictures"),
        ("steps", count, "of the denoiser"),
        ("guidance", float, "how much the prompt weighs"),
        ("width", count, "in pixels"),
        ("height", count, "in pixels"),
        ("seed", int, "of the first picture"),
        ("scheduler", str, "such as euler_a"),
    ):
        command.add_argument(f"--{name}", type=kind, help=help)
    command.add_argument("--adapters", nargs="+", help="names")

    add(undeploy, "undeploy", "Delete an endpoint that deploy made, with its configuration and model").add_argument(
        "name", help="of the endpoint"
    )
