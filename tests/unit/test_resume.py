"""Which changes a resumed job may have: all that leave the weights as they would have been, and no others."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_origin

import pytest
import torch
from PIL import Image

from dreambooth_sm.data.concepts import Subject, find_subjects
from dreambooth_sm.distributed import World
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.declare import meaning
from dreambooth_sm.knobs.takes import alternatives
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.resume import BASE_MODEL_KEY, check_resumable, fingerprint, first_that_fits, make_identity
from dreambooth_sm.training.checkpoint import Checkpoint, save_checkpoint, undamaged_checkpoints
from dreambooth_sm.training.schedule import Schedule
from tests.helpers.training import SMALL, Recorder, attach, cpu_plan, hyperparameters, make_subject, paint_pictures

FIELDS = Hyperparameters.model_fields
SCHEDULE = Schedule(4, 0, 1e-4)
# Another value than the one of SMALL, where the rule below would find one that is not allowed.
OTHERS: dict[str, Any] = {
    "pretrained_model_name_or_path": "owner/other",
    "pretrained_vae_name_or_path": "owner/vae",
    "pretrained_parts_name_or_path": None,
    "method": "hypernetwork",
    "placeholder_token": "zwx",
    "initial_text": "toy",
    "lora_variant": "dora",
    "dco_beta": None,
    "lora_dropout": 0.1,
    "distance_penalty": 0.1,
    "huber_delta": None,
    "text_encoder_lr": None,
    "noise_offset": 0.1,
    "aspect_ratio_buckets": True,
    "torch_compile": True,
    "cuda_graph": True,
    "caption_dropout": 0.1,
    "background_weight": 0.5,
    "resolution": 128,
    "concepts_list": None,
    "manual_upload_model_path": "s3://bucket/prefix",
    "class_cache": "s3://bucket/cache",
    "fleet_outcomes": "s3://bucket/outcomes",
    "s3_endpoint_url": "https://host:9000",
    "s3_tags": "a=1",
    "lr_warmup_steps": None,
    "lr_scheduler": "linear",
    "optimizer": "blockwise",
    "output_mode": "archive",
    "validation_steps": None,
    "fidelity_encoders": "judge",
    "fidelity_steps": None,
    "select_best": None,
    "report_to": "tensorboard",
    "tracking_project": "others",
    "mlflow_tracking_uri": None,
    "tracker_secret": None,
    "with_prior_preservation": None,
    "attention": "xformers",
    "mixed_precision": "bf16",
    "instance_data_dir": "/other",
    "class_data_dir": "/others",
    "models_path": "/model",
}


def other_value(name: str) -> Any:
    if name in OTHERS:
        return OTHERS[name]
    field = FIELDS[name]
    now = SMALL.get(name, field.default)
    kinds = alternatives(field.annotation)
    if isinstance(now, bool):
        return not now
    for kind in kinds:
        if get_origin(kind) is Literal and len(kind.__args__) > 1:
            return next(value for value in kind.__args__ if value not in (now, "auto"))
    if int in kinds:
        return (now if isinstance(now, int) else 1) + 1
    if float in kinds:
        return 2.5 if now is None or now >= 1 else now / 2
    return f"{now or 'some'} other"


def identity_of(subject: Subject, **values: object) -> dict[str, Any]:
    h = hyperparameters(**values)
    return make_identity(h, h, cpu_plan(h), (subject,), 7, World())


def checkpoint_of(identity: dict[str, Any], step: int = 2) -> Checkpoint:
    return Checkpoint(Path("step-00000002"), step, identity, 0)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return make_subject(tmp_path_factory.mktemp("subject"))


OF_FLOW_MATCHING = ("time_sampling", "time_shift")


@pytest.mark.parametrize("name", [name for name in FIELDS if other_value(name) is not None])
def test_a_knob_that_changed_is_refused_by_name_unless_it_may(name: str, subject: Subject) -> None:
    kind = meaning(FIELDS[name]).resume
    methods = meaning(FIELDS[name]).methods
    its = {"method": methods[0], "class_prompt": "photo of a toy"} if methods else {}
    if name in OF_FLOW_MATCHING:
        its = {"base_architecture": "z_image", "method": "lora"}
    saved = checkpoint_of(identity_of(subject, **its))
    try:
        changed = identity_of(subject, **{**its, name: other_value(name)})
    except UserError as error:
        pytest.fail(f"the test's value of {name} is not valid: {error}")
    if name == "seed":  # drawn or given, it is the job's own
        changed["seed"] = other_value(name)
    if kind == "free":
        check_resumable(saved, changed, SCHEDULE)
        return
    with pytest.raises(UserError) as caught:
        check_resumable(saved, changed, SCHEDULE)
    (line,) = caught.value.problems
    assert f"{name} was " in line
    assert "resume_from_checkpoint=no" in line


@pytest.mark.parametrize(
    "values",
    [
        {"class_prompt": "photo of a toy", "with_prior_preservation": True},
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2},
    ],
)
def test_knobs_that_go_together_are_refused_as_well(values: dict[str, Any], subject: Subject) -> None:
    with pytest.raises(UserError) as caught:
        check_resumable(checkpoint_of(identity_of(subject)), identity_of(subject, **values), SCHEDULE)
    for name in values:
        assert f"{name} was " in str(caught.value)


def test_what_auto_stands_for_may_be_said(subject: Subject) -> None:
    saved = checkpoint_of(identity_of(subject, use_ema="auto", aspect_ratio_buckets="auto", mixed_precision="auto"))
    h = hyperparameters(mixed_precision="auto")
    said = {"use_ema": cpu_plan(hyperparameters(use_ema="auto")).use_ema, "mixed_precision": "auto"}
    check_resumable(saved, identity_of(subject, **said, aspect_ratio_buckets=h.buckets), SCHEDULE)


def test_a_checkpoint_from_when_8_bit_adam_was_a_knob_of_its_own_is_resumed(subject: Subject) -> None:
    identity = identity_of(subject)
    assert (identity["optimizer"], identity["use_8bit_adam"]) == ("adamw 32 bits", False)
    check_resumable(checkpoint_of(identity), identity_of(subject, use_8bit_adam="False"), SCHEDULE)


def change_picture(folder: Path) -> None:
    shutil.copy(folder / "00.png", folder / "01.png")


def change_mask(folder: Path) -> None:
    Image.new("L", (80, 64), 255).save(folder / "02-mask.png")


def change_caption(folder: Path) -> None:
    (folder / "00.txt").write_text("on a chair")


def add_picture(folder: Path) -> None:
    shutil.copy(folder / "00.png", folder / "09.png")


def remove_picture(folder: Path) -> None:
    (folder / "01.png").unlink()


def touch(folder: Path) -> None:
    for path in folder.iterdir():
        path.touch()
    (folder / "notes.md").write_text("nothing that is trained on")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_picture, "pictures: 01.png changed"),
        (change_mask, "pictures: 02.png changed"),
        (change_caption, "captions: 00.png changed"),
        (add_picture, "pictures: 09.png new"),
        (remove_picture, "pictures: 01.png gone"),
        (touch, None),
    ],
)
def test_files_count_by_their_content(tmp_path: Path, change: Callable[[Path], None], said: str | None) -> None:
    paint_pictures(tmp_path / "a", 3)
    for number in range(3):
        (tmp_path / "a" / f"0{number}.txt").write_text(f"on table {number}")
    mask = Image.new("L", (80, 64), 0)
    mask.paste(255, (20, 16, 60, 48))
    mask.save(tmp_path / "a" / "02-mask.png")
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # another place for the same makes no difference
    change(tmp_path / "b")

    def identity(folder: str) -> dict[str, Any]:
        h = hyperparameters(
            instance_data_dir=str(tmp_path / folder),
            instance_prompt="photo of zwx toy, [filewords]",
            background_weight=0.5,
        )
        return make_identity(h, h, cpu_plan(h), find_subjects(h), 7, World())

    saved = checkpoint_of(identity("a"))
    if said is None:
        check_resumable(saved, identity("b"), SCHEDULE)
        return
    with pytest.raises(UserError) as caught:
        check_resumable(saved, identity("b"), SCHEDULE)
    assert said in str(caught.value)


def test_class_pictures_and_concepts_count_as_well(tmp_path: Path) -> None:
    values = {"class_prompt": "photo of a toy", "with_prior_preservation": True}
    first = make_subject(tmp_path, class_pictures=2)
    saved = checkpoint_of(identity_of(first, **values))
    paint_pictures(tmp_path / "class", 2, seed=9)
    with pytest.raises(UserError, match=r"class_pictures: 00.png, 01.png changed"):
        check_resumable(saved, identity_of(first, **values), SCHEDULE)
    concepts = [{"instance_prompt": "photo of zwx toy"}]
    other = dataclasses.replace(first, prompt="photo of qqz toy")
    saved = checkpoint_of(identity_of(first, concepts_list=concepts))
    with pytest.raises(UserError, match="concepts was"):
        check_resumable(saved, identity_of(other, concepts_list=concepts), SCHEDULE)


def alter(part: str) -> Callable[[PretrainedModel], None]:
    def change(base: PretrainedModel) -> None:
        with torch.no_grad():
            for parameter in getattr(base, part).parameters():
                parameter.mul_(1.001)

    return change


def other_prediction(base: PretrainedModel) -> None:
    base.scheduler.register_to_config(prediction_type="v_prediction")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", alter("unet")),
        ("vae", alter("vae")),
        ("text_encoder", alter("text_encoder")),
        ("scheduler", other_prediction),
    ],
)
def test_another_base_model_under_the_same_name_is_refused(
    base: PretrainedModel, subject: Subject, part: str, change: Callable[[PretrainedModel], None]
) -> None:
    identity = identity_of(subject)
    saved = checkpoint_of(identity | {BASE_MODEL_KEY: fingerprint(base)})
    check_resumable(saved, identity, SCHEDULE)  # before it is loaded, nothing is known
    check_resumable(saved, identity | {BASE_MODEL_KEY: fingerprint(base)}, SCHEDULE)
    other = copy.copy(base)
    other.unet, other.vae, other.text_encoder = map(copy.deepcopy, (base.unet, base.vae, base.text_encoder))
    other.scheduler = copy.deepcopy(base.scheduler)
    change(other)
    with pytest.raises(UserError, match=rf"base_model: {part} changed;"):
        check_resumable(saved, identity | {BASE_MODEL_KEY: fingerprint(other)}, SCHEDULE)


def test_a_model_in_half_precision_is_the_same_in_single(base: PretrainedModel) -> None:
    half = copy.deepcopy(base)
    for module in (half.unet, half.vae, half.text_encoder):
        module.half()
    single = copy.deepcopy(half)
    for module in (single.unet, single.vae, single.text_encoder):
        module.float()
    assert fingerprint(half) == fingerprint(single)


def test_checkpoints_of_another_model_are_passed_over(base: PretrainedModel, tmp_path: Path) -> None:
    def tensors(module: torch.nn.Module) -> dict[str, Any]:
        weights = {f"unet.{name}": parameter for name, parameter in module.named_parameters()}
        return {"weights": weights, "ema": None, "step": {}, "window": {}}

    save_checkpoint(tmp_path, 1, {"seed": 7}, tensors(base.unet), keep=5)
    save_checkpoint(tmp_path, 2, {"seed": 7}, tensors(torch.nn.Linear(2, 2)), keep=5)
    older = undamaged_checkpoints(tmp_path)
    report = Recorder()
    trained = attach(base, h := hyperparameters(), cpu_plan(h)).parameters
    found = first_that_fits(next(older), older, trained, report)
    assert found is not None
    assert found.step == 1
    assert "step-00000002 is passed over" in report.stream.getvalue()  # type: ignore[attr-defined]
    shutil.rmtree(tmp_path / "step-00000001")
    older = undamaged_checkpoints(tmp_path)
    assert first_that_fits(next(older), older, trained, report) is None
