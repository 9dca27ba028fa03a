"""``toybox-flow``, the small base model that matches flows: how it is found, and what it draws."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from dreambooth_sm import toybox
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.models import load_base
from dreambooth_sm.stored.directory import read_directory
from dreambooth_sm.toybox.judge import load_judge
from launcher.aws.image_tags import code_digest
from launcher.prepare import prepare, prepare_local
from launcher.training_request import MODEL_CHANNEL
from tests.helpers.training import hyperparameters
from toybox.examine import agreement, draw, full_caption
from toybox.toys import random_scene

JOB = {"images": toybox.PHOTOS, "instance_prompt": "photo of zwx toy", "base_model": "toybox-flow", "resolution": 128}
MEGABYTE = 1_000_000


def test_it_is_small_enough_to_be_shipped() -> None:
    assert sum(path.stat().st_size for path in toybox.FLOW_BASE.rglob("*") if path.is_file()) <= 16 * MEGABYTE


def test_it_does_not_say_where_it_was_made() -> None:
    assert not [path for path in toybox.FLOW_BASE.rglob("*.json") if "_name_or_path" in path.read_text()]


def test_jobs_know_it_by_its_name() -> None:
    h = hyperparameters(pretrained_model_name_or_path="toybox-flow", method="lora")
    assert h.architecture == "z_image"
    assert load_base(h).family.facts.name == "z_image"


def test_where_it_is_missing_jobs_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(toybox.SHIPPED, "toybox-flow", tmp_path / "nothing")
    with pytest.raises(UserError, match=r"toybox-flow is not in the image; name it as the launcher's base_model"):
        Hyperparameters.parse({"pretrained_model_name_or_path": "toybox-flow"})


def test_a_job_of_this_machine_finds_it_here() -> None:
    job = prepare_local({**JOB, "method": "lora", "instance_type": "local"})
    assert MODEL_CHANNEL not in job.sources
    assert job.hyperparameters.pretrained_model_name_or_path == "toybox-flow"


@pytest.mark.slow
def test_the_image_has_it_not_and_jobs_on_sagemaker_are_sent_it(tmp_path: Path) -> None:
    options = {"instance_type": "ml.g5.xlarge", "bucket": "a-bucket", "role": "arn:aws:iam::123456789012:role/train"}
    job = prepare({**JOB, "method": "lora", "image_uri": "image:1", **options}, None)
    files = {path.relative_to(toybox.FLOW_BASE).as_posix() for path in toybox.FLOW_BASE.rglob("*") if path.is_file()}
    assert files in [set(sent) for sent in job.files.values()]
    assert MODEL_CHANNEL in job.channels
    assert job.hyperparameters.base_architecture == "z_image"

    package = tmp_path / "dreambooth_sm"
    package.mkdir()
    before = code_digest(package)
    (package / "flow_base").mkdir()
    (package / "flow_base" / "file").write_text("")
    assert code_digest.__wrapped__(package) == before


@pytest.mark.slow
def test_it_draws_what_prompts_say() -> None:
    rng = random.Random(5)
    scenes = [random_scene(rng) for _ in range(8)]
    pipeline = read_directory(toybox.FLOW_BASE).load(torch.float32)
    drawn = draw(pipeline, [full_caption(scene, rng) for scene in scenes], seed=0)
    assert agreement(load_judge().read(drawn), scenes)["all"] >= 7 / 8
