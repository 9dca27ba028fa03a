"""The notebook, run as a user runs it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "dreambooth.ipynb"
STEPS = 20
SETTINGS = ("SAGEMAKER_ROLE", "TRAINING_IMAGE", "TRAINING_BUCKET")


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[nbformat.NotebookNode]:
    """The code cells with the outputs of a short run."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("NOTEBOOK_STEPS", str(STEPS))
        environment.setenv("NOTEBOOK_CLASS_IMAGES", "2")
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        for name in SETTINGS:
            environment.delenv(name, raising=False)
        client = NotebookClient(notebook, timeout=300, kernel_name="python3")
        client.execute(cwd=str(tmp_path_factory.mktemp("elsewhere")))
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def cell_with(cells: list[nbformat.NotebookNode], source: str) -> nbformat.NotebookNode:
    return next(cell for cell in cells if source in cell.source)


def text_of(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def picture_of(cell: nbformat.NotebookNode) -> Image.Image:
    shown = [output.data["image/png"] for output in cell.outputs if output.output_type == "display_data"]
    assert len(shown) == 1
    return Image.open(io.BytesIO(base64.b64decode(shown[0]))).convert("RGB")


def test_it_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")


def test_the_job_ran_and_the_loss_fell(cells: list[nbformat.NotebookNode]) -> None:
    log = text_of(cell_with(cells, "job = launcher.fit("))
    assert re.search(rf"^step={STEPS} loss=", log, re.MULTILINE)
    assert "phase=upload state=ended" in log
    shown = text_of(cell_with(cells, "losses ="))
    first, last = re.search(r"loss [▁-█]+  ([\d.]+) → ([\d.]+)", shown).groups()  # type: ignore[union-attr]
    assert float(last) < float(first)
    assert re.search(r"train [\d.]+ s", shown)


def test_the_model_is_in_s3(cells: list[nbformat.NotebookNode]) -> None:
    assert "5 pictures in s3://dreambooth/images/creature" in text_of(cell_with(cells, "upload_directory"))
    shown = text_of(cell_with(cells, "list_objects"))
    sizes = dict(re.findall(r"([\d,]+) bytes  s3://dreambooth/models/creature/(\S+)", shown))
    sizes = {name: int(size.replace(",", "")) for size, name in sizes.items()}
    assert {"model_index.json", "manifest.json", "unet/diffusion_pytorch_model.safetensors"} <= sizes.keys()
    assert all(size > 0 for size in sizes.values())


def test_the_pictures_are_shown(cells: list[nbformat.NotebookNode]) -> None:
    assert picture_of(cell_with(cells, "paint_subject(")).size == (640, 128)
    grid = picture_of(cell_with(cells, "draw_grid("))
    row = grid.height // 4
    before, after = (grid.crop((0, row * number, grid.width, row * (number + 1))) for number in (1, 2))
    assert before.tobytes() != after.tobytes()


def test_bad_input_is_explained(cells: list[nbformat.NotebookNode]) -> None:
    shown = text_of(cell_with(cells, "learning_rte"))
    assert "did you mean learning_rate?" in shown
    assert "resolution=500 is no multiple of 8" in shown


def test_nothing_is_noise(cells: list[nbformat.NotebookNode]) -> None:
    """No warnings and no progress bars, which would be the first thing that a reader sees."""
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]


def test_no_job_is_started_without_an_account(cells: list[nbformat.NotebookNode]) -> None:
    assert "no job started" in text_of(cells[-1])


def test_with_an_account_the_estimator_gets_what_it_takes(
    cells: list[nbformat.NotebookNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last cell, with an estimator in the SDK's place that notes what it is given."""
    (tmp_path / "sagemaker").mkdir()
    (tmp_path / "sagemaker" / "__init__.py").touch()
    (tmp_path / "sagemaker" / "estimator.py").write_text(
        "class Estimator:\n"
        "    def __init__(self, **options): calls.append(options)\n"
        "    def fit(self, inputs): calls.append(inputs)\n"
        "calls = []\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "sagemaker"]:
        monkeypatch.delitem(sys.modules, name)
    for name, value in zip(SETTINGS, ("arn:aws:iam::1:role/train", "image@sha256:0", "pictures"), strict=True):
        monkeypatch.setenv(name, value)
    exec(cells[-1].source, {"os": os, "INSTANCE_PROMPT": "photo of zwx toy", "CLASS_PROMPT": "photo of a toy"})
    options, inputs = sys.modules["sagemaker.estimator"].calls
    for name in ("sagemaker", "sagemaker.estimator"):
        monkeypatch.delitem(sys.modules, name)
    assert options["image_uri"] == "image@sha256:0"
    assert options["instance_count"] == 1
    assert options["hyperparameters"]["manual_upload_model_path"] == "s3://pictures/dreambooth/models/duck"
    assert options["hyperparameters"]["max_train_steps"] == "800"
    assert all(isinstance(value, str) for value in options["hyperparameters"].values())
    assert inputs == {"images": "s3://pictures/dreambooth/images/"}
    json.dumps(options)
