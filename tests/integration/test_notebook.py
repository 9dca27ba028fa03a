"""The notebooks, run as a user runs them, and as they are stored."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from launcher.local.s3 import EmbeddedS3
from tests.helpers.patience import PATIENCE

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
ENGLISH, CHINESE = NOTEBOOKS / "dreambooth.ipynb", NOTEBOOKS / "dreambooth_zh.ipynb"
STEPS = 20
SHORT: dict[str, Any] = {
    "max_train_steps": STEPS,
    "num_class_images": 2,
    "num_validation_images": 1,
    "fidelity_encoders": None,
    "resolution": 64,
}
SIDE = 128
# Before the notebook's own cells: its jobs and servers are forks, and all draw in few steps.
QUICKLY = f"""
import subprocess, sys, types
sys.path.insert(0, {str(ROOT)!r})
from launcher.local import server_process, training_job
from tests.helpers import forks
from tests.helpers.drawing import FEW_STEPS, draw_otherwise
draw_otherwise(setattr, **FEW_STEPS)
forking = types.SimpleNamespace(**{{**vars(subprocess), "Popen": forks.Popen}})
training_job.subprocess = server_process.subprocess = forking
"""
TOKEN = "hf_" + "aBcDeFgHiJ" * 3


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[nbformat.NotebookNode]:
    """The code cells with the outputs of a short run, which draws in few steps."""
    notebook = nbformat.read(ENGLISH, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(QUICKLY))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("NOTEBOOK_SETTINGS", json.dumps(SHORT))
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        environment.setenv("HF_TOKEN", TOKEN)
        client = NotebookClient(notebook, timeout=int(PATIENCE), startup_timeout=int(PATIENCE), kernel_name="python3")
        client.execute(cwd=str(tmp_path_factory.mktemp("elsewhere")))
    return code_cells(notebook)[1:]


def cell_with(cells: list[nbformat.NotebookNode], source: str) -> nbformat.NotebookNode:
    return next(cell for cell in cells if source in cell.source)


def text_of(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def html_of(cell: nbformat.NotebookNode) -> list[str]:
    return [output.data["text/html"] for output in cell.outputs if "text/html" in output.get("data", {})]


def picture_of(cell: nbformat.NotebookNode) -> Image.Image:
    shown = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(shown) == 1
    return Image.open(io.BytesIO(base64.b64decode(shown[0]))).convert("RGB")


def test_the_job_is_watched_in_one_output(cells: list[nbformat.NotebookNode]) -> None:
    [html] = html_of(cell_with(cells, "job.wait()"))
    assert "Completed" in html
    assert f"step {STEPS}/{STEPS}" in html
    assert "phase=save state=ended" in html


def test_the_loss_fell(cells: list[nbformat.NotebookNode]) -> None:
    shown = text_of(cell_with(cells, "losses ="))
    first, last = re.search(r"loss [▁-█]+  ([\d.]+) → ([\d.]+)", shown).groups()  # type: ignore[union-attr]
    assert float(last) < float(first)
    assert re.search(r"train [\d.]+ s", shown)


def test_the_pictures_went_to_s3_and_the_model_came_from_there(cells: list[nbformat.NotebookNode]) -> None:
    assert "files: 5 sent to s3://sagemaker-us-east-1-123456789012/" in text_of(cell_with(cells, "wait=False"))
    shown = text_of(cell_with(cells, "job.download"))
    assert shown.startswith("s3://")
    sizes = {name: int(size.replace(",", "")) for size, name in re.findall(r"([\d,]+) bytes  (\S+)", shown)}
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= sizes.keys()
    assert all(size > 0 for size in sizes.values())


def test_the_estimate_names_plan_minutes_and_dollars(cells: list[nbformat.NotebookNode]) -> None:
    shown = text_of(cell_with(cells, "launcher.estimate"))
    assert re.search(r"ml\.g5\.xlarge.*\n.*plan: .*\n.*about \d+ minutes, about \$\d", shown)


def test_bad_input_is_explained(cells: list[nbformat.NotebookNode]) -> None:
    shown = text_of(cell_with(cells, "learning_rte"))
    assert "did you mean learning_rate?" in shown
    assert "resolution=500 is not a multiple of 8" in shown


def test_the_pictures_are_shown(cells: list[nbformat.NotebookNode]) -> None:
    assert picture_of(cell_with(cells, "pictures = toybox.PHOTOS")).size == (5 * SIDE, SIDE)
    assert picture_of(cell_with(cells, "contact_sheet(pictures, **settings)")).width > 5 * SHORT["resolution"]
    grid = picture_of(cell_with(cells, "before = pipeline_of"))
    assert grid.size == (5 * SIDE, 4 * SIDE)
    before, after = (grid.crop((0, SIDE * row, grid.width, SIDE * (row + 1))) for row in (1, 2))
    assert before.tobytes() != after.tobytes()
    assert picture_of(cell_with(cells, "in a meadow")).size == (3 * SIDE, SIDE)


def test_the_adapters_weight_is_a_slider(cells: list[nbformat.NotebookNode]) -> None:
    shown = text_of(cell_with(cells, "adapter_job.download"))
    assert re.findall(r"\S+\.safetensors", shown) == [
        "aws-trained-dreambooth-model.safetensors",
        "pytorch_lora_weights.safetensors",
    ]
    row = picture_of(cell_with(cells, "before.set_adapters"))
    assert row.size == (3 * SIDE, SIDE)
    none, half, whole = (row.crop((SIDE * place, 0, SIDE * (place + 1), SIDE)).tobytes() for place in range(3))
    drawn = picture_of(cell_with(cells, "before = pipeline_of"))
    assert none == drawn.crop((0, SIDE, SIDE, 2 * SIDE)).tobytes()  # the base model's own
    assert len({none, half, whole}) == 3


def test_an_endpoint_draws_and_is_deleted(cells: list[nbformat.NotebookNode]) -> None:
    cell = cell_with(cells, "job.deploy")
    assert picture_of(cell).size == (3 * SIDE, SIDE)
    said = text_of(cell)
    assert re.search(
        r"^instance: 1 x ml\.g5\.xlarge \(A10G\)\nplan: \d+ pictures at a time, [\d.]+ of [\d.]+ GB$", said, re.M
    )
    assert "cost: about $1.41 an hour" in said
    assert "warning" not in said


def test_nothing_is_noise(cells: list[nbformat.NotebookNode]) -> None:
    """No warnings and no progress bars, which would be the first thing that a reader sees."""
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]


def test_the_chinese_notebook_is_the_same_but_for_its_words() -> None:
    english, chinese = (nbformat.read(path, as_version=4) for path in (ENGLISH, CHINESE))
    assert [cell.source for cell in code_cells(english)] == [cell.source for cell in code_cells(chinese)]
    assert [cell.cell_type for cell in english.cells] == [cell.cell_type for cell in chinese.cells]
    for cell in chinese.cells:
        assert cell.cell_type == "code" or re.search("[\u4e00-\u9fff]", cell.source)


@pytest.mark.parametrize("path", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_it_is_stored_with_the_outputs_of_a_whole_run(path: Path) -> None:
    assert path.stat().st_size < 1.5e6
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert cells[0].source.startswith("ON_AWS = False")
    assert "step 200/200" in html_of(cell_with(cells, "job.wait()"))[0]
    for source in (
        "pictures = toybox.PHOTOS",
        "contact_sheet(pictures, **settings)",
        "before = pipeline_of",
        "in a meadow",
        "before.set_adapters",
        "job.deploy",
    ):
        picture_of(cell_with(cells, source))


def test_no_secret_is_in_them(cells: list[nbformat.NotebookNode], s3: EmbeddedS3) -> None:
    texts = [json.dumps(cells), *(path.read_text(encoding="utf-8") for path in (ENGLISH, CHINESE))]
    for secret in (TOKEN, s3.environment()["AWS_SECRET_ACCESS_KEY"]):
        assert not [text for text in texts if secret in text]
    assert not [text for text in texts if re.search(r"\bhf_[A-Za-z0-9]{20,}|\b(AKIA|ASIA)[A-Z0-9]{16}\b", text)]
