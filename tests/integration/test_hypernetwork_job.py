"""Whole jobs that train a hypernetwork: what they leave, and what can be drawn with it."""

from __future__ import annotations

import io
import json
import re
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image

import launcher
from dreambooth_sm import selection
from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_OK
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.job import run
from dreambooth_sm.manifest import Manifest
from dreambooth_sm.methods.hypernetwork import apply
from dreambooth_sm.report import Reporter
from dreambooth_sm.results import REPORT_FILES
from dreambooth_sm.sagemaker import read_contract
from dreambooth_sm.storage import S3Uri, list_objects
from launcher.local.s3 import EmbeddedS3
from tests.helpers.jobs import Ended, JobTree
from tests.helpers.readme_blocks import python_blocks

PROMPT = "photo of zwx toy"
VALUES = {"method": "hypernetwork", "learning_rate": "1e-2", "model_name": "zwx", "export_precision": "fp32"}
FILES = {"zwx.safetensors", "zwx.pt"}
STEPS = 12


def names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def same_files(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


def picture(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    (drawn,) = pipeline(PROMPT, num_inference_steps=2, height=64, width=64, generator=generator).images
    return np.asarray(drawn)


@pytest.fixture(scope="module")
def done(tiny_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[JobTree, Ended]:
    values = VALUES | {"validation_prompt": PROMPT, "validation_steps": "1", "use_ema": "true"}
    channels = {"images": pictures, "model": tiny_base}
    job = JobTree.lay_out(tmp_path_factory.mktemp("job") / "opt-ml", values, channels, {})
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    return job, ended


def test_it_leaves_its_files_and_nothing_else_of_a_model(done: tuple[JobTree, Ended]) -> None:
    job, ended = done
    found = names(job.model)
    assert {name for name in found if not name.startswith("samples/")} == FILES | set(REPORT_FILES)
    assert [step["step"] for step in ended.steps] == ["1", "2"]
    assert all("prior_loss" in step for step in ended.steps)
    for step in (0, 1, 2):
        assert sum(name.startswith(f"samples/step-{step:06}") for name in found) == 2  # the prompt's and the class'
    assert any(name.startswith("samples/class-") for name in found)


@pytest.mark.parametrize("name", sorted(FILES))
def test_its_files_draw(name: str, done: tuple[JobTree, Ended], tiny_base: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    before = picture(pipeline)
    apply(pipeline, done[0].model / name)
    after = picture(pipeline)
    assert not np.array_equal(after, before)
    apply(pipeline, done[0].model / min(FILES - {name}))
    assert np.array_equal(picture(pipeline), after)


def test_the_report_tells_of_the_method(done: tuple[JobTree, Ended]) -> None:
    facts = json.loads((done[0].model / "report.json").read_text())
    assert facts["hyperparameters"]["method"] == "hypernetwork"
    assert facts["hyperparameters"]["hypernetwork_width"] == 2
    assert "export" not in facts["hyperparameters"]  # the other method's
    assert facts["plan"]["train_text_encoder"] is False
    assert facts["plan"]["ema"] != "no"
    assert "hypernetwork" in (done[0].model / "report.html").read_text()


def test_the_model_card_says_what_it_is_and_how_to_draw_with_it(
    done: tuple[JobTree, Ended], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = done[0].model / "README.md"
    _, front, text = card.read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["base_model_relation"] == "adapter"
    assert "library_name" not in fields  # no library loads it by itself
    assert {"hypernetwork", "dreambooth", "text-to-image"} <= set(fields["tags"])
    assert "with a hypernetwork beside it" in text
    assert "models/hypernetworks" in text
    (block,) = python_blocks(card)
    shutil.copy(done[0].model / "zwx.safetensors", tmp_path)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(block.replace("'the-base-model'", repr(str(tiny_base))), namespace)
    assert isinstance(namespace["picture"], Image.Image)


def test_a_stopped_job_is_resumed_to_the_same_files(lay_out_job: Callable[..., JobTree]) -> None:
    values = VALUES | {"max_train_steps": str(STEPS), "prior": "output", "use_ema": "true"}
    whole = lay_out_job("whole", **values)
    reference = whole.run("train")
    assert reference.code == EXIT_OK, reference.log
    # WebUI's file names the base model.
    values["pretrained_model_name_or_path"] = str(whole.base / "input/data/model")
    job = lay_out_job("stopped", **values)
    stopped = job.stop_after(3)
    assert not FILES & names(job.model)
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert stopped.losses | ended.losses == reference.losses
    assert len(stopped.losses) < STEPS
    assert same_files(job.model, whole.model)


def test_everything_goes_to_s3(lay_out_job: Callable[..., JobTree], target: S3Uri, s3: EmbeddedS3) -> None:
    job = lay_out_job(**VALUES, manual_upload_model_path=str(target), with_prior_preservation="false")
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert names(job.model) == {"model_location.txt"}
    objects = list_objects(target, client=s3.client())
    body = s3.client().get_object(Bucket=target.bucket, Key=f"{target.prefix}/manifest.json")["Body"].read()
    listed = {entry.path for entry in Manifest.from_json(body).files}
    assert listed == FILES | set(REPORT_FILES)
    assert set(objects) == listed | {"manifest.json"}


def test_an_sdxl_base_model_is_refused_before_anything_is_loaded(
    tiny_xl_base: Path, pictures: Path, tmp_path: Path
) -> None:
    job = JobTree.lay_out(tmp_path / "opt-ml", VALUES, {"images": pictures, "model": tiny_xl_base}, {})
    ended = job.run("train")
    assert ended.code == EXIT_BAD_INPUT, ended.log
    assert job.failure is not None
    assert "method=hypernetwork: the base model is an SDXL model" in job.failure
    assert len(job.failure.strip().splitlines()) == 1
    assert "Traceback" not in ended.log
    assert "phase=load_base" not in ended.log


def log_of(job: JobTree) -> str:
    """Runs a job in this process."""
    contract, log = read_contract(job.base, need_hyperparameters=True), io.StringIO()
    run(Hyperparameters.parse(contract.hyperparameters), contract, report=Reporter(log), stop=threading.Event())
    return log.getvalue()


def test_the_best_checkpoint_is_exported(lay_out_job: Callable[..., JobTree], monkeypatch: pytest.MonkeyPatch) -> None:
    # Fewer pictures than are worth measuring: what is chosen has to be what is exported, whichever it is.
    monkeypatch.setattr(selection, "PLACES", ("", "in the snow"))
    monkeypatch.setattr(selection, "CLASS_PICTURES", 2)
    monkeypatch.setattr(selection, "draw", partial(selection.draw, steps=5))
    values = VALUES | {
        "pretrained_model_name_or_path": "toybox",
        "class_prompt": "None",
        "max_train_steps": "2",
        "save_steps": "1",
        "checkpoints_total_limit": "2",
        "fidelity_encoders": "judge",
    }
    job = lay_out_job(**values, select_best="true")
    log = log_of(job)
    assert "verdict: " in log
    best = re.search(r"^best=(\d)", log, re.MULTILINE)
    assert best is not None
    short = lay_out_job("short", **values | {"max_train_steps": best[1], "save_steps": "0"})
    log_of(short)
    assert same_files(job.model, short.model)


def test_the_launcher_checks_runs_and_shows_it(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    job = launcher.fit(
        str(pictures),
        base_model=str(tiny_base),
        instance_prompt=PROMPT,
        class_prompt="photo of toy",
        resolution=64,
        num_class_images=2,
        max_train_steps=2,
        method="hypernetwork",
        model_name="zwx",
        directory=tmp_path / "job",
        log=lambda line: None,
    )
    assert job.status == "Completed"
    assert names(job.download(tmp_path / "zwx")) >= FILES | set(REPORT_FILES)
    assert len(job.samples()) > 0  # of the class
    assert "hypernetwork" in job.report()
    estimate = launcher.estimate(
        instance_type="ml.g4dn.xlarge", instance_prompt=PROMPT, class_prompt="photo of toy", method="hypernetwork"
    )
    assert any(line.startswith("plan: roomy: hypernetwork") for line in estimate.lines())
