"""``dreambooth-sm demo``: the main job end to end, as a person runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from launcher import demo, tool
from tests.helpers.patience import PATIENCE

ROOT = Path(__file__).parents[2]
# The demo as a person runs it, with 80 of its 200 training steps, which teach the subject as well, and half of its
# class images. Its job measures pictures of ten steps; the grid's, which nobody measures, have five.
SHORT = """
import sys
from functools import partial
from pathlib import Path
from launcher import demo, tool
from launcher.local import run
from tests.helpers.drawing import FEW_STEPS, draw_otherwise

run.embedded_services = partial(run.embedded_services, entrypoint=Path("tests/helpers/quick_job.py").resolve())
demo.TRAINING_STEPS = 80
demo.SETTINGS["num_class_images"] = 16
draw_otherwise(setattr, **FEW_STEPS)
sys.exit(tool.main(sys.argv[1:]))
"""


def test_the_demo_shows_what_it_promises(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHORT, "demo", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"model     {demo.MODEL}" in run.stdout
    for file in ("model_index.json", "unet/diffusion_pytorch_model.safetensors", "manifest.json"):
        assert re.search(rf"[\d,]+ bytes  {file}$", run.stdout, flags=re.MULTILINE), file
    first, last = map(float, re.findall(r"loss\s+(\S+) at step 1, (\S+) at step", run.stdout)[0])
    assert last < first
    for phase in ("check", "load_base", "class_images", "encode", "train", "save", "upload"):
        assert re.search(rf"\b{phase} \d", run.stdout), phase
    figures = read_figures(run.stdout)
    subject, diversity, prior = figures["subject"], figures["diversity"], figures["prior"]
    assert subject[1] > subject[0] + 0.6
    assert diversity[1] >= 0.85 * diversity[0]
    assert prior[1] < prior[0] + 0.25
    assert figures["prompt"][1] >= 0.75
    assert "verdict: good" in run.stdout
    (report,) = re.findall(r"^report +(\S+)/report\.html", run.stdout, re.MULTILINE)
    titles = re.findall("<h3>(.+?)</h3>", Path(report, "report.html").read_text())
    places = [f"Prompt: {demo.INSTANCE_PROMPT}{place}" for place in ("", " on the beach")]
    assert titles[:4] == [f"The subject: {demo.INSTANCE_PROMPT}", *places, f"Class prompt: {demo.CLASS_PROMPT}"]
    assert (Path(report) / "subject.jpg").is_file()
    with Image.open(tmp_path / "before-after.png") as grid:
        assert grid.size == (5 * 128, 4 * 128)
        before, after = (grid.crop((0, 128 * row, grid.width, 128 * (row + 1))) for row in (1, 2))
        assert before.tobytes() != after.tobytes()


# Of the model that matches flows, which learns sooner and takes longer for a step.
SHORT_FLOW = (
    SHORT.replace("= 80", "= 32")
    .replace("= 16", "= 4\ndemo.SETTINGS['num_validation_images'] = 1")
    .replace("quick_job", "quicker_job")
)


@pytest.mark.slow
def test_the_demo_of_flow_matching_learns_beside_a_model_that_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHORT_FLOW, "demo", "--base-model", "toybox-flow", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"[\d,]+ bytes  pytorch_lora_weights.safetensors$", run.stdout, flags=re.MULTILINE)
    figures = read_figures(run.stdout)
    assert figures["subject"][1] > figures["subject"][0] + 0.5
    assert figures["diversity"][1] >= 0.85 * figures["diversity"][0]
    assert figures["prompt"][1] >= 0.75
    with Image.open(tmp_path / "before-after.png") as grid:
        before, after = (grid.crop((0, 128 * row, grid.width, 128 * (row + 1))) for row in (1, 2))
        assert before.tobytes() != after.tobytes()


def read_figures(text: str) -> dict[str, tuple[float, float]]:
    """Measures by their names, before and after."""
    rows = re.findall(r"^(\w+) +(-?[\d.]+) before, (-?[\d.]+) after", text, re.MULTILINE)
    return {name: (float(before), float(after)) for name, before, after in rows}


def test_a_failed_demo_is_one_line_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "TRAINING_STEPS", 2)
    monkeypatch.setattr(demo, "CLASS_PROMPT", "zwx " * 200)  # longer than the text encoder takes
    assert tool.main(["demo", "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "error: the demo failed" in error
    assert "max_token_length" in error
    assert "Traceback" not in error
