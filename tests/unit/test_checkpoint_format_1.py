"""Checkpoints of earlier versions are resumed from, as far as it can be told that they are of the same job."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreambooth_sm.distributed import World
from dreambooth_sm.errors import StopRequested, UserError
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.resume import BASE_MODEL_KEY, Start, check_resumable, fingerprint, make_identity
from dreambooth_sm.training.checkpoint import Checkpoint, all_checkpoints, latest_checkpoint, save_checkpoint
from dreambooth_sm.training.schedule import Schedule
from tests.helpers.checkpoints import as_format_1, lay_weights_by_part, rewrite_state, rewrite_tensors
from tests.helpers.training import Recorder, Run, attach, cpu_plan, hyperparameters, make_subject, same, weights

SCHEDULE = Schedule(4, 0, 1e-4)
JOBS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "everything": {
        "with_prior_preservation": True,
        "train_text_encoder": True,
        "use_ema": True,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine",
        "center_crop": False,
        "logging_steps": 3,
    },
    "blockwise": {"optimizer": "blockwise"},
}


def as_first_of_format_2(directory: Path) -> None:
    rewrite_tensors(directory, lay_weights_by_part)


@pytest.fixture(scope="module", params=JOBS)
def whole(
    request: pytest.FixtureRequest, loaded_base: PretrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Run]:
    """A job that ran to its end, with the checkpoint of its second step. Not to be written to."""
    values = {"max_train_steps": 4, "save_steps": 2, "checkpoints_total_limit": 5, **JOBS[request.param]}
    return request.param, Run(loaded_base, tmp_path_factory.mktemp("whole"), **values).train()


@pytest.mark.slow
@pytest.mark.parametrize("age", [as_format_1, as_first_of_format_2])
def test_a_job_that_an_earlier_version_began_ends_as_if_it_had_not_been_interrupted(
    loaded_base: PretrainedModel, whole: tuple[str, Run], tmp_path: Path, age: Callable[[Path], None]
) -> None:
    """To the bit: metric lines, with one that is about steps of both versions, and weights."""
    job, uninterrupted = whole
    shutil.copytree(uninterrupted.root / "checkpoints", tmp_path / "stopped" / "checkpoints")
    first, last = all_checkpoints(tmp_path / "stopped" / "checkpoints")
    age(first.directory)
    shutil.rmtree(last.directory)
    checkpoint = latest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.format) == (2, 1 if age is as_format_1 else 2)
    resumed = Run(loaded_base, tmp_path / "stopped", **{"max_train_steps": 4, **JOBS[job]})
    shapes = {name: p.shape for name, p in resumed.trainer.named_parameters.items()}
    assert checkpoint.find_misfit(shapes) is None
    resumed.recorder.resume(checkpoint.record, checkpoint.step, tmp_path)
    resumed.trainer.resume(checkpoint)
    resumed.train()
    names = ("step", "loss", "instance_loss", "lr")
    ours, theirs = ([[row[n] for n in names] for row in r.recorder.training_rows] for r in (resumed, uninterrupted))
    assert ours == theirs
    assert [row["step"] for row in resumed.recorder.steps] == [3, 4]
    assert same(weights(resumed.base.unet), weights(uninterrupted.base.unet))
    assert same(weights(resumed.base.text_encoder), weights(uninterrupted.base.text_encoder))
    newest = latest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert newest is not None
    assert (newest.step, newest.format) == (4, 2)


@pytest.mark.slow
def test_the_first_ones_had_nothing_to_tell(loaded_base: PretrainedModel, tmp_path: Path) -> None:
    values = {"max_train_steps": 4, "logging_steps": 3}
    whole = Run(loaded_base, tmp_path / "whole", **values).train()
    with pytest.raises(StopRequested):
        Run(loaded_base, tmp_path, **{**values, "logging_steps": 2}).train(stop_at=2)
    directory = tmp_path / "checkpoints" / "step-00000002"
    as_format_1(directory)
    rewrite_tensors(directory, lambda tensors: tensors.pop("window"))
    rewrite_state(directory, lambda state: state.pop("record"))
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.record == {}
    resumed = Run(loaded_base, tmp_path, **values)
    resumed.trainer.resume(checkpoint)
    resumed.train()
    assert [row["step"] for row in resumed.recorder.steps] == [3, 4]
    assert same(weights(resumed.base.unet), weights(whole.base.unet))


def earlier(root: Path, identity: dict[str, Any]) -> Checkpoint:
    """A checkpoint in format 1 of step 2."""
    directory = save_checkpoint(root, 2, identity, {"weights": {}, "step": {}, "ema": None}, keep=9).directory
    as_format_1(directory)
    return all_checkpoints(root)[-1]


def identity_of(root: Path, **values: object) -> dict[str, Any]:
    h = hyperparameters(**values)
    return make_identity(h, h, cpu_plan(h), (make_subject(root),), 7, World())


def test_what_it_holds_is_compared(tmp_path: Path) -> None:
    identity = identity_of(tmp_path / "a")
    saved = earlier(tmp_path, identity)
    check_resumable(saved, identity | {BASE_MODEL_KEY: {"unet": "any"}}, SCHEDULE)
    pictures = {"00.png": "1", "01.png": "2", "03.png": "3"}
    other = identity_of(tmp_path / "a", learning_rate=2e-4, mixed_precision="bf16") | {"pictures": pictures, "seed": 8}
    with pytest.raises(UserError) as caught:
        check_resumable(saved, other, SCHEDULE)
    for said in (
        "learning_rate was 0.0001 and is 0.0002",
        "precision was 'fp32' and is 'bf16'",
        "pictures was ['00.png', '01.png', '02.png'] and is ['00.png', '01.png', '03.png']",
        "seed was 7 and is 8",
    ):
        assert said in str(caught.value)
    with pytest.raises(UserError, match="method was 'full' and is 'another'"):
        check_resumable(saved, identity | {"method": "another"}, SCHEDULE)
    with pytest.raises(UserError, match="has taken 2 steps, and the job is to take 1"):
        check_resumable(saved, identity, Schedule(1, 0, 1e-4))


@pytest.mark.parametrize(
    ("then", "now", "same_place"),
    [
        ("/tmp/job/input/data/model", "/opt/ml/input/data/model", True),
        ("/opt/ml/input/data/model", "/opt/ml/input/data/model", True),
        ("/tmp/job/input/data/other", "/opt/ml/input/data/model", False),
        ("/models/model", "/data/models/model", False),
        ("owner/model", "owner/other", False),
    ],
)
def test_the_base_model_was_named_by_where_that_machine_had_it(
    tmp_path: Path, then: str, now: str, same_place: bool
) -> None:
    name = "pretrained_model_name_or_path"
    saved = earlier(tmp_path, identity_of(tmp_path / "a") | {name: then})
    identity = identity_of(tmp_path / "a") | {name: now}
    if same_place:
        check_resumable(saved, identity, SCHEDULE)
        return
    with pytest.raises(UserError, match=f"{name} was '{then}' and is '{now}'"):
        check_resumable(saved, identity, SCHEDULE)


@pytest.mark.slow
@pytest.mark.parametrize("format_1", [True, False])
def test_a_line_says_what_cannot_be_compared(loaded_base: PretrainedModel, tmp_path: Path, format_1: bool) -> None:
    with pytest.raises(StopRequested):
        Run(loaded_base, tmp_path, save_steps=2).train(stop_at=2)
    directory = tmp_path / "checkpoints" / "step-00000002"
    identity = identity_of(tmp_path)
    rewrite_state(directory, lambda state: state.update(identity=identity | {BASE_MODEL_KEY: fingerprint(loaded_base)}))
    if format_1:
        as_format_1(directory)
    found = latest_checkpoint(tmp_path / "checkpoints")
    h, report = hyperparameters(), Recorder()
    start = Start(7, identity, SCHEDULE, tmp_path / "checkpoints", None, found, iter(()))
    start.fit_to(fingerprint(loaded_base), attach(loaded_base, h, cpu_plan(h)).parameters, h, report)
    assert start.previous == found
    log = report.stream.getvalue()  # type: ignore[attr-defined]
    assert log.count("warning: ") == format_1
    assert log.count("\n") == format_1
    if format_1:
        assert f"warning: the checkpoint {directory} is of an earlier version; whether its job had the same" in log
        for name in ("base_model", "center_crop", "snr_gamma", "hflip", "captions"):
            assert f" {name}," in log
        for name in ("learning_rate", "pictures", "seed", "mixed_precision", "use_8bit_adam", "method"):
            assert f" {name}," not in log


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda d: flip(d / "tensors.pt"),
    "tensors cut short": lambda d: (d / "tensors.pt").write_bytes((d / "tensors.pt").read_bytes()[:-7]),
    "a record that is not what was written": lambda d: (d / "state.json").write_text(
        (d / "state.json").read_text().replace('"seed": 7', '"seed": 8')
    ),
    "no checksum": lambda d: rewrite_state(d, lambda state: state.pop("crc32")),
    "no seed": lambda d: rewrite_state(d, lambda state: state["identity"].pop("seed")),
    "another step": lambda d: rewrite_state(d, lambda state: state.update(step=3)),
    "a file of the host": lambda d: rewrite_state(
        d,
        lambda state: state.update(record={"samples": [{"step": 1, "prompt": "a", "seed": 1, "path": "/etc/passwd"}]}),
    ),
    "something more": lambda d: rewrite_state(d, lambda state: state.update(more=1)),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ones_are_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    identity = identity_of(tmp_path / "a")
    save_checkpoint(tmp_path, 1, identity, {}, keep=9)
    DAMAGES[damage](earlier(tmp_path, identity).directory)
    warnings: list[str] = []
    found = latest_checkpoint(tmp_path, warnings.append)
    assert found is not None
    assert found.step == 1
    (line,) = warnings
    assert "step-00000002 is damaged" in line


def test_parameters_in_another_order_are_not_those_of_the_model(loaded_base: PretrainedModel, tmp_path: Path) -> None:
    """Optimizers and averages know them by their order alone."""
    with pytest.raises(StopRequested):
        Run(loaded_base, tmp_path).train(stop_at=2)
    directory = tmp_path / "checkpoints" / "step-00000002"
    rewrite_tensors(directory, lambda t: t.update(weights=dict(reversed(t["weights"].items()))))
    h = hyperparameters()
    shapes = {name: p.shape for name, p in attach(loaded_base, h, cpu_plan(h)).parameters.items()}
    (found,) = all_checkpoints(tmp_path / "checkpoints")
    assert found.find_misfit(shapes) == "its tensors are not those of this model"
    assert found.find_misfit(dict(reversed(shapes.items()))) is None
