"""Seconds to write, check and load the checkpoint of an SD 1.5 job as a T4 runs it.

    python -m benchmarks.checkpoint [--directory DIR]

UNet and text encoder, 982.6 M parameters: weights in full precision and Adam's two moments in 8 bits. A job that gets
SIGTERM has to have it written within a minute. `plain` is torch.save alone, without the checksum.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dreambooth_sm.training.checkpoint import latest_checkpoint, save_checkpoint

PARAMETERS = 859_520_964 + 123_060_480
TENSORS = 200  # of about the size of a UNet's larger ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="the system's temporary directory by default")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    each = PARAMETERS // TENSORS
    weights = {f"weight.{number}": torch.randn(each) for number in range(TENSORS)}
    moments = {f"moment.{number}": torch.randint(0, 256, (2, each), dtype=torch.uint8) for number in range(TENSORS)}
    state = {"weights": weights, "step": moments}

    def seconds(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return round(time.perf_counter() - started, 1)

    result: dict[str, list[float]] = {"plain_s": [], "save_s": [], "to_disk_s": [], "check_s": [], "load_s": []}
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="checkpoint-") as folder:
        for step in range(1, options.repeat + 1):
            plain = Path(folder) / "plain.pt"
            result["plain_s"].append(seconds(lambda: torch.save(state, plain)))  # noqa: B023 - called at once
            plain.unlink()
            os.sync()
            result["save_s"].append(seconds(lambda: save_checkpoint(Path(folder), step, {}, state, keep=1)))  # noqa: B023
            result["to_disk_s"].append(seconds(os.sync))
            found = latest_checkpoint(Path(folder))
            assert found
            result["check_s"].append(seconds(found.is_undamaged))
            result["load_s"].append(seconds(found.load))
            size = sum(path.stat().st_size for path in found.directory.iterdir())
    print(json.dumps({"bytes": size} | {name: min(values) for name, values in result.items()}))


if __name__ == "__main__":
    main()
