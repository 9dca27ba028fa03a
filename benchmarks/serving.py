"""An endpoint under load: clients that ask again as soon as they are answered, each with prompts and seeds of its own.

    python -m benchmarks.serving --model toybox --clients 8 --requests 40
    python -m benchmarks.serving --model sd15 --clients 16 --requests 160 --manners diffusers one together adapters

``diffusers`` draws with diffusers' own pipeline, one picture at a time; ``one`` is the server with ``batch=1``,
``together`` with as many as there are clients, and ``adapters`` the same where each request names one of ``--adapters``
random ones. ``zipf`` is ``adapters`` where they lie in S3, 20 ms away, and are asked for by Zipf's law: the second half
as often as the first, the third a third as often. ``first`` draws one at a time, each with an adapter that was not
asked for before, from there.
Where others use the machine, ``cpu_s`` counts: processor seconds of this process, clients included, for a picture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import DEVICE, MODELS, emit
from benchmarks.transfer import null_server
from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.layers import LowRank
from dreambooth_sm.adapters.peft_file import write_peft
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.serving.engine import Engine
from dreambooth_sm.serving.report import REPORT
from dreambooth_sm.serving.served_model import ServedModel, open_served
from dreambooth_sm.serving.settings import ServingSettings
from dreambooth_sm.toybox import BASE
from tests.helpers.serving import served

_TOYBOX = "toybox"
_RANK = 16
_DELAY_MS = 20
# Files that lie in S3, each under many names: to make a thousand takes minutes, and to read them is as much work.
_MOST_FILES = 40
Draw = Callable[[int], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[_TOYBOX, *MODELS], default=_TOYBOX)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--manners", nargs="+", choices=_MANNERS, default=list(_MANNERS))
    options = parser.parse_args()
    model = open_served(BASE, None) if options.model == _TOYBOX else ServedModel(MODELS[options.model]())
    for manner in options.manners:
        # Of each request the server prints a line.
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), _MANNERS[manner](model, options) as draw:
            measured = measure(draw, options.clients, options.requests)
        emit(model=options.model, manner=manner, steps=options.steps, **measured)


def measure(draw: Draw, clients: int, requests: int) -> dict[str, float]:
    """Pictures a second, and the seconds of requests, after as many that count for nothing as there are clients."""
    seconds: list[float] = []

    def timed(number: int) -> None:
        began = time.perf_counter()
        draw(number)
        seconds.append(time.perf_counter() - began)

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(draw, range(clients)))
        began, busy = time.perf_counter(), time.process_time()
        list(threads.map(timed, range(requests)))
        wall, cpu = time.perf_counter() - began, time.process_time() - busy
    ordered = sorted(seconds)
    return {
        "clients": clients,
        "requests": requests,
        "pictures_per_s": round(requests / wall, 3),
        "p50_s": round(ordered[len(ordered) // 2], 3),
        "p95_s": round(ordered[int(len(ordered) * 0.95)], 3),
        "cpu_s": round(cpu / requests, 3),
        "most_host_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


@contextmanager
def _diffusers(model: ServedModel, options: argparse.Namespace) -> Iterator[Draw]:
    """The pipeline of diffusers, with a lock around it."""
    dtype = torch.float32 if DEVICE.type == "cpu" else model.model.half
    loaded = model.model.with_parts({part: model.model.part(part, DEVICE, dtype) for part in model.model.modules})
    pipeline: Any = loaded.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    lock = threading.Lock()

    def draw(number: int) -> None:
        with lock:
            generator = torch.Generator().manual_seed(number)
            pipeline(_prompt(number), num_inference_steps=options.steps, generator=generator)

    yield draw


@contextmanager
def _server(
    model: ServedModel,
    options: argparse.Namespace,
    batch: int,
    adapters: str | None = None,
    choose: Callable[[int], int] = int,
) -> Iterator[Draw]:
    slots = max(4, min(options.adapters, 2 * batch))
    engine = Engine(model, ServingSettings(batch=batch, queue=10_000, adapters=adapters, adapter_slots=slots))
    with served(engine) as (client, _):

        def draw(number: int) -> None:
            request = {"prompt": _prompt(number), "seed": number, "steps": options.steps}
            if adapters:
                request["adapters"] = [str(choose(number))]
            answer = client.draw(request, Accept="image/jpeg")  # random weights draw noise, which PNG is slow with
            if answer.status != 200:
                raise RuntimeError(json.dumps(answer.json))

        yield draw
    engine.close()


def _one(model: ServedModel, options: argparse.Namespace) -> Any:
    return _server(model, options, 1)


def _together(model: ServedModel, options: argparse.Namespace) -> Any:
    return _server(model, options, options.clients)


@contextmanager
def _with_adapters(model: ServedModel, options: argparse.Namespace) -> Iterator[Draw]:
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder), model, options.adapters)
        with _server(model, options, options.clients, folder, lambda number: number % options.adapters) as draw:
            yield draw


@contextmanager
def _by_zipf(model: ServedModel, options: argparse.Namespace) -> Iterator[Draw]:
    weights = list(itertools.accumulate(1 / rank for rank in range(1, options.adapters + 1)))

    def choose(number: int) -> int:
        return random.Random(number).choices(range(options.adapters), cum_weights=weights)[0]

    with _in_s3(model, options.adapters) as place, _server(model, options, options.clients, place, choose) as draw:
        yield draw


@contextmanager
def _first(model: ServedModel, options: argparse.Namespace) -> Iterator[Draw]:
    numbers = itertools.count()
    count = options.clients + options.requests
    with _in_s3(model, count) as place, _server(model, options, 1, place, lambda number: next(numbers)) as draw:
        yield draw


@contextmanager
def _in_s3(model: ServedModel, count: int) -> Iterator[str]:
    """Adapters in an S3 server of this machine.

    Yields:
        the prefix that they lie below.
    """
    with tempfile.TemporaryDirectory() as folder, null_server(Path(folder), _DELAY_MS) as address:
        lay_out(Path(folder, "bucket", "adapters"), model, count)
        os.environ |= {"AWS_ENDPOINT_URL_S3": address, "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        yield "s3://bucket/adapters"


def lay_out(folder: Path, model: ServedModel, count: int) -> None:
    """Adapters, named by their numbers, as jobs leave them."""
    for number in range(count):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / REPORT).write_text("{}")
        file = folder / str(number) / FILE
        if number < _MOST_FILES:
            write_peft(file, _random_adapter(model, number), dtype=torch.float16)
        else:
            os.link(folder / str(number % _MOST_FILES) / FILE, file)


def _random_adapter(model: ServedModel, seed: int) -> Adapter:
    """An adapter of random numbers beside the layers that adapters lie beside where nobody says otherwise."""
    facts = model.model.family.facts
    generator = torch.Generator().manual_seed(seed)
    ends = tuple(f".{end}" for end in facts.adapted["linear"].denoiser)
    layers = {}
    for name, weight in model.model.weights(facts.denoiser).items():
        layer = name.removesuffix(".weight")
        if layer != name and layer.endswith(ends) and len(weight.shape) == 2:
            rows, columns = weight.shape
            down = torch.randn(_RANK, columns, generator=generator) / columns**0.5
            layers[layer] = LowRank(down, 0.01 * torch.randn(rows, _RANK, generator=generator))
    return Adapter({facts.denoiser: layers})


def _prompt(number: int) -> str:
    return f"photo of a hat number {number}"


_MANNERS: dict[str, Callable[[ServedModel, argparse.Namespace], Any]] = {
    "diffusers": _diffusers,
    "one": _one,
    "together": _together,
    "adapters": _with_adapters,
    "zipf": _by_zipf,
    "first": _first,
}

if __name__ == "__main__":
    main()
