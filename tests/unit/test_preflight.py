"""What a job says before it begins."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from dreambooth_sm.context import Context
from dreambooth_sm.distributed import World
from dreambooth_sm.preflight import find_unused_channels, preflight
from dreambooth_sm.sagemaker import Contract, localize
from tests.helpers.training import Recorder, hyperparameters, paint_pictures


def job_in(base: Path, *channels: str, **values: object) -> Context:
    contract = Contract(base, channels={name: base / "input" / "data" / name for name in channels})
    asked = hyperparameters(**values)
    return Context(asked, asked, contract, World(), Recorder(), threading.Event(), contextlib.ExitStack())


def unused(base: Path, *channels: str, **values: object) -> list[str]:
    job = job_in(base, *channels, **values)
    job.h = localize(job.h, job.contract)
    return find_unused_channels(job)


def test_channels_that_nothing_reads_are_told(tmp_path: Path) -> None:
    """A channel's name alone makes no class pictures of what is in it."""
    assert unused(tmp_path, "images", "regularization", "code") == ["regularization"]
    assert unused(tmp_path, "images", "model", pretrained_model_name_or_path="toybox") == ["model"]
    assert unused(tmp_path, "image", "images") == ["image"]


def test_the_job_says_so_and_continues(tmp_path: Path, tiny_base: Path) -> None:
    paint_pictures(tmp_path / "input" / "data" / "images", 2)
    job = job_in(tmp_path, "images", "spare", pretrained_model_name_or_path=str(tiny_base))
    assert len(preflight(job).subjects[0].pictures) == 2
    log = job.report.stream.getvalue()  # type: ignore[attr-defined]
    assert log.count("warning: the channel spare is not used") == 1
    assert "the channel images" not in log


def test_channels_that_something_reads(tmp_path: Path) -> None:
    data = "/opt/ml/input/data"
    concepts = f'[{{"instance_data_dir": "{data}/ducks/one", "instance_prompt": "photo of zwx toy"}}]'
    assert unused(tmp_path, "ducks", concepts_list=concepts) == []
    assert unused(tmp_path, "table", concepts_list=f"{data}/table/concepts.json") == []
    values = {
        "class_data_dir": f"{data}/regularization/",
        "class_prompt": "photo of a toy",
        "pretrained_model_name_or_path": f"{data}/model/sd.safetensors",
        "fidelity_encoders": f"dino={data}/dino",
    }
    assert unused(tmp_path, "images", "regularization", "model", "dino", **values) == []
