"""Jobs that train many subjects, one after another."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dreambooth_sm.errors import EXIT_FAILURE, EXIT_OK, EXIT_STOPPED
from dreambooth_sm.fleet.outcome import FAILURE_NAME
from dreambooth_sm.manifest import MANIFEST_NAME, Manifest
from dreambooth_sm.storage import S3Uri, download_directory, list_objects, upload_directory
from launcher.local.s3 import EmbeddedS3
from tests.helpers.jobs import JobTree, end, read_until
from tests.helpers.training import paint_pictures

LIST = "/opt/ml/input/data/fleet/fleet.jsonl"
OPTIONS: dict[str, str] = {"class_data_dir": "/opt/ml/class", "max_train_steps": "3"}
LORA = {"method": "lora", "lora_rank": "2"}


def fleet_in(root: Path, subjects: list[dict[str, Any]]) -> Path:
    """A channel with a list, and with pictures of the subjects that have none in S3."""
    channel = root / "channel"
    for number, subject in enumerate(subjects):
        if subject["images"] == subject["id"]:
            paint_pictures(channel / subject["id"], 2 + number % 2, seed=number)
    (channel / "fleet.jsonl").write_text("".join(f"{json.dumps(subject)}\n" for subject in subjects))
    return channel


def trained(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of the files of a model."""
    return {
        f"{path.relative_to(directory)}:{name}": tensor
        for path in sorted(directory.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and bool(one) and all(torch.equal(one[name], other[name]) for name in one)


SUBJECTS: list[dict[str, Any]] = [
    {"id": "duck", "images": "duck", "instance_prompt": "photo of zwx duck", "seed": 3},
    {"id": "bad", "images": "bad", "instance_prompt": "photo of zwx bad"},
    {"id": "cat", "images": "cat", "instance_prompt": "photo of zwx cat", "seed": 4, "max_train_steps": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("method", [LORA, {"method": "full"}], ids=["lora", "full"])
def test_subjects_are_trained_as_if_alone_and_a_bad_one_ends_no_job(
    method: dict[str, str], tiny_base: Path, s3: EmbeddedS3, tmp_path: Path
) -> None:
    channel = fleet_in(tmp_path, SUBJECTS)
    for picture in (channel / "bad").iterdir():
        picture.write_bytes(b"no picture")
    options = {**OPTIONS, **method}
    channels = {"fleet": channel, "model": tiny_base}
    values = {**options, "fleet": LIST, "instance_prompt": "photo of zwx toy"}
    tree = JobTree.lay_out(tmp_path / "fleet", values, channels, s3.environment())
    ended = tree.run("train")
    assert ended.code == EXIT_FAILURE
    failure = tree.failure or ""
    assert failure.startswith("1 of 3 subjects failed")
    assert "bad: " in failure
    assert "00.png" in json.loads((tree.model / "bad" / FAILURE_NAME).read_text())["reason"]
    assert ended.log.count("phase=class_images state=started") == 2
    listed = [Manifest.from_json((tree.model / name / MANIFEST_NAME).read_text()).files for name in ("duck", "cat")]
    assert all("report.json" in {entry.path for entry in files} for files in listed)
    # The one that found everything made.
    own = {name: str(value) for name, value in SUBJECTS[2].items() if name not in ("id", "images")}
    channels = {"images": channel / "cat", "model": tiny_base}
    alone = JobTree.lay_out(tmp_path / "alone", {**options, **own}, channels, s3.environment())
    single = alone.run("train")
    assert single.code == EXIT_OK, single.log
    assert same(trained(tree.model / "cat"), trained(alone.model))


@pytest.mark.slow
def test_an_interrupted_fleet_is_resumed_at_its_subject_and_step(
    tiny_base: Path, s3: EmbeddedS3, target: S3Uri, tmp_path: Path
) -> None:
    long = {"instance_prompt": "photo of zwx dog", "seed": 5, "max_train_steps": 20}
    subjects: list[dict[str, Any]] = [
        {"id": "duck", "images": "duck", "instance_prompt": "photo of zwx duck", "max_train_steps": 2},
        {"id": "dog", "images": str(target / "dog"), "output": str(target / "models" / "rex"), **long},
        {"id": "odd", "images": "odd", "instance_prompt": "photo of zwx odd", "learning_rate": "much"},
        {"id": "cat", "images": "cat", "instance_prompt": "photo of zwx cat", "max_train_steps": 2},
    ]
    channel = fleet_in(tmp_path, subjects)
    upload_directory(paint_pictures(tmp_path / "dog", 2)[0].parent, target / "dog", client=s3.client())
    values = {**OPTIONS, **LORA, "fleet": LIST, "manual_upload_model_path": str(target / "fleet")}
    channels = {"fleet": channel, "model": tiny_base}
    tree = JobTree.lay_out(tmp_path / "fleet", values, channels, s3.environment())

    process = tree.start("train")
    log = read_until(process, "^subject=dog state=started") + read_until(process, "^step=3 ")
    process.send_signal(signal.SIGTERM)
    stopped = end(process, log)
    assert stopped.code == EXIT_STOPPED, stopped.log
    assert tree.checkpoints == ["dog"]
    there = list_objects(target, client=s3.client())
    assert f"fleet/duck/{MANIFEST_NAME}" in there
    assert f"models/rex/{MANIFEST_NAME}" not in there

    shutil.rmtree(tree.model)  # a fresh instance has the checkpoints alone
    ended = tree.run("train")
    assert ended.code == EXIT_FAILURE
    assert (tree.failure or "").startswith("1 of 4 subjects failed")
    assert "odd: learning_rate" in (tree.failure or "")
    assert "subject=duck state=there" in ended.log
    assert "resumed after step" in ended.log
    told = [int(line["step"]) for line in ended.steps]
    assert told[0] > 3
    assert told[-3:] == [20, 1, 2]
    assert tree.checkpoints == []
    there = list_objects(target, client=s3.client())
    assert {f"models/rex/{MANIFEST_NAME}", f"fleet/odd/{FAILURE_NAME}", f"fleet/cat/{MANIFEST_NAME}"} <= there.keys()
    assert not [name for name in there if "checkpoint" in name]

    own = {name: str(value) for name, value in long.items()}
    channels = {"images": tmp_path / "dog", "model": tiny_base}
    alone = JobTree.lay_out(tmp_path / "dog-alone", {**OPTIONS, **LORA, **own}, channels, s3.environment())
    assert alone.run("train").code == EXIT_OK
    download_directory(target / "models" / "rex", tmp_path / "rex", client=s3.client())
    assert same(trained(tmp_path / "rex"), trained(alone.model))


@pytest.mark.slow
def test_each_process_has_its_own_subjects(tiny_base: Path, s3: EmbeddedS3, tmp_path: Path) -> None:
    subjects = [{"id": f"s{n}", "images": f"s{n}", "instance_prompt": f"photo of zwx {n}"} for n in range(3)]
    channel = fleet_in(tmp_path, subjects)
    (channel / "s1" / "00.png").write_bytes(b"no picture")
    values = {**LORA, "class_prompt": "None", "max_train_steps": "1", "fleet": LIST, "num_processes": "2"}
    tree = JobTree.lay_out(tmp_path / "fleet", values, {"fleet": channel, "model": tiny_base}, s3.environment())
    ended = tree.run("train")
    assert ended.code == EXIT_FAILURE
    assert (tree.failure or "").startswith("1 of 3 subjects failed")
    assert len(ended.steps) == 2
    assert sorted(path.parent.name for path in tree.model.glob(f"*/{MANIFEST_NAME}")) == ["s0", "s2"]
    assert [path.parent.name for path in tree.model.glob(f"*/{FAILURE_NAME}")] == ["s1"]
