"""Checkpoints: there whole or not at all, kept up to a limit, and continued only by the same job."""

from __future__ import annotations

import errno
import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_sm.errors import StopRequested, UserError
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.outputs import discard_checkpoints
from dreambooth_sm.resume import check_resumable, find_other_rates
from dreambooth_sm.training.checkpoint import (
    Checkpoint,
    all_checkpoints,
    latest_checkpoint,
    save_checkpoint,
    undamaged_checkpoints,
)
from dreambooth_sm.training.loop import TrainingError
from dreambooth_sm.training.losses import Loss
from dreambooth_sm.training.schedule import Schedule
from dreambooth_sm.training.step import Inputs
from dreambooth_sm.training.trend import find_rise
from tests.helpers.checkpoints import rewrite_state
from tests.helpers.training import Run, same, weights

IDENTITY = {"seed": 7, "instance_prompt": "photo of zwx toy", "pictures": ["a.png"], "train_text_encoder": False}


OTHER = {**IDENTITY, "instance_prompt": "photo of qqz toy"}


def save(root: Path, step: int, *, keep: int = 10, identity: dict[str, Any] = IDENTITY) -> Checkpoint:
    return save_checkpoint(
        root, step, identity, {"weights": {"w": torch.full((3,), float(step))}, "ema": None}, keep=keep
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


def contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.directory.iterdir()}


def test_what_another_job_has_in_the_directory_stays(tmp_path: Path) -> None:
    """Before, at and after the steps of this job, over its whole life."""
    others = [save(tmp_path, step, identity=OTHER) for step in (3, 5, 9, 700)]
    before = [contents(other) for other in others]
    for step in (800, 5, 7, 9):  # 800: before it was started again
        save(tmp_path, step, keep=2)
    assert [contents(other) for other in others] == before
    own = [c for c in all_checkpoints(tmp_path) if c.belongs_to(IDENTITY)]
    assert [(c.step, c.directory.name) for c in own] == [(7, "step-00000007"), (9, "step-00000009-2")]
    assert torch.equal(own[1].load()["weights"]["w"], torch.full((3,), 9.0))
    save(tmp_path, 9, keep=2)
    third = save(tmp_path, 9, identity={**IDENTITY, "seed": 8})
    assert third.directory.name == "step-00000009-3"
    assert {c.directory for c in all_checkpoints(tmp_path)} == {c.directory for c in (*others, *own, third)}
    assert [c.step for c in undamaged_checkpoints(tmp_path)] == [700, 9, 9, 9, 7, 5, 3]
    assert list(undamaged_checkpoints(tmp_path, owns=lambda c: c.belongs_to(IDENTITY))) == own[::-1]
    discard_checkpoints(tmp_path, IDENTITY)
    assert {c.directory for c in all_checkpoints(tmp_path)} == {c.directory for c in (*others, third)}
    assert [contents(other) for other in others] == before


def test_what_cannot_be_told_to_be_this_jobs_stays(tmp_path: Path) -> None:
    later = save(tmp_path, 10)
    rewrite_state(later.directory, lambda state: state.update(format=99))
    damaged = save(tmp_path, 20)
    (damaged.directory / "state.json").write_text("{")
    before = [contents(later), contents(damaged)]
    save(tmp_path, 10, keep=1)
    assert [contents(later), contents(damaged)] == before
    assert names(tmp_path) == ["step-00000010", "step-00000010-2", "step-00000020"]
    save(tmp_path, 20, keep=1)  # a name is not kept for what nobody can use
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


@pytest.mark.slow
def test_a_job_that_draws_its_seed_is_the_same_with_another(loaded_base: PretrainedModel, tmp_path: Path) -> None:
    """Started again, it replaces what it had with the seed before; with a seed that is given it is another job."""
    root = tmp_path / "checkpoints"
    for step in (1, 700):
        save(root, step, identity={"seed": 5})
    Run(loaded_base, tmp_path, max_train_steps=2).train()
    assert names(root) == ["step-00000001", "step-00000002", "step-00000700"]
    Run(loaded_base, tmp_path, max_train_steps=2, checkpoints_total_limit=1, seed=None).train()
    assert names(root) == ["step-00000002"]


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
            assert warnings


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
        "use_ema was 'auto' and is True",
        "resume_from_checkpoint=no",
    ):
        assert part in line
    assert "pictures" not in line


