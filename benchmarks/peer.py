"""Runs diffusers' ``train_dreambooth.py`` and times its steps from inside: ``peer NAME SCRIPT STEPS [its options]``."""

from __future__ import annotations

import runpy
import sys
import time
from contextlib import ExitStack

import torch
import tqdm.auto

from benchmarks.common import emit, gpu_profile, peaks, reset_peaks

WARM_UP = 8
PROFILED = 3


def main() -> None:
    name, script, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.argv = [script, *sys.argv[4:]]
    started = 0.0
    result: dict[str, object] = {}
    profile = ExitStack()

    class TimedBar(tqdm.auto.tqdm):  # the script calls update() once an optimizer step
        def update(self, n: float | None = 1) -> bool | None:
            nonlocal started
            done = super().update(n)
            if self.n == WARM_UP:
                reset_peaks()
                started = time.perf_counter()
            if self.n == WARM_UP + steps:
                torch.cuda.synchronize()
                seconds = time.perf_counter() - started
                result.update(
                    steps_per_s=round(steps / seconds, 2), ms_per_step=round(1e3 * seconds / steps, 2), **peaks()
                )
                profile.enter_context(gpu_profile(PROFILED, result))
            if self.n == WARM_UP + steps + PROFILED:
                profile.close()
                emit(variant=name, **result)
                sys.exit(0)
            return done

    tqdm.auto.tqdm = TimedBar
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
