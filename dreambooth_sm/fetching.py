"""Fetches what a job's base model is made of in processes of their own, while the job imports and checks."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_sm import quiet, sources  # noqa: F401 - before the hub's client
from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import DownloadError
from dreambooth_sm.transfers import UNCHECKED
from dreambooth_sm.warm_pool import UNFINISHED

if TYPE_CHECKING:
    from dreambooth_sm.hyperparameters import Hyperparameters

# Times that a process is asked which files it has open, and seconds between two.
_LOOKS, _LOOK_S = 5, 0.02
# Seconds after which a job that waits looks whether it is to stop.
_STOP_S = 0.1
# What is being written is called so until it is whole: by the hub's client, and by ours.
_UNFINISHED = (".incomplete", UNCHECKED)


@dataclass(frozen=True)
class Wanted:
    """A model to fetch, see :func:`dreambooth_sm.sources.fetch`."""

    name: str
    revision: str | None = None
    variant: str | None = None
    token_secret: str | None = None
    without: str | None = None


@dataclass(frozen=True)
class WantedBase:
    """What a base model is made of.

    Attributes:
        model: the model, or the file of its denoiser.
        vae: the VAE in the place of the model's.
        parts: the model that has the other parts of such a file.
    """

    model: Wanted
    vae: Wanted | None
    parts: Wanted | None

    @classmethod
    def of(cls, h: Hyperparameters) -> WantedBase:
        name = sources.RENAMED.get(h.pretrained_model_name_or_path, h.pretrained_model_name_or_path)
        vae, parts, token = h.pretrained_vae_name_or_path, h.pretrained_parts_name_or_path, h.hf_token_secret
        return cls(
            Wanted(name, token_secret=token) if parts else Wanted(name, h.revision, h.variant, token),
            Wanted(vae, token_secret=token) if vae else None,
            Wanted(parts, h.revision, h.variant, token, h.facts.denoiser) if parts else None,
        )

    @property
    def all(self) -> tuple[Wanted, ...]:
        return tuple(each for each in (self.model, self.vae, self.parts) if each)


_begun: dict[Wanted, subprocess.Popen[str]] = {}


@contextmanager
def fetching(h: Hyperparameters) -> Iterator[None]:
    """Begins to fetch the base model of a job, for :func:`fetch` to wait for.

    What is still on its way when the block ends is not wanted any more: its process is stopped, and nothing unfinished
    stays on the disk.
    """
    try:
        for wanted in WantedBase.of(h).all:
            if not sources.is_local(wanted.name):
                _begun[wanted] = subprocess.Popen(
                    [sys.executable, "-m", __name__, json.dumps(asdict(wanted))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,  # a terminal's Ctrl-C reaches the job, which ends it
                )
        yield
    finally:
        for process in _begun.values():
            _end(process)
        _begun.clear()


def wait(h: Hyperparameters, stop: threading.Event) -> None:
    """Waits until what :func:`fetching` has begun is here or has failed, or until the job is to stop."""
    for process in [_begun[wanted] for wanted in WantedBase.of(h).all if wanted in _begun]:
        assert process.stdout
        while not stop.is_set() and not select.select([process.stdout], [], [], _STOP_S)[0]:
            pass


def fetch(wanted: Wanted) -> Path:
    """What :func:`dreambooth_sm.sources.fetch` returns or raises, by a process that has begun already where there is
    one."""
    answer: dict[str, Any] = {}
    if process := _begun.pop(wanted, None):
        assert process.stdout
        try:
            lines = process.stdout.read().splitlines()
            process.wait()
        finally:
            _end(process)
        with suppress(IndexError, ValueError):  # one that was killed says nothing: this one tries
            answer = json.loads(lines[-1])
    if "problems" in answer:
        raise UserError(answer["problems"])
    if "failure" in answer:
        raise DownloadError(answer["failure"])
    return sources.use(Path(answer["path"])) if "path" in answer else sources.fetch(**asdict(wanted))


def _end(process: subprocess.Popen[str]) -> None:
    """Waits for a process that is done; stops another, and removes what it was writing."""
    assert process.stdin
    assert process.stdout
    unfinished: set[Path] = set()
    before: set[Path] = set()
    for look in range(_LOOKS):  # one that was closed a moment ago has its name soon
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGSTOP)  # begins no more files
        os.waitpid(process.pid, os.WUNTRACED)
        now = {path for path in _open_files(process.pid) if path.suffix in _UNFINISHED}
        unfinished |= now
        if (now and now == before) or look == _LOOKS - 1:
            break
        before = now
        process.send_signal(signal.SIGCONT)
        time.sleep(_LOOK_S)
    if process.poll() is None:
        process.kill()
    process.wait()
    for path in unfinished:
        path.unlink(missing_ok=True)
        for directory in path.parents:
            if directory.suffix == UNFINISHED:
                shutil.rmtree(directory, ignore_errors=True)
    process.stdin.close()
    process.stdout.close()


def _open_files(process: int) -> Iterator[Path]:
    for descriptor in Path(f"/proc/{process}/fd").glob("*"):
        with suppress(OSError):
            yield descriptor.readlink()


def _end_with_the_job() -> None:
    """Waits until the job was killed, and ends this process."""
    sys.stdin.read()
    os._exit(0)


def main(wanted: str) -> None:
    """Fetches, and prints in JSON where the model lies or what was wrong."""
    threading.Thread(target=_end_with_the_job, daemon=True).start()
    answer: dict[str, Any]
    try:
        answer = {"path": str(sources.fetch(**json.loads(wanted)))}
    except UserError as error:
        answer = {"problems": error.problems}
    except DownloadError as error:
        answer = {"failure": str(error)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
