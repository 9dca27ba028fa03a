"""Checkpoints: there whole or not at all, kept up to a limit, and continued only by the same job."""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_sm.errors import StopRequested, UserError
from dreambooth_sm.models import BaseModel
from dreambooth_sm.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from tests.helpers.training import Run, same, weights

IDENTITY = {"seed": 7, "instance_prompt": "photo of zwx toy", "pictures": ["a.png"], "train_text_encoder": False}


def save(root: Path, step: int, *, keep: int = 10) -> Checkpoint:
    return save_checkpoint(
        root, step, IDENTITY, {"weights": {"w": torch.full((3,), float(step))}, "ema": None}, keep=keep
    )


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = save(tmp_path, 40)
    found = latest_checkpoint(tmp_path)
    assert found == saved == Checkpoint(tmp_path / "step-00000040", 40, IDENTITY, saved.crc32)
    assert torch.equal(found.load()["weights"]["w"], torch.full((3,), 40.0))
    found.check_identity(IDENTITY)


def test_there_may_be_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None


def test_the_newest_is_the_highest_step_not_the_last_name(tmp_path: Path) -> None:
    for step in (9, 10, 100, 1000):
        save(tmp_path, step)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1000


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_limit_is_kept(tmp_path: Path, keep: int) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (5, 10, 15, 20)[-keep:]]


