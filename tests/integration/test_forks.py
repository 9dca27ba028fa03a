"""The tests' own fork server: what a job can see of its process is as in a Python of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import forks
from tests.helpers.patience import PATIENCE

STARTS = (subprocess.Popen, forks.Popen)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="jobs are forked on Linux only")


def scripts(path: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command that is forked as a job's is."""
    path.write_text(code)
    monkeypatch.setattr(forks, "ENTRYPOINT", path)
    return [sys.executable, "-u", str(path), "train", "--name", "two words"]


FACTS = """
import json, os, signal, sys
os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
json.dump({
    "name": __name__, "file": __file__, "argv": sys.argv, "path": sys.path[0], "directory": os.getcwd(),
    "environment": {k: v for k, v in os.environ.items() if k not in ("PYTORCH_CUDA_ALLOC_CONF", "GOMP_SPINCOUNT")},
    "alone": os.getpgid(0) == os.getpid(), "session": os.getsid(0), "input": sys.stdin.read(),
    "encodings": [(s.encoding, s.errors, s.line_buffering, s.write_through) for s in (sys.stdout, sys.stderr)],
    "signals": [str(signal.getsignal(n)) for n in signal.valid_signals()],
    "descriptors": sorted(os.listdir("/proc/self/fd"))[:-1],
}, sys.stdout)
"""


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("group", [None, 0], ids=["the tests' group", "a group of its own"])
def test_what_a_fork_finds_is_what_a_process_finds(
    group: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if group is not None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    command = scripts(tmp_path / "job.py", FACTS, monkeypatch)
    environment = {**forks._ENVIRONMENT, "DREAMBOOTH_SM_TEST": "café \udcff"}
    found = []
    for start in STARTS:
        process = start(
            command,
            env=environment,
            cwd=tmp_path,
            process_group=group,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        output, _ = process.communicate("a line\n", timeout=PATIENCE)
        assert process.returncode == 0
        found.append(output)
    assert found[0] == found[1]
    assert process._status is not None, "it was forked"


@pytest.mark.parametrize(
    "code",
    [
        "",
        "raise SystemExit(3)",
        "raise SystemExit('words')",
        "raise KeyError('name')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import atexit, sys; atexit.register(print, 'at the end'); sys.stderr.write('half a line')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('in a thread'))).start()",
    ],
)
def test_a_fork_ends_as_a_process_does(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = scripts(tmp_path / "job.py", code, monkeypatch)
    ended = []
    for start in STARTS:
        process = start(command, env=forks._ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output, _ = process.communicate(timeout=PATIENCE)
        # A traceback shows more frames of a fork.
        ended.append((process.returncode, output.splitlines()[-1:]))
    assert ended[0] == ended[1]


@pytest.mark.usefixtures("terminal")
def test_a_fork_gets_its_signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); print('on'); signal.pause()"
    command = scripts(tmp_path / "job.py", code, monkeypatch)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, -signal.SIGINT)):
        process = forks.Popen(command, env=forks._ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        process.stdout.readline()
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
        process.send_signal(number)
        assert process.wait(timeout=PATIENCE) == code
        process.stdout.close()
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "HF_HUB_OFFLINE", "PYTHONIOENCODING", "LC_ALL"])
def test_where_imports_would_differ_a_job_is_not_a_fork(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = scripts(tmp_path / "job.py", "", monkeypatch)
    process = forks.Popen(command, env={**forks._ENVIRONMENT, name: "utf-8"})
    assert process.wait(timeout=PATIENCE) == 0
    assert process._status is None
