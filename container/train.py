"""SageMaker's ``train``: reads the contract, runs the job, answers by exit code and failure file.

``serve``, which SageMaker calls for an endpoint, becomes ``serve.py``; other commands are answered with how to run it.

Exit codes: 0 done; 2 bad input; 143 stopped on request, with a checkpoint; 1 anything else.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from pathlib import Path

import dreambooth_sm.quiet  # noqa: F401 - before the libraries that it quiets
from dreambooth_sm import __build__, distributed, sagemaker, warm_pool
from dreambooth_sm.data.captions import read_dataset_info
from dreambooth_sm.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_STOPPED,
    StopRequested,
    SubjectsFailed,
    UserError,
)
from dreambooth_sm.fetching import fetching
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.importing import importing, leave
from dreambooth_sm.knobs.decode import split_arguments
from dreambooth_sm.printing import safe, survive_streams, traceback_lines
from dreambooth_sm.report import Reporter
from dreambooth_sm.sagemaker import Contract

USAGE = (
    "docker run IMAGE [train] [--name value ...]: trains on what is mounted at /opt/ml as SageMaker mounts it; options "
    "go over /opt/ml/input/config/hyperparameters.json, and "
    "`docker run --entrypoint python IMAGE -m dreambooth_sm.hyperparameters` lists them. "
    "docker run IMAGE serve: answers requests with the model in /opt/ml/model"
)


def main(arguments: list[str]) -> int:
    if {"--help", "-h"} & {*arguments} or arguments == ["help"]:
        print(USAGE)
        return EXIT_OK
    if arguments[:1] == ["serve"]:
        os.execv(sys.executable, [sys.executable, "-u", str(Path(__file__).with_name("serve.py")), *arguments[1:]])
    base = sagemaker.base_directory()
    stop = sagemaker.stop_event()
    report = Reporter()
    try:
        if __build__ and not distributed.is_worker():
            report.say(f"image: {__build__}")
        if arguments[:1] == ["train"]:
            arguments = arguments[1:]
        elif arguments and shutil.which(arguments[0]):
            raise UserError(
                "this image trains, with `train` or without a command; run another program of it with "
                f"`docker run --entrypoint {arguments[0]} IMAGE ...`"
            )
        options = split_arguments(arguments)
        contract = sagemaker.read_contract(base, need_hyperparameters=not options)
        warm_pool.keep_compiled()
        hyperparameters = Hyperparameters.parse(
            {**contract.hyperparameters, **options},
            dataset_info=lambda directory: read_dataset_info(Path(contract.localize(directory))),
        )
        with fetching(hyperparameters):
            if distributed.is_worker():
                return train(hyperparameters, contract, report, stop)
            processes = distributed.count_processes(hyperparameters.num_processes, on_cpu=hyperparameters.use_cpu)
            if processes * len(contract.hosts) > 1:
                return distributed.run_workers([sys.executable, "-u", __file__, *arguments], contract, processes)
            return train(hyperparameters, contract, report, stop)
    except UserError as error:
        return fail(base, "\n".join([*error.problems, *getattr(error, "__notes__", ())]), EXIT_BAD_INPUT)
    except SubjectsFailed as error:
        return fail(base, str(error), EXIT_FAILURE)
    except StopRequested as request:
        report.say(f"stopped: {request}")
        return EXIT_STOPPED
    except Exception as error:
        print(*traceback_lines(error), sep="\n", file=sys.stderr)
        words = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
        return fail(base, "; ".join(words), EXIT_FAILURE)


def train(hyperparameters: Hyperparameters, contract: Contract, report: Reporter, stop: threading.Event) -> int:
    """Runs the job in this process."""
    with importing():  # torch, which bad input does not have to wait for
        from dreambooth_sm.fleet.run import run_fleet
        from dreambooth_sm.job import run

    if hyperparameters.fleet is None:
        run(hyperparameters, contract, report=report, stop=stop)
    else:
        run_fleet(hyperparameters, contract, report=report, stop=stop)
    return EXIT_OK


def fail(base: Path, reason: str, code: int) -> int:
    """Says why the job failed, a line a problem, in the log and in the failure file."""
    for line in reason.split("\n"):
        print(f"error: {safe(line)}", file=sys.stderr, flush=True)
    if not base.is_dir():  # no platform reads the failure file
        return code
    try:
        sagemaker.write_failure(base, reason)
    except OSError as error:
        print(f"the failure file can't be written: {error}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    survive_streams()
    leave(main(sys.argv[1:]))
