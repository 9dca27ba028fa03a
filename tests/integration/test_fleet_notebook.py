"""The notebook of fleets and tuning, run as a user runs it, and as it is stored."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers.patience import PATIENCE
from tests.integration.test_notebook import NOTEBOOKS, QUICKLY, cell_with, code_cells, html_of, picture_of, text_of

NOTEBOOK = NOTEBOOKS / "fleets_and_tuning.ipynb"


@pytest.mark.slow
def test_a_fleet_is_trained_and_a_search_finds_values(tiny_base: Path, tmp_path: Path) -> None:
    short = {"max_train_steps": 1, "resolution": 64, "num_validation_images": 1, "trials": 1}
    short |= {"base_model": str(tiny_base), "fidelity_encoders": "judge"}
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(QUICKLY))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("NOTEBOOK_SETTINGS", json.dumps(short))
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        client = NotebookClient(notebook, timeout=int(PATIENCE), startup_timeout=int(PATIENCE), kernel_name="python3")
        client.execute(cwd=str(tmp_path))
    cells = code_cells(notebook)[1:]
    assert "broken: /toys/broken/1.jpg is not a picture" in text_of(cell_with(cells, "check_many"))
    done = text_of(cell_with(cells, "print(status.line())"))
    assert done.startswith("3 done, 0 failed")
    assert all(f"/fleets/toys/models/{name}" in done for name in ("blue", "duck", "green"))
    assert text_of(cell_with(cells, "status.done")).split() == ["blue", "duck", "green"]
    assert text_of(cell_with(cells, "ranked()")).startswith("trial 1: subject ")
    assert picture_of(cell_with(cells, "tuning.samples()")).width > 64
    assert text_of(cell_with(cells, "best_job")).startswith("train with {'learning_rate': ")
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]


def test_it_is_stored_with_the_outputs_of_a_whole_run() -> None:
    assert NOTEBOOK.stat().st_size < 1.5e6
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for source in ("Pictures(Image.open", "tuning.samples()"):
        picture_of(cell_with(cells, source))
    shown = cell_with(cells, "fleet.samples(subject)")
    assert sum("image/png" in output.get("data", {}) for output in shown.outputs) == 3
    assert len(html_of(cell_with(cells, "fleet.wait()"))) == len(html_of(cell_with(cells, "tuning.wait()"))) == 1
