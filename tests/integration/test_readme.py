"""Python blocks of the documents, run as they stand but for numbers of steps and class images: with the pictures and
the base model that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from launcher.local.services import EmbeddedServices
from tests.helpers.readme_blocks import README, blocks, python_blocks, run
from tests.helpers.sdks import start_script

ROOT = README.parent


@pytest.fixture
def beside_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the pictures that the blocks name."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("services")
def test_the_blocks_run_in_order(beside_tests: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(blocks("launcher"), "README.md")
    assert len(blocks("launcher")) == 3
    lines = capfd.readouterr().out.splitlines()
    here, on_sagemaker = (line for line in lines if re.fullmatch(r"(/|s3:)\S+/model", line))
    assert (Path(here) / "model_index.json").is_file()
    assert on_sagemaker.startswith("s3://sagemaker-us-east-1-123456789012/dreambooth-sm/jobs/")
    assert (beside_tests / "zwx" / "model_index.json").is_file()
    assert "instance: ml.g4dn.xlarge (T4)" in lines


def test_the_estimators_block_runs(services: EmbeddedServices, beside_tests: Path) -> None:
    process = start_script("estimator", "readme_blocks.py", [], beside_tests, services.environment())
    output, errors = process.communicate()
    assert process.returncode == 0, output[-3000:] + errors[-3000:]
    assert len(blocks("estimator")) == 1
    assert output.splitlines()[-1].startswith("s3://sagemaker-us-east-1-123456789012/dreambooth-sm/jobs/")


def test_the_methods_blocks_train_an_adapter_a_hypernetwork_and_a_word_and_draw_with_them(
    beside_tests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run(python_blocks(ROOT / "docs" / "methods.md"), "methods.md")
    for name in ("zwx-duck.png", "zwx-toy.png", "zwx-word.png"):
        with Image.open(beside_tests / name) as picture:
            assert picture.size == (128, 128)
    adapters = {path.name for path in (beside_tests / "zwx-duck").glob("*.safetensors")}
    assert adapters == {"pytorch_lora_weights.safetensors", "zwx-duck.safetensors"}
    assert {path.name for path in (beside_tests / "zwx-toy").glob("zwx-toy.*")} == {"zwx-toy.safetensors", "zwx-toy.pt"}
