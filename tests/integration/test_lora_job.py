"""Whole jobs that train a LoRA: what the launcher gets of them, on this machine and from SageMaker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import launcher
from dreambooth_sm.manifest import Manifest
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.results import REPORT_FILES
from dreambooth_sm.storage import S3Uri, get_object, list_objects
from launcher.local.services import EmbeddedServices
from tests.helpers.readme_blocks import python_blocks

PROMPT = "photo of zwx toy"
OPTIONS: dict[str, Any] = {
    "instance_prompt": PROMPT,
    "class_prompt": "photo of toy",
    "resolution": 64,
    "max_train_steps": 2,
    "learning_rate": 1e-2,
    "seed": 7,
    "method": "lora",
    "prior": "output",
    "train_text_encoder": True,
    "model_name": "zwx",
    "validation_prompt": PROMPT,
    "validation_guidance_scale": 1,
    "log": lambda line: None,
}
FILES = {FILE, "zwx.safetensors"}


def names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=["local", "ml.g5.xlarge"])
def job(
    request: pytest.FixtureRequest,
    services: EmbeddedServices,
    tiny_base: Path,
    pictures: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> launcher.Job:
    """A job of this machine, whose model stays here, and one of SageMaker, which sends its model to S3."""
    place: dict[str, Any] = {"directory": tmp_path_factory.mktemp("job")}
    if request.param != "local":
        services.client().create_bucket(Bucket="loras")
        place = {"role": services.role, "output": "s3://loras/zwx"}
    return launcher.fit(pictures, base_model=tiny_base, instance_type=request.param, **place, **OPTIONS)


@pytest.mark.slow
def test_the_launcher_gets_the_adapter_that_the_model_card_draws_with(
    job: launcher.Job, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job.status == "Completed"
    found = names(job.download(tmp_path / "zwx"))
    samples = {name for name in found if name.startswith("samples/")}
    assert found - samples == FILES | set(REPORT_FILES)
    if job.model_uri.startswith("s3://"):
        target = S3Uri.parse(job.model_uri)
        listed = {entry.path for entry in Manifest.from_json(get_object(target / "manifest.json")).files}
        assert listed == found
        assert set(list_objects(target)) == listed | {"manifest.json"}

    drawn = [picture.tobytes() for picture in job.samples()]
    assert len(drawn) == len(samples) == 4  # of the prompt and the class, before and after
    assert len(set(drawn)) == 4
    assert "lora" in job.report()

    card = tmp_path / "zwx" / "README.md"
    fields = yaml.safe_load(card.read_text().split("---\n")[1])
    assert fields["base_model_relation"] == "adapter"
    assert {"lora", "dreambooth"} <= set(fields["tags"])
    (block,) = python_blocks(card)
    monkeypatch.chdir(tmp_path / "zwx")
    namespace: dict[str, Any] = {}
    small = ", height=64, width=64, num_inference_steps=1).images[0]"
    exec(block.replace("'the-base-model'", repr(str(tiny_base))).replace(").images[0]", small), namespace)
    assert isinstance(namespace["picture"], Image.Image)
    assert namespace["pipeline"].get_list_adapters().keys() == {"unet", "text_encoder"}
