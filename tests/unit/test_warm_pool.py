"""The disk of a warm pool: how much of it models take, and what is left alone."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth_sm import warm_pool
from dreambooth_sm.errors import UserError
from dreambooth_sm.warm_pool import bound, keep_compiled


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Four models of a thousand bytes each, used one after another, one of them of the hub."""
    directory = tmp_path / "models"
    for age, name in enumerate(["hub/models--me--old", "b", "c", "d"]):
        model = directory / name
        (model / "snapshots").mkdir(parents=True)
        (model / "weights").write_bytes(bytes(1000))
        (model / "snapshots" / "weights").symlink_to(model / "weights")
        os.utime(model, (1e9 + age, 1e9 + age))
    (directory / "b.lock").touch()
    return directory


def left(models: Path) -> set[str]:
    return {path.parent.name for path in models.rglob("weights") if path.parent.name != "snapshots"}


def test_the_models_that_were_not_used_for_longest_go_first(models: Path) -> None:
    bound(models, most=4000)
    assert left(models) == {"models--me--old", "b", "c", "d"}
    bound(models, most=3999)
    assert left(models) == {"b", "c", "d"}
    bound(models, models / "b" / "weights", most=3000)  # is used, and so the newest
    bound(models, most=1500)
    assert left(models) == {"b"}


def test_what_this_process_uses_stays_whatever_its_size(models: Path) -> None:
    bound(models, models / "hub" / "models--me--old" / "snapshots", most=10)
    assert left(models) == {"models--me--old"}
    bound(models, most=10)
    assert left(models) == {"models--me--old"}
    # Of another process, such as the next job, it does not.
    code = f"from pathlib import Path; from dreambooth_sm.warm_pool import bound; bound(Path({str(models)!r}), most=10)"
    held = warm_pool._held.pop(models / "hub" / "models--me--old")
    subprocess.run([sys.executable, "-c", code], check=True)
    assert left(models) == {"models--me--old"}
    held.close()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert left(models) == set()


def test_what_a_job_left_half_written_goes_unless_somebody_writes_it_now(models: Path) -> None:
    for name in ("e", "f"):
        (models / f"{name}.partial").mkdir()
        (models / f"{name}.partial" / "weights").write_bytes(bytes(10))
    with (models / "f.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        bound(models, most=10**6)
        assert {path.name for path in models.glob("*.partial")} == {"f.partial"}
    bound(models, most=10**6)
    assert not [*models.glob("*.partial")]
    assert left(models) == {"models--me--old", "b", "c", "d"}


def test_a_share_of_the_disk_is_far_more_than_this(models: Path) -> None:
    bound(models)
    assert left(models) == {"models--me--old", "b", "c", "d"}


def test_compiled_kernels_are_kept_unless_their_variables_say_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", warm_pool.VARIABLE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    keep_compiled()
    assert "TRITON_CACHE_DIR" not in os.environ
    monkeypatch.setenv(warm_pool.VARIABLE, str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    place = Path(os.environ["TRITON_CACHE_DIR"])
    assert Path(os.environ["CUDA_CACHE_PATH"]).parent == place.parent
    assert place.is_relative_to(tmp_path)
    assert place.parent.stat().st_mode & 0o777 == 0o700
    place.parent.chmod(0o777)
    with pytest.raises(UserError, match=f"compiled kernels .* set {warm_pool.VARIABLE} to another"):
        keep_compiled()
