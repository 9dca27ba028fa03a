"""Jobs as forks of one process that has imported what a job imports: a start costs milliseconds, not 5 CPU seconds.

To whoever starts it, a fork is a process like any other, with its own process id, environment, directory, arguments,
streams and process group; signals and exit codes are real. But its modules were imported before: a job whose
environment differs in what is read meanwhile gets a Python of its own, and tests of how a process starts and ends use
:mod:`subprocess`.
"""

from __future__ import annotations

import atexit
import dataclasses
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from launcher.local.program import ENTRYPOINT
from tests.helpers.fork_server import TERMINAL, Job

ROOT = Path(__file__).parents[2]
# Variables that Python, torch and the other libraries read when they are loaded.
_READ_ON_IMPORT = re.compile(
    r"HOME|LANG|LANGUAGE|TZ|VIRTUAL_ENV|(LC|LD|PYTHON|XDG)\w*"
    r"|(CUDA|NVIDIA|NCCL|GLOO|OMP|GOMP|KMP|MKL|OPENBLAS|TORCH|PYTORCH|TRITON|BNB|XFORMERS)_\w+"
    r"|HF_(?!TOKEN$)\w+|(HUGGING\w+|DIFFUSERS|TRANSFORMERS|SAFETENSORS|ACCELERATE)_\w+"
)
# The environment that the jobs' modules are imported in: as it is before tests change it.
_ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | {"CUDA_VISIBLE_DEVICES": ""}
# What a job imports, in its order: at its start, for its model, and what the libraries load for it later.
_MODULES = (
    "dreambooth_sm.quiet",
    "dreambooth_sm.job",
    "dreambooth_sm.stored.classes",
    "diffusers.optimization",
    "diffusers.schedulers.scheduling_deis_multistep",
    "diffusers.schedulers.scheduling_dpmsolver_singlestep",
    "diffusers.schedulers.scheduling_edm_euler",
    "diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete",
    "diffusers.schedulers.scheduling_k_dpm_2_discrete",
    "diffusers.schedulers.scheduling_unipc_multistep",
)
_PATHS = (str(Path(__file__).parent / "without_torch"), os.environ.get("PYTHONPATH"))
# Of a job that ends if it imports torch.
WITHOUT_TORCH = {"PYTHONPATH": os.pathsep.join(filter(None, _PATHS))}
# What is imported in each environment; in any other, jobs are not forked.
_SERVERS = ((_ENVIRONMENT, _MODULES), (_ENVIRONMENT | WITHOUT_TORCH, ("container.train",)))


class Popen(subprocess.Popen[Any]):
    """A :class:`subprocess.Popen` that forks jobs; any other command is started as ever."""

    _status: io.FileIO | None = None

    def _execute_child(self, args: Any, *rest: Any) -> None:
        _, preexec_fn, _, pass_fds, cwd, env, _, _, shell, *pipes = rest[:15]
        _, *identity, start_new_session, process_group = rest[15:]
        environment = dict(os.environ if env is None else env)
        special = preexec_fn or pass_fds or shell or start_new_session or identity != [None, None, None, -1]
        words = [] if special or isinstance(args, str | bytes | os.PathLike) else [os.fsdecode(word) for word in args]
        unbuffered = words[1:2] == ["-u"]
        python, script, *arguments = [*words[:1], *words[1 + unbuffered :], "", ""]
        server = _server_like(environment)
        if [python, script] != [sys.executable, str(ENTRYPOINT)] or server is None:
            super()._execute_child(args, *rest)
            return
        directory = os.fsdecode(cwd or Path.cwd())
        ignored = [number for number in TERMINAL if signal.getsignal(number) is signal.SIG_IGN]
        job = Job([script, *arguments[:-2]], unbuffered, environment, directory, process_group, ignored)
        streams = [own if given == -1 else given for own, given in enumerate((pipes[0], pipes[3], pipes[5]))]
        ours, theirs = os.pipe()
        self._status = io.FileIO(ours)
        try:
            socket.send_fds(_server(server), [json.dumps(dataclasses.asdict(job)).encode()], [*streams, theirs])
        finally:
            os.close(theirs)
            self._close_pipe_fds(*pipes)
        self.pid = self._told()
        self._child_created = True

    def _told(self) -> int:
        """The server's next number: first the process id and then, once the job has ended, how."""
        assert self._status is not None
        told = self._status.read(4)
        if told is None:
            raise BlockingIOError
        if not told:
            raise ChildProcessError("the process that forks jobs has ended")
        return int.from_bytes(told, sys.byteorder, signed=True)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._status is None:
            return super()._try_wait(wait_flags)
        os.set_blocking(self._status.fileno(), not wait_flags & os.WNOHANG)
        try:
            ended = self._told()
        except BlockingIOError:
            return 0, 0
        self._status.close()
        return self.pid, ended

    def _internal_poll(self, *arguments: Any, **more: Any) -> int | None:
        if self._status is None:
            return super()._internal_poll(*arguments, **more)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                process, ended = self._try_wait(os.WNOHANG)
                if process:
                    self._handle_exitstatus(ended)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def _server_like(environment: Mapping[str, str]) -> int | None:
    """The number of the server whose modules come out as if they were imported in this environment."""
    if sys.platform != "linux":
        return None
    wanted = _read_on_import(environment)
    return next((i for i, (theirs, _) in enumerate(_SERVERS) if _read_on_import(theirs) == wanted), None)


def _read_on_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if _READ_ON_IMPORT.fullmatch(name)}


@cache
def _server(number: int) -> socket.socket:
    """The socket of a process that forks, which is started first; it ends with this process."""
    environment, modules = _SERVERS[number]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "tests.helpers.fork_server", str(theirs.fileno()), *modules]
        process = subprocess.Popen(command, env=environment, cwd=ROOT, pass_fds=[theirs.fileno()])
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours
