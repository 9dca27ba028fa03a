"""Python blocks of the documents, run as they stand: with the pictures and the base model that they name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launcher.local.services import EmbeddedServices
from tests.helpers.readme_blocks import README, blocks, python_blocks
from tests.helpers.sdks import start_script

ROOT = README.parent


def test_the_blocks_run_in_order(tmp_path: Path) -> None:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    settings = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    ended = subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "readme_blocks.py", "launcher"],
        cwd=tmp_path,
        env={**settings, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert len(blocks("launcher")) == 3
    lines = ended.stdout.splitlines()
    here, on_sagemaker = (line for line in lines if re.fullmatch(r"(/|s3:)\S+/model", line))
    assert (Path(here) / "model_index.json").is_file()
    assert on_sagemaker.startswith("s3://sagemaker-us-east-1-123456789012/dreambooth-sm/jobs/")
    assert (tmp_path / "zwx" / "model_index.json").is_file()
    assert "instance: ml.g4dn.xlarge (T4)" in lines


def test_the_estimators_block_runs(services: EmbeddedServices, tmp_path: Path) -> None:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    process = start_script("estimator", "readme_blocks.py", ["estimator"], tmp_path, services.environment())
    output, errors = process.communicate()
    assert process.returncode == 0, output[-3000:] + errors[-3000:]
    assert len(blocks("estimator")) == 1
    assert output.splitlines()[-1].startswith("s3://sagemaker-us-east-1-123456789012/dreambooth-sm/jobs/")


def test_the_methods_blocks_train_an_adapter_a_hypernetwork_and_a_word_and_draw_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    namespace: dict[str, Any] = {}
    for block in python_blocks(ROOT / "docs" / "methods.md"):
        exec(compile(block, "methods.md", "exec"), namespace)
    for name in ("zwx-duck.png", "zwx-toy.png", "zwx-word.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (128, 128)
    adapters = {path.name for path in (tmp_path / "zwx-duck").glob("*.safetensors")}
    assert adapters == {"pytorch_lora_weights.safetensors", "zwx-duck.safetensors"}
    assert {path.name for path in (tmp_path / "zwx-toy").glob("zwx-toy.*")} == {"zwx-toy.safetensors", "zwx-toy.pt"}
