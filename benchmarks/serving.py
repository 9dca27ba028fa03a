"""An endpoint under load: clients that ask again as soon as they are answered, each with prompts and seeds of its own.

    python -m benchmarks.serving --model toybox --clients 8 --requests 40
    python -m benchmarks.serving --model sd15 --clients 16 --requests 160 --manners diffusers one together adapters

``diffusers`` draws with diffusers' own pipeline, one picture at a time; ``one`` is the server with ``batch=1``,
``together`` with as many as there are clients, and ``adapters`` the same where each request names one of ``--adapters``
random ones.
Where others use the machine, ``cpu_s`` counts: processor seconds of this process, clients included, for a picture.
"""

from __future__ import annotations

import argparse
import json
import os
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
from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.layers import LowRank
from dreambooth_sm.adapters.peft_file import write_peft
from dreambooth_sm.serving.engine import Engine
from dreambooth_sm.serving.served_model import ServedModel, open_served
from dreambooth_sm.serving.settings import ServingSettings
from dreambooth_sm.toybox import BASE
from tests.helpers.serving import served

_TOYBOX = "toybox"
_RANK = 16
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
    model: ServedModel, options: argparse.Namespace, batch: int, adapters: Path | None = None
) -> Iterator[Draw]:
    place = str(adapters) if adapters else None
    settings = ServingSettings(batch=batch, queue=10_000, adapters=place, adapter_slots=max(4, options.adapters))
    engine = Engine(model, settings)
    with served(engine) as (client, _):

        def draw(number: int) -> None:
            request = {"prompt": _prompt(number), "seed": number, "steps": options.steps}
            if adapters:
                request["adapters"] = [str(number % options.adapters)]
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
        for number in range(options.adapters):
            write_peft(Path(folder, f"{number}.safetensors"), _random_adapter(model, number))
            Path(folder, str(number)).symlink_to(f"{number}.safetensors")
        with _server(model, options, options.clients, Path(folder)) as draw:
            yield draw


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
}

if __name__ == "__main__":
    main()