RESUMED = {
    "plain": {},
    "everything": {
        "with_prior_preservation": True,
        "train_text_encoder": True,
        "text_encoder_lr": 3e-5,
        "use_ema": True,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine",
        "center_crop": False,
        "snr_gamma": 5.0,
    },
    "blockwise": {"optimizer": "blockwise", "train_text_encoder": True, "text_encoder_lr": 3e-5},
    "schedule-free": {"optimizer": "schedule_free"},
    "not cached": {"not_cache_latents": True, "hflip": True, "lr_scheduler": "linear", "lr_warmup_steps": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_job_does_what_an_uninterrupted_one_does(
    loaded_base: PretrainedModel, tmp_path: Path, kind: str
) -> None:
    """Bitwise: losses of the steps that are left, and the weights that are saved in the end."""
    values = {"max_train_steps": 4, "train_batch_size": 2, **RESUMED[kind]}
    whole = Run(loaded_base, tmp_path / "whole", **values).train()
    stopped = Run(loaded_base, tmp_path / "stopped", **values)
    with pytest.raises(StopRequested, match="after step 2 of 4"):
        stopped.train(stop_at=2)
    checkpoint = latest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 2
    resumed = Run(loaded_base, tmp_path / "stopped", **values)
    resumed.trainer.resume(checkpoint)
    resumed.train()
    assert stopped.losses + resumed.losses == whole.losses
    assert len(whole.losses) == 4
    assert [step["lr"] for step in stopped.recorder.steps + resumed.recorder.steps] == [
        step["lr"] for step in whole.recorder.steps
    ]
    assert same(weights(resumed.base.unet), weights(whole.base.unet))
    assert same(weights(resumed.base.text_encoder), weights(whole.base.text_encoder))


@pytest.mark.slow
def test_metric_lines_cover_the_steps_before_an_interruption(loaded_base: PretrainedModel, tmp_path: Path) -> None:
    """Stopped between two lines: the next one is a mean over steps of both attempts."""
    values = {"max_train_steps": 8, "logging_steps": 3}
    whole = Run(loaded_base, tmp_path / "whole", **values).train()
    stopped = Run(loaded_base, tmp_path / "stopped", save_steps=5, **values)
    stopped.train()
    checkpoint = all_checkpoints(tmp_path / "stopped" / "checkpoints")[0]
    assert checkpoint.step == 5
    resumed = Run(loaded_base, tmp_path / "stopped", **values)
    resumed.recorder.resume(checkpoint.record, checkpoint.step, tmp_path)
    resumed.trainer.resume(checkpoint)
    resumed.train()
    names = ("step", "loss", "instance_loss", "lr")
    ours, theirs = ([[row[n] for n in names] for row in r.recorder.training_rows] for r in (resumed, whole))
    assert ours == theirs
    assert [row["step"] for row in resumed.recorder.steps] == [6, 8]
    first, second = resumed.recorder.attempts(8)
    assert (first.first_step, first.last_step, second.first_step, second.last_step) == (0, 5, 5, 8)


def test_a_checkpoint_of_a_later_version_gets_a_clear_answer(tmp_path: Path) -> None:
    rewrite_state(save(tmp_path, 10).directory, lambda state: state.update(format=99, something="that is new"))
    found = latest_checkpoint(tmp_path)
    assert found is not None
    with pytest.raises(UserError, match=r"has format 99, and this version reads up to 2; .*resume_from_checkpoint=no"):
        found.check_identity(IDENTITY)
    assert not found.belongs_to(IDENTITY)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a file of the host": lambda s: s["record"].update(samples=[sample("../../etc/passwd")]),
    "an absolute path": lambda s: s["record"].update(samples=[sample("/etc/passwd")]),
    "another name": lambda s: s["record"].update(samples=[sample("step-1-prompt-0-seed-1-0000000g.png")]),
    "a name with a line": lambda s: s["record"].update(samples=[sample("step-1-prompt-0-seed-1-00000000.png\n")]),
    "a step that is none": lambda s: s["record"].update(steps=[{"step": "1", "loss": 0.5}]),
    "a line without a loss": lambda s: s["record"].update(steps=[{"step": 1}]),
    "a text among numbers": lambda s: s["record"].update(steps=[{"step": 1, "loss": 0.5, "lr": "<script>"}]),
    "attempts of another kind": lambda s: s["record"].update(attempts=[{"started": 5}]),
    "a record that is none": lambda s: s.update(record=[]),
    "another step": lambda s: s.update(step=3),
    "a huge step": lambda s: s.update(step=10**12),
    "a step that is true": lambda s: s.update(step=True),
    "no seed": lambda s: s["identity"].pop("seed"),
    "a seed that is none": lambda s: s["identity"].update(seed="7"),
    "no identity": lambda s: s.update(identity=None),
    "a format that is none": lambda s: s.update(format="2"),
    "something more": lambda s: s.update(more=1),
    "negative bytes": lambda s: s.update(bytes=-1),
}


def sample(path: str) -> dict[str, Any]:
    return {"step": 1, "prompt": "photo of zwx toy", "seed": 1, "path": path}


@pytest.mark.parametrize("change", HOSTILE)
def test_a_record_that_this_project_would_not_write_is_passed_over_with_a_line(tmp_path: Path, change: str) -> None:
    save(tmp_path, 10)
    rewrite_state(save(tmp_path, 20).directory, HOSTILE[change])
    warnings: list[str] = []
    found = latest_checkpoint(tmp_path, warnings.append)
    assert found is not None
    assert found.step == 10
    (line,) = warnings
    assert "step-00000020 is damaged and passed over" in line


@pytest.mark.parametrize("content", ["[" * 100_000, "{" * 10, "null", "\x00", "9" * 10_000, '{"a": ' * 50_000])
def test_no_json_ends_the_search(tmp_path: Path, content: str) -> None:
    save(tmp_path, 10)
    (save(tmp_path, 20).directory / "state.json").write_text(content)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 10


def test_links_are_passed_over(tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "elsewhere", 20).directory
    save(tmp_path / "c", 10)
    (tmp_path / "c/step-00000020").symlink_to(elsewhere)
    found = latest_checkpoint(tmp_path / "c")
    assert found is not None
    assert found.step == 10
    save(tmp_path / "c", 30, keep=1)
    assert (elsewhere / "tensors.pt").is_file()


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code of a checkpoint ran",))


SHAPES = {"unet.w": torch.Size([3])}
TENSORS: dict[str, tuple[Any, str | None]] = {
    "fitting": ({"weights": {"unet.w": torch.ones(3)}, "ema": None, "step": {}, "window": {}}, None),
    "of another model": (
        {"weights": {"unet.w": torch.ones(4)}, "ema": None, "step": {}, "window": {}},
        "not those of this model",
    ),
    "of another average": (
        {"weights": {"unet.w": torch.ones(3)}, "ema": {"average": [torch.ones(2)]}, "step": {}, "window": {}},
        "average",
    ),
    "without the optimizer": (
        {"weights": {"unet.w": torch.ones(3)}, "ema": None, "step": None, "window": {}},
        "optimizer",
    ),
    "a list": ([1], "can't be read"),
    "code": ({"weights": Evil()}, "can't be read"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_are_looked_at_before_they_are_used(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, said = TENSORS[kind]
    found = save_checkpoint(tmp_path, 1, IDENTITY, tensors, keep=1).find_misfit(SHAPES)
    assert (said is None and found is None) or said in str(found)
    assert capsys.readouterr().out == ""


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


@pytest.mark.slow
def test_checkpoints_are_saved_as_often_as_asked_and_at_the_end(loaded_base: PretrainedModel, tmp_path: Path) -> None:
    Run(loaded_base, tmp_path / "a", max_train_steps=6, save_steps=2, checkpoints_total_limit=5).train()
    assert names(tmp_path / "a" / "checkpoints") == ["step-00000002", "step-00000004", "step-00000006"]
    Run(loaded_base, tmp_path / "b", pictures=2, max_train_steps=5, save_steps=1, save_use_epochs=True).train()
    assert names(tmp_path / "b" / "checkpoints") == ["step-00000004", "step-00000005"]
    Run(loaded_base, tmp_path / "c", max_train_steps=3).train()
    assert names(tmp_path / "c" / "checkpoints") == ["step-00000003"]


@pytest.mark.slow
def test_no_checkpoint_takes_the_room_of_the_model(loaded_base: PretrainedModel, tmp_path: Path) -> None:
    run = Run(loaded_base, tmp_path, max_train_steps=3, save_steps=2)
    run.trainer.train(tmp_path / "checkpoints", run.recorder.stop, keep_last=lambda: False)
    assert names(tmp_path / "checkpoints") == ["step-00000002"]


@pytest.mark.parametrize("leaves_no_checkpoint", [True, False])
@pytest.mark.parametrize("values", [{"use_ema": True}, {"optimizer": "schedule_free"}])
def test_a_finished_job_does_no_step_again(
    loaded_base: PretrainedModel, tmp_path: Path, values: dict[str, object], leaves_no_checkpoint: bool
) -> None:
    first = Run(loaded_base, tmp_path, max_train_steps=3, save_steps=2, **values)
    first.trainer.leaves_no_checkpoint = leaves_no_checkpoint
    checkpoint = latest_checkpoint(first.train().root / "checkpoints")
    assert checkpoint is not None
    again = Run(loaded_base, tmp_path, max_train_steps=3, **values)
    again.trainer.resume(checkpoint)
    again.train()
    assert again.losses == []
    assert same(weights(again.base.unet), weights(first.base.unet))


@pytest.mark.slow
def test_only_a_job_that_leaves_no_checkpoint_saves_its_last_one_without_the_optimizers_state(
    loaded_base: PretrainedModel, tmp_path: Path
) -> None:
    run = Run(loaded_base, tmp_path, max_train_steps=3, save_steps=2, checkpoints_total_limit=2)
    run.trainer.leaves_no_checkpoint = True
    before, last = all_checkpoints(run.train().root / "checkpoints")
    sizes = [sum(file.stat().st_size for file in each.directory.rglob("*")) for each in (before, last)]
    assert sizes[1] < 0.5 * sizes[0]
    longer = Run(loaded_base, tmp_path / "longer", max_train_steps=4)
    longer.trainer.resume(last)
    assert "Adam's moments are not there" in longer.train().recorder.stream.getvalue()  # type: ignore[attr-defined]
    assert len(longer.losses) == 1


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_a_longer_schedule_gives_the_rates_that_it_would_have_had_from_the_start(
    loaded_base: PretrainedModel, tmp_path: Path, scheduler: str
) -> None:
    longer = {"max_train_steps": 4, "lr_scheduler": scheduler}
    rates = [step["lr"] for step in Run(loaded_base, tmp_path / "whole", **longer).train().recorder.steps]
    Run(loaded_base, tmp_path, max_train_steps=2, lr_scheduler=scheduler).train()
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    resumed = Run(loaded_base, tmp_path / "resumed", **longer)
    resumed.trainer.resume(checkpoint)
    resumed.train()
    assert [step["lr"] for step in resumed.recorder.steps] == rates[2:]
    difference = find_other_rates(checkpoint, resumed.h, resumed.schedule)
    if scheduler == "constant":
        assert difference is None
        assert rates == [1e-4] * 4
    else:
        assert difference is not None
        assert f"lr_scheduler={scheduler} gave step" in difference
        assert find_other_rates(checkpoint, resumed.h, replace(resumed.schedule, steps=2)) is None


def test_fewer_steps_than_the_checkpoint_has_are_refused(tmp_path: Path) -> None:
    saved = save(tmp_path, 40)
    check_resumable(saved, IDENTITY, Schedule(40, 0, 1e-4))
    with pytest.raises(
        UserError, match=r"has taken 40 steps, and the job is to take 39; set max_train_steps=40 or more"
    ):
        check_resumable(saved, IDENTITY, Schedule(39, 0, 1e-4))


# --- Weights that are no longer numbers, disks that are full ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "weight", "average"])
def test_no_checkpoint_of_weights_that_are_not_finite_replaces_a_good_one(
    loaded_base: PretrainedModel, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metric lines are far apart: they do not notice it."""
    run = Run(
        loaded_base,
        tmp_path,
        max_train_steps=9,
        save_steps=2,
        logging_steps=100,
        checkpoints_total_limit=1,
        use_ema=True,
        learning_rate=3e-6,
    )
    step = run.trainer.optimizer_step

    def breaks(rate: float) -> Any:
        loss = step(rate)
        if run.trainer.step == 3:
            broken = run.trainer.parameters[0] if what == "weight" else run.trainer.ema.average[0]  # type: ignore[union-attr]
            with torch.no_grad():
                broken.view(-1)[0] = math.inf
        return loss

    if what == "loss":
        monkeypatch.setattr(run.trainer, "_loss", lambda inputs, real=run.trainer._loss: poisoned(run, real(inputs)))
        run.trainer.make_step._loss = run.trainer._loss
    else:
        monkeypatch.setattr(run.trainer, "optimizer_step", breaks)
    with pytest.raises(TrainingError) as caught:
        run.train()
    words = str(caught.value)
    assert {"loss": "the loss of step 3 is", "weight": "the loss of step 4 is", "average": "the average are"}[
        what
    ] in words
    assert "lower learning_rate, which is 3e-06" in words
    assert str(tmp_path / "checkpoints/step-00000002") in words
    assert names(tmp_path / "checkpoints") == ["step-00000002"]
    good = latest_checkpoint(tmp_path / "checkpoints")
    assert good is not None
    assert all(value.isfinite().all() for value in good.load()["weights"].values())


def poisoned(run: Run, loss: Loss) -> Loss:
    """NaN at step 3 alone, and without gradients that would show it."""
    return loss._replace(total=loss.total + (math.nan if run.trainer.step == 2 else 0.0))


@pytest.mark.parametrize(
    ("losses", "rises"),
    [
        ([0.2] * 100, False),
        ([0.2] * 50 + [0.55] * 50, False),
        ([0.1] * 50 + [0.6] * 50, True),
        ([0.3] * 10 + [258.0] * 10, True),
        ([0.01, 0.9], False),
        ([0.01] + [0.4] * 99, False),
        ([0.2], False),
        ([], False),
    ],
)
@pytest.mark.parametrize("every", [1, 10])
def test_a_loss_that_rose_is_told_from_noise(losses: list[float], rises: bool, every: int) -> None:
    rows = []
    for step in range(1, len(losses) + 1):
        if step == 1 or step % every == 0 or step == len(losses):
            since = losses[rows[-1]["step"] if rows else 0 : step]
            rows.append({"step": step, "loss": sum(since) / len(since)})
    assert (find_rise(rows) is not None) == rises


@pytest.mark.slow
def test_a_job_that_got_worse_says_so(loaded_base: PretrainedModel, tmp_path: Path) -> None:
    run = Run(loaded_base, tmp_path, max_train_steps=12, logging_steps=2)
    real = run.trainer._loss

    def rising(inputs: Inputs) -> Loss:
        loss = real(inputs)
        return loss._replace(total=loss.total + (5.0 if run.trainer.step >= 6 else 0.0))

    run.trainer.make_step._loss = rising
    run.train()
    (verdict,) = run.recorder.verdicts
    assert verdict.startswith("worse: the loss rose from ")
    assert "lower learning_rate" in verdict
    log = run.recorder.stream.getvalue()  # type: ignore[attr-defined]
    assert log.count("warning: the loss rose") == 1
    assert Run(loaded_base, tmp_path / "b", max_train_steps=12, logging_steps=2).train().recorder.verdicts == []


@pytest.mark.slow
def test_a_full_disk_costs_a_checkpoint_and_not_the_training(
    loaded_base: PretrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Run(loaded_base, tmp_path / "whole", max_train_steps=6).train()
    run = Run(loaded_base, tmp_path, max_train_steps=6, save_steps=2, checkpoints_total_limit=1)

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    real = Path.open

    def opened(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "tensors.pt" and args[:1] == ("wb",) and run.trainer.step >= 4:
            return Full(path, "wb")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    run.train()
    assert same(weights(run.base.unet), weights(whole.base.unet))
    assert names(tmp_path / "checkpoints") == ["step-00000002"]
    log = run.recorder.stream.getvalue()  # type: ignore[attr-defined]
    assert (
        "warning: the checkpoint of step 4 could not be written: No space left on device; the last checkpoint is" in log
    )