def test_an_abandoned_runs_later_steps_do_not_outlive_a_new_start(tmp_path: Path) -> None:
    """``resume_from_checkpoint=no`` on a directory that holds step 800: the new step 100 is what counts."""
    for step in (700, 800):
        save(tmp_path, step, keep=2)
    save(tmp_path, 100, keep=2)
    assert names(tmp_path) == ["step-00000100"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save_checkpoint(tmp_path, 5, IDENTITY, {"w": torch.zeros(1)}, keep=1)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.load().keys() == {"w"}


DAMAGES = {
    "tensors half there": lambda d: (d / "tensors.pt").write_bytes((d / "tensors.pt").read_bytes()[:-7]),
    "no tensors": lambda d: (d / "tensors.pt").unlink(),
    "no state": lambda d: (d / "state.json").unlink(),
    "half a state": lambda d: (d / "state.json").write_text((d / "state.json").read_text()[:20]),
    "a state of something else": lambda d: (d / "state.json").write_text('["step"]'),
    "a state without a step": lambda d: (d / "state.json").write_text(
        json.dumps({"identity": {}, "bytes": (d / "tensors.pt").stat().st_size})
    ),
    "an empty directory": lambda d: [path.unlink() for path in d.iterdir()],
    "a file": lambda d: (shutil.rmtree(d), d.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_half_copied_ones_do_not_count(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 10)
    DAMAGES[damage](save(tmp_path, 20).directory)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 10


@given(st.sampled_from(["tensors.pt", "state.json"]), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_is_recognised_and_the_one_before_used(name: str, where: float, bit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save(root, 10)
        newest = save(root, 20)
        content = bytearray((newest.directory / name).read_bytes())
        content[int(where * len(content))] ^= 1 << bit
        (newest.directory / name).write_bytes(content)
        warnings: list[str] = []
        found = latest_checkpoint(root, warnings.append)
        assert found is not None
        if found.step == 20:  # a blank of the JSON, perhaps, or a letter's case in a number
            assert name == "state.json"
            assert found == newest
        else:
            assert found.step == 10
            assert bool(warnings) == (name == "tensors.pt")


def test_cut_short_and_padded_to_its_size_is_recognised(tmp_path: Path) -> None:
    """As a file system may leave a file after a crash."""
    save(tmp_path, 10)
    tensors = save(tmp_path, 20).directory / "tensors.pt"
    content = tensors.read_bytes()
    tensors.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    warnings: list[str] = []
    found = latest_checkpoint(tmp_path, warnings.append)
    assert found is not None
    assert found.step == 10
    assert "step-00000020 is damaged" in warnings[0]


def test_what_sagemaker_leaves_while_it_syncs_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, 10)
    whole = save(tmp_path, 20).directory
    shutil.copytree(whole, tmp_path / "step-00000030.sagemaker-uploading")
    whole.rename(tmp_path / "step-00000040")
    (tmp_path / "step-00000040/tensors.pt").rename(tmp_path / "step-00000040/tensors.pt.sagemaker-uploading")
    (tmp_path / "step-00000010/state.json.sagemaker-uploaded").write_text("")
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 10


def test_a_write_that_was_interrupted_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, 20)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 10
    save(tmp_path, 20)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


def test_every_difference_of_the_job_is_named(tmp_path: Path) -> None:
    other = {**IDENTITY, "seed": 8, "instance_prompt": "photo of qqz toy", "use_ema": True}
    with pytest.raises(UserError) as caught:
        save(tmp_path, 10).check_identity(other)
    (line,) = caught.value.problems
    for part in (
        "seed was 7 and is 8",
        "instance_prompt was 'photo of zwx toy' and is 'photo of qqz toy'",
        "use_ema was None and is True",
        "resume_from_checkpoint=no",
    ):
        assert part in line
    assert "pictures" not in line


RESUMED = {
    "plain": {},
    "everything": {
        "with_prior_preservation": True,
        "train_text_encoder": True,
        "use_ema": True,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine",
        "center_crop": False,
        "snr_gamma": 5.0,
    },
    "blockwise": {"optimizer": "blockwise", "use_8bit_adam": "auto"},
    "not cached": {"not_cache_latents": True, "hflip": True, "lr_scheduler": "linear", "lr_warmup_steps": 2},
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_job_does_what_an_uninterrupted_one_does(base: BaseModel, tmp_path: Path, kind: str) -> None:
    """Bitwise: losses of the steps that are left, and the weights that are saved in the end."""
    values = {"max_train_steps": 4, "train_batch_size": 2, **RESUMED[kind]}
    whole = Run(base, tmp_path / "whole", **values).train()
    stopped = Run(base, tmp_path / "stopped", **values)
    with pytest.raises(StopRequested, match="after step 2 of 4"):
        stopped.train(stop_at=2)
    checkpoint = latest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 2
    resumed = Run(base, tmp_path / "stopped", **values)
    resumed.trainer.resume(checkpoint)
    resumed.train()
    assert stopped.losses + resumed.losses == whole.losses
    assert len(whole.losses) == 4
    assert [step["lr"] for step in stopped.recorder.steps + resumed.recorder.steps] == [
        step["lr"] for step in whole.recorder.steps
    ]
    assert same(weights(resumed.base.unet), weights(whole.base.unet))
    assert same(weights(resumed.base.text_encoder), weights(whole.base.text_encoder))


def test_metric_lines_cover_the_steps_before_an_interruption(base: BaseModel, tmp_path: Path) -> None:
    """Stopped between two lines: the next one is a mean over steps of both attempts."""
    values = {"max_train_steps": 8, "logging_steps": 3}
    whole = Run(base, tmp_path / "whole", **values).train()
    stopped = Run(base, tmp_path / "stopped", save_steps=5, **values)
    stopped.train()
    checkpoint = latest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert checkpoint is not None
    resumed = Run(base, tmp_path / "stopped", **values)
    resumed.recorder.go_on(checkpoint.record, checkpoint.step, tmp_path)
    resumed.trainer.resume(checkpoint)
    resumed.train()
    names = ("step", "loss", "instance_loss", "lr")
    ours, theirs = ([[row[n] for n in names] for row in r.recorder.training_rows] for r in (resumed, whole))
    assert ours == theirs
    assert [row["step"] for row in resumed.recorder.steps] == [6, 8]
    first, second = resumed.recorder.attempts(8)
    assert (first.first_step, first.last_step, second.first_step, second.last_step) == (0, 5, 5, 8)


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(base: BaseModel, tmp_path: Path) -> None:
    """It has no record, and no window of metrics."""
    values = {"max_train_steps": 4, "logging_steps": 3}
    whole = Run(base, tmp_path / "whole", **values).train()
    before = Run(base, tmp_path / "before", save_steps=2, **values).train()
    checkpoint = latest_checkpoint(tmp_path / "before" / "checkpoints")
    assert checkpoint is not None
    tensors = checkpoint.load()
    del tensors["window"]
    save_checkpoint(tmp_path / "early", 2, {"seed": 7}, tensors, keep=1)
    rewrite_state(tmp_path / "early/step-00000002", lambda state: state.pop("record"))
    early = latest_checkpoint(tmp_path / "early")
    assert early is not None
    assert early.step == 2
    resumed = Run(base, tmp_path / "early", **values)
    resumed.recorder.go_on(early.record, early.step, early.pictures)
    resumed.trainer.resume(early)
    resumed.train()
    assert same(weights(resumed.base.unet), weights(whole.base.unet))
    assert same(weights(resumed.base.unet), weights(before.base.unet))
    assert [row["step"] for row in resumed.recorder.training_rows] == [3, 4]
    assert [attempt.first_step for attempt in resumed.recorder.attempts(4)] == [2]


def rewrite_state(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "state.json"
    state = json.loads(path.read_text())
    del state["state_crc32"]
    change(state)
    path.write_text(json.dumps(state | {"state_crc32": zlib.crc32(json.dumps(state, sort_keys=True).encode())}))


def test_pictures_and_what_there_is_to_tell_come_with_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a picture")
    record = {"steps": [{"step": 3, "loss": 0.1 + 0.2}], "samples": []}
    pictures = [tmp_path / "a.png"]
    save_checkpoint(tmp_path / "c", 3, IDENTITY, {}, keep=1, record=record, pictures=pictures)
    (tmp_path / "a.png").write_bytes(b"another")
    found = latest_checkpoint(tmp_path / "c")
    assert found is not None
    assert found.record == record
    assert [path.read_bytes() for path in found.pictures.iterdir()] == [b"a picture"]
    shutil.rmtree(found.pictures)
    assert latest_checkpoint(tmp_path / "c") == found, "a picture that is missing does not cost a checkpoint"


def test_checkpoints_are_saved_as_often_as_asked_and_not_at_the_end(base: BaseModel, tmp_path: Path) -> None:
    Run(base, tmp_path / "a", max_train_steps=6, save_steps=2, checkpoints_total_limit=5).train()
    assert names(tmp_path / "a" / "checkpoints") == ["step-00000002", "step-00000004"]
    Run(base, tmp_path / "b", pictures=2, max_train_steps=6, save_steps=1, save_use_epochs=True).train()
    assert names(tmp_path / "b" / "checkpoints") == ["step-00000002", "step-00000004"]
    Run(base, tmp_path / "c", max_train_steps=3).train()
    assert not (tmp_path / "c" / "checkpoints").exists()


def test_a_finished_checkpoint_leaves_nothing_to_do(base: BaseModel, tmp_path: Path) -> None:
    first = Run(base, tmp_path, max_train_steps=3, save_steps=2).train()
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    again = Run(base, tmp_path, max_train_steps=2)
    again.trainer.resume(checkpoint)
    again.train()
    assert again.losses == []
    assert not same(weights(again.base.unet), weights(first.base.unet))
    assert not same(weights(again.base.unet), weights(base.unet))
