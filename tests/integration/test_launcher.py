"""``launcher.fit``: real jobs on this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import launcher
from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import S3Uri, list_objects, upload_directory
from launcher.local.s3 import EmbeddedS3
from launcher.local.tree import lay_out
from tests.helpers.jobs import SMALL, read_weights, same_weights
from tests.helpers.patience import PATIENCE

OPTIONS = {name: SMALL[name] for name in ("resolution", "center_crop", "max_train_steps", "learning_rate", "seed")}
PROMPT = "photo of zwx toy"
PHASES = ["check", "load_base", "class_images", "encode", "train", "save"]


@pytest.fixture(autouse=True)
def _this_s3_and_no_gpu(s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**s3.environment(), "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)


def test_importing_the_client_imports_nothing_heavy() -> None:
    code = "import sys, json, launcher, dreambooth_sm.hyperparameters; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert "dreambooth_sm.hyperparameters" in modules
    heavy = {"torch", "diffusers", "transformers", "numpy", "boto3", "botocore", "sagemaker", "moto"}
    assert not heavy.intersection(modules)


def test_from_a_folder_to_a_folder(pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options = OPTIONS | {"max_train_steps": 3, "logging_steps": 1}
    job = launcher.fit(
        pictures, instance_prompt=PROMPT, base_model=tiny_base, directory=tmp_path, log=lines.append, **options
    )
    assert job.directory == tmp_path
    assert job.model_uri == str(tmp_path / "model")
    assert not same_weights(
        read_weights(tmp_path / "model", "unet"),
        {name: tensor.half() for name, tensor in read_weights(tiny_base, "unet").items()},
    )
    assert [entry["step"] for entry in job.history()] == [1, 2, 3]
    assert all(entry["loss"] > 0 for entry in job.history())
    assert list(job.seconds) == PHASES
    assert any(line.startswith("plan: ") for line in lines)


def test_from_s3_to_s3(pictures: Path, tiny_base: Path, target: S3Uri, tmp_path: Path) -> None:
    source = S3Uri(target.bucket, "images/duck")
    upload_directory(pictures, source)
    job = launcher.fit(
        str(source),
        instance_prompt=PROMPT,
        class_prompt="photo of toy",
        base_model=tiny_base,
        output=str(target),
        directory=tmp_path,
        num_class_images=1,
        log=lambda line: None,
        **OPTIONS,
    )
    assert job.model_uri == str(target)
    assert list(job.seconds) == [*PHASES, "upload"]
    assert {"manifest.json", "model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= set(
        list_objects(target)
    )


def test_bad_input_is_told_in_full_before_anything_starts(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.jpg").write_text("no picture")
    with pytest.raises(UserError) as caught:
        launcher.fit(
            pictures,
            instance_prompt="",
            base_model=tmp_path / "nothing",
            output="bucket/prefix",
            instance_type="ml.g4dn.xlage",
            directory=tmp_path / "job",
            resolution=510,
            instance_data_dir="/elsewhere",
            learning_rat=1e-6,
        )
    names = (
        "ml.g4dn.xlage",
        "directory is for local jobs",
        "instance_data_dir",
        "base_model",
        "learning_rate?",
        "instance_prompt",
        "resolution=510",
        "output: 'bucket/prefix'",
        "a.jpg",
    )
    for name in names:
        assert sum(name in problem for problem in caught.value.problems) == 1, name
    assert len(caught.value.problems) == len(names)
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(("files", "words"), [([], "holds no pictures"), (None, "is not a folder")])
def test_a_folder_without_pictures(files: list[str] | None, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    if files is not None:
        folder.mkdir()
    with pytest.raises(UserError, match=f"{folder} {words}"):
        launcher.fit(folder, instance_prompt=PROMPT, directory=tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_a_prefix_without_pictures(target: S3Uri, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"there is nothing below {re.escape(str(target))}"):
        launcher.fit(str(target), instance_prompt=PROMPT, directory=tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_a_failed_job_says_why(pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(launcher.JobFailed, match="s3://nobodys-bucket/x: the bucket does not exist"):
        launcher.fit(
            pictures,
            instance_prompt=PROMPT,
            base_model=tiny_base,
            output="s3://nobodys-bucket/x",
            directory=tmp_path,
            log=lambda line: None,
            **OPTIONS,
        )


SCRIPT = """
import sys, launcher
pictures, base_model, directory = sys.argv[1:]
launcher.fit(pictures, instance_prompt="photo of zwx toy", base_model=base_model, directory=directory, resolution=64,
             center_crop=True, max_train_steps=2000, logging_steps=1, log=lambda line: print(line, flush=True))
"""


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_stops_the_job_with_a_checkpoint(pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    # A terminal and a notebook send SIGINT to the whole process group: to the launcher and to its job.
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(pictures), str(tiny_base), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        log = next((line for line in process.stdout if line.startswith("step=2 ")), "")
        assert log, "the job ended before its second step"
        os.killpg(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode not in (0, None)
    assert "KeyboardInterrupt" in rest
    assert len(list((tmp_path / "checkpoints").glob("step-*/state.json"))) == 1
    assert_ended(tmp_path)


def test_an_error_in_the_log_function_costs_the_log_alone(pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    def log(line: str) -> None:
        if line.startswith("step=1 "):
            raise ZeroDivisionError

    options = OPTIONS | {"max_train_steps": 3, "logging_steps": 1}
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
        job = launcher.fit(
            pictures, instance_prompt=PROMPT, base_model=tiny_base, directory=tmp_path, log=log, **options
        )
    assert job.status == "Completed"
    assert [entry["step"] for entry in job.history()] == [1, 2, 3]


def assert_ended(directory: Path) -> None:
    """No job runs on this tree any more."""
    deadline = time.monotonic() + PATIENCE
    while running := [pid for pid in Path("/proc").iterdir() if pid.name.isdigit() and _runs_on(pid, directory)]:
        assert time.monotonic() < deadline, running
        time.sleep(0.05)


def _runs_on(process: Path, directory: Path) -> bool:
    try:
        return f"SAGEMAKER_BASE_DIR={directory}".encode() in (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def test_a_second_job_in_the_same_tree_sees_nothing_of_the_first(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.png").write_bytes(b"")
    base = tmp_path / "opt-ml"
    lay_out(base, {}, {"images": str(tmp_path / "cat")})
    (base / "output" / "failure").write_text("the first job's")
    lay_out(base, {}, {"images": str(tmp_path / "dog")})
    assert [path.name for path in (base / "input" / "data" / "images").iterdir()] == ["dog.png"]
    assert (tmp_path / "cat" / "cat.png").exists()
    assert not (base / "output" / "failure").exists()
