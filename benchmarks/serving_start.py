"""From the start of a server's process until it can draw, and its first pictures: a model of random weights, on disk.

    python -m benchmarks.serving_start [--model sdxl] [--repeat 3]

The model is made once, in the system's temporary directory, in 16 bits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import MODELS, emit
from launcher.local.server_process import ServerProcess
from tests.helpers.serving import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    tree = Path(tempfile.gettempdir()) / "dreambooth-sm-serving-start" / options.model
    if not (tree / "model").is_dir():
        MODELS[options.model]().save(tree / "model", torch.float16)
    torch.cuda.empty_cache()
    for _ in range(options.repeat):
        began = time.perf_counter()
        server = ServerProcess(tree, {})
        try:
            server.wait()
            ready, client, pictures = time.perf_counter() - began, Client(server.port), []
            for seed in range(3):
                began = time.perf_counter()
                client.draw({"prompt": "photo of a hat", "seed": seed, "steps": 25}, Accept="image/jpeg")
                pictures.append(round(time.perf_counter() - began, 2))
        finally:
            server.end()
        emit(model=options.model, ready_s=round(ready, 2), pictures_s=pictures)


if __name__ == "__main__":
    main()
