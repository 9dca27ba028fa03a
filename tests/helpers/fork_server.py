"""The process that jobs are forked from: see :mod:`tests.helpers.forks`.

Run as ``python -m tests.helpers.fork_server DESCRIPTOR MODULE...``, of a socket, with what the jobs find imported: each
message is a :class:`Job` in JSON, with the descriptors of its standard input, output and error and of a pipe, to which
its process id goes and, when it has ended, its status.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3.session

from dreambooth_sm import distributed
from dreambooth_sm.storage import s3_client
from tests.helpers.aws_descriptions import remembered
from tests.helpers.drawing import FEW_STEPS, draw_otherwise

# Steps of a job that no test waits for, and of one that may be stopped on its way.
MANY, SOME = 1000, 10
# What may be ignored from the start: a shell does so in the background, and ``nohup``.
TERMINAL = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)


@dataclass(frozen=True)
class Job:
    """A Python script to run, with its arguments; ``group`` as in :class:`subprocess.Popen`, ``ignored``
    the signals that it does not get unless it asks for them."""

    arguments: list[str]
    unbuffered: bool
    environment: dict[str, str]
    directory: str
    group: int | None
    ignored: list[int]


def _serve(requests: socket.socket) -> tuple[Job, list[int]]:
    """Forks until nobody can ask any more; returns in each fork, with its job and its three streams."""
    running = selectors.DefaultSelector()
    running.register(requests, selectors.EVENT_READ)
    while True:
        for key, _ in running.select():
            if key.data:
                process, status = key.data
                _tell(status, os.waitpid(process, 0)[1])
                running.unregister(key.fd)
                os.close(key.fd)
                os.close(status)
                continue
            message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 4)
            if not message:
                os._exit(0)
            *streams, status = descriptors
            process = os.fork()
            if not process:
                for other in [other for other in running.get_map().values() if other.data]:
                    os.close(other.fd)
                    os.close(other.data[1])
                for ours in (running, requests):
                    ours.close()
                os.close(status)
                return Job(**json.loads(message)), streams
            for stream in streams:
                os.close(stream)
            _tell(status, process)
            running.register(os.pidfd_open(process), selectors.EVENT_READ, (process, status))


class Worker(subprocess.Popen[Any]):
    """A process that trains together with others: a fork of the job that starts it."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            return
        try:
            _, *arguments = args
            unbuffered = arguments[0] == "-u"
            ignored = [number for number in TERMINAL if signal.getsignal(number) is signal.SIG_IGN]
            job = Job(arguments[unbuffered:], unbuffered, dict(rest[5]), str(Path.cwd()), None, ignored)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _become(job, [], {})
            _run(job.arguments[0])
        finally:
            os._exit(1)


def _take_time_for_steps() -> None:
    """A job of many steps is there to be stopped: it does not compute all the time until it is; and one of some steps
    is not through with them before a test on a busy machine stops it."""
    from dreambooth_sm.training.loop import Trainer

    step = Trainer.optimizer_step

    def slowly(trainer: Trainer, rate: float) -> Any:
        if trainer.schedule.steps >= SOME and trainer.step > 2:
            time.sleep(0.2 if trainer.schedule.steps >= MANY else 0.03)
        return step(trainer, rate)

    Trainer.optimizer_step = slowly  # type: ignore[method-assign]


def _tell(status: int, number: int) -> None:
    with suppress(BrokenPipeError):  # nobody wants to know
        os.write(status, number.to_bytes(4, sys.byteorder, signed=True))


def _become(job: Job, streams: list[int], from_imports: Mapping[str, str]) -> None:
    """Takes on a job's streams, environment, directory, process group and arguments."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    if job.group not in (None, -1):
        os.setpgid(0, job.group)
    for number in TERMINAL:
        own = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in job.ignored else own)
    os.chdir(job.directory)
    os.environ.clear()
    os.environ.update({**from_imports, **job.environment})
    tempfile.tempdir = None  # TMPDIR is the job's own
    for name, number in (("stdout", 1), ("stderr", 2)):
        before, raw = getattr(sys, name), io.FileIO(number, "w", closefd=False)
        stream = io.TextIOWrapper(
            raw if job.unbuffered else io.BufferedWriter(raw),
            before.encoding,
            before.errors,
            line_buffering=name == "stderr" and not job.unbuffered,
            write_through=job.unbuffered,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = job.arguments
    sys.path[0] = str(Path(job.arguments[0]).parent)


def _follow_exec(arguments: list[str]) -> None:
    """The program becomes another one for ``serve``, as it is started anew: a fork is that one at once."""
    if arguments[1:2] == ["serve"]:
        arguments[:2] = [str(Path(arguments[0]).with_name("serve.py"))]


def _run(script: str) -> None:
    """Runs a script and ends as the interpreter does, without a second of tearing down what it has imported."""
    code: object = 1
    interrupted = False
    try:
        runpy.run_path(script, run_name="__main__")
        code = None
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        interrupted = isinstance(error, KeyboardInterrupt)
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code or 0)


def _find_tiny_models_to_run() -> None:
    """No fork tries again whether the parts of the tests' base models belong together."""
    from dreambooth_sm.models import read_stored
    from tests.helpers.tiny import save_tiny_pipeline, save_tiny_xl_pipeline

    with tempfile.TemporaryDirectory() as folder:
        for number, save in enumerate((save_tiny_pipeline, save_tiny_xl_pipeline)):
            read_stored(save(Path(folder, str(number))))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, whose end ends this process
    before = {*os.environ}
    for module in sys.argv[2:]:
        importlib.import_module(module)
    from_imports = {name: value for name, value in os.environ.items() if name not in before}
    with remembered():
        s3_client(boto3.session.Session("key", "secret", region_name="us-east-1"))  # remembers for all forks
        draw_otherwise(setattr, **FEW_STEPS)
        if "torch" in sys.modules:
            _find_tiny_models_to_run()
            _take_time_for_steps()
        distributed.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": Worker})  # type: ignore[attr-defined]
        if len([*Path("/proc/self/task").iterdir()]) > 1:
            raise RuntimeError("something has started threads, which no fork would have")
        gc.collect()
        gc.freeze()  # what the forks share is not walked, and so not copied, by each of them
        job, streams = _serve(socket.socket(fileno=int(sys.argv[1])))
        _follow_exec(job.arguments)
        _become(job, streams, from_imports)
        _run(job.arguments[0])


if __name__ == "__main__":
    main()
