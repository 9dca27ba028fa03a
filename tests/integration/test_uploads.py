"""A job that uploads its model: what it wrote goes up and away, and nothing else, whatever lies beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dreambooth_sm import outputs
from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.report import Reporter
from dreambooth_sm.results import REPORT_FILES
from dreambooth_sm.sagemaker import Contract
from dreambooth_sm.storage import MANIFEST_NAME, S3Uri, list_objects, verify
from launcher.local.s3 import EmbeddedS3
from tests.helpers.jobs import JobTree


def contents(directory: Path) -> dict[str, bytes]:
    """Files and links below a directory; of links, where they lead."""
    found: dict[str, bytes] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            found[path.relative_to(directory).as_posix()] = str(path.readlink()).encode()
        elif path.is_file():
            found[path.relative_to(directory).as_posix()] = path.read_bytes()
    return found


def test_a_job_with_much_else_below_its_model_directory(
    lay_out_job: Callable[..., JobTree],
    tmp_path: Path,
    tiny_base: Path,
    pictures: Path,
    target: S3Uri,
    s3: EmbeddedS3,
) -> None:
    """Base model, other pictures, class pictures, an older job's files, and links, some in the model's way."""
    job = lay_out_job(
        pretrained_model_name_or_path="/opt/ml/model/base",
        class_data_dir="/opt/ml/model/class_pictures",
        validation_prompt="photo of zwx toy",
        num_validation_images="1",
        save_steps="1",
        resume_from_checkpoint="no",
        manual_upload_model_path=str(target),
    )
    model = job.model
    model.mkdir(exist_ok=True)
    for source, name in ((tiny_base, "base"), (pictures, "pictures"), (pictures, "class_pictures")):
        shutil.copytree(source, model / name)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("somebody's")
    (elsewhere / "README.md").write_text("somebody's")
    (model / "older").mkdir()
    (model / "older" / "weights.safetensors").write_bytes(b"older")
    (model / "notes.txt").write_text("mine")
    (model / "vae").mkdir()
    (model / "vae" / "mine.txt").write_text("beside what the job writes")
    (model / "checkpoints" / "mine").mkdir(parents=True)
    (model / "checkpoints" / "mine" / "file").write_text("mine")
    (model / "empty").mkdir()
    (model / "link").symlink_to(elsewhere)
    before = contents(model) | contents(elsewhere)
    (model / "unet").symlink_to(elsewhere)  # in the way
    (model / "README.md").symlink_to(elsewhere / "README.md")
    shutil.rmtree(job.base / "checkpoints", ignore_errors=True)  # they come to lie beside the model

    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log

    assert (model / "model_location.txt").read_text().strip() == str(target)
    after = contents(model) | contents(elsewhere)
    made = {name for name in after.keys() - before.keys() if name.startswith("class_pictures/")}
    assert {name: content for name, content in after.items() if name not in made} == before | {
        "model_location.txt": f"{target}\n".encode()
    }
    assert (model / "empty").is_dir()
    found = verify(target, client=s3.client())
    assert found.whole
    assert not found.unknown
    sent = {entry.path for entry in found.manifest.files}
    assert {name for name in sent if not name.startswith("samples/")} == contents(tiny_base).keys() | set(REPORT_FILES)
    assert sum(name.startswith("samples/step-") for name in sent) >= 2
    assert len(list_objects(target, client=s3.client())) == len(sent) + 1


def test_a_model_that_would_replace_its_base_is_refused(lay_out_job: Callable[..., JobTree], tiny_base: Path) -> None:
    job = lay_out_job(pretrained_model_name_or_path="/opt/ml/base")
    shutil.copytree(tiny_base, job.model, dirs_exist_ok=True)
    (job.base / "base").symlink_to(job.model)
    before = contents(job.model)
    ended = job.run("train")
    assert ended.code == EXIT_BAD_INPUT, ended.log
    assert "the trained model would replace pretrained_model_name_or_path" in (job.failure or "")
    assert contents(job.model) == before


@pytest.mark.parametrize("fails", [False, True])
def test_only_what_was_written_is_sent_and_removed(
    tmp_path: Path, target: S3Uri, s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    theirs = {"theirs.bin": b"1", "unet/theirs.bin": b"2", "samples/old.png": b"3", "a/b/c": b"4"}
    ours = {"unet/config.json": b"5", "report.json": b"6", "text_encoder/x/model.bin": b"7"}
    for name, content in (theirs | ours).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "broken").symlink_to("nowhere")  # what is not the job's is not even looked at
    h = Hyperparameters(instance_prompt="photo of zwx toy")
    bucket = S3Uri("no-such-bucket", "x") if fails else target
    arguments = (tmp_path, set(ours), bucket, h, 7, Contract(tmp_path, {}), Reporter())
    if fails:
        with pytest.raises(UserError, match="bucket does not exist"):
            outputs.upload(*arguments)
        assert contents(tmp_path) == theirs | ours | {"broken": b"nowhere"}
        return
    outputs.upload(*arguments)
    assert contents(tmp_path) == theirs | {"model_location.txt": f"{target}\n".encode(), "broken": b"nowhere"}
    assert not (tmp_path / "text_encoder").exists()
    assert list_objects(target, client=s3.client()).keys() == ours.keys() | {MANIFEST_NAME}
