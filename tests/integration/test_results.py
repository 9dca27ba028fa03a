"""What a job leaves beside its model: samples, report.json, a model card, and a page that a browser shows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_OK
from dreambooth_sm.models import load_base
from tests.helpers.jobs import JobTree
from tests.helpers.patience import PATIENCE
from tests.helpers.training import hyperparameters, same, weights

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PROMPT = "photo of zwx toy"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, pictures: Path) -> Path:
    """The model directory of a job with everything on; not to be written to."""
    values = {
        "validation_prompt": f"{PROMPT}|<b>a cat</b>",
        "validation_steps": "1",
        "export": "both",
        "export_precision": "fp32",
        "model_name": "zwx & co",
        "use_ema": "false",
    }
    channels = {"images": pictures, "model": tiny_base}
    tree = JobTree.lay_out(tmp_path_factory.mktemp("job") / "opt-ml", values, channels, {})
    ended = tree.run()
    assert ended.code == EXIT_OK, ended.log
    return tree.model


def test_facts(model: Path) -> None:
    facts = json.loads((model / "report.json").read_text())
    assert facts["subjects"] == [
        {"instance_prompt": PROMPT, "class_prompt": "photo of toy", "pictures": 2, "class_pictures": 2}
    ]
    assert [row["step"] for row in facts["steps"]] == [1, 2]
    assert {"load_base", "class_images", "encode", "train"} <= facts["phases_seconds"].keys()
    assert facts["hyperparameters"]["resolution"] == 64
    assert not [name for name in facts["hyperparameters"] if name.startswith("hypernetwork")]  # another method's
    assert facts["peak_host_memory_gb"] > 0.1
    drawn = [(sample["step"], sample["prompt"]) for sample in facts["samples"]]
    assert drawn == [(step, prompt) for step in (0, 1, 2) for prompt in (PROMPT, "<b>a cat</b>", "photo of toy")]
    for sample in facts["samples"]:
        with Image.open(model / sample["file"]) as picture:
            assert picture.size == (64, 64)
            assert picture.text["prompt"] == sample["prompt"]  # type: ignore[attr-defined]


def test_the_directory_and_the_file_are_the_same_model(model: Path) -> None:
    directory = load_base(hyperparameters(pretrained_model_name_or_path=str(model)))
    single = load_base(hyperparameters(pretrained_model_name_or_path=str(model / "zwx & co.safetensors")))
    for part in ("unet", "vae", "text_encoder"):
        assert same(weights(getattr(directory, part)), weights(getattr(single, part)))


def test_the_model_card(model: Path) -> None:
    card = (model / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["instance_prompt"] == PROMPT
    assert "# zwx \\& co" in text
    assert "\\<b\\>a cat" in text
    links = re.findall(r"\]\((.+?)\)", text)
    assert [re.sub(r"-[0-9a-f]{8}\.png", "", link) for link in links[:3]] == [
        "subject.jpg",
        "samples/step-000000-prompt-0-seed-2000",
        "samples/step-000002-prompt-0-seed-2000",
    ]
    assert text.index(links[0]) < text.index("before") < text.index("<details>")
    assert links[-1] == "loss.svg"
    assert all((model / link).is_file() for link in links)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_the_page_in_a_browser(model: Path, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    page_alone = Path(shutil.copy(model / "report.html", tmp_path))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE * 1000)
        page = browser.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        said: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_alone.as_uri())
        assert page.title() == "zwx & co"
        headings = page.locator("h2").all_inner_texts()
        assert headings == ["Pictures", "Loss and learning rate"]
        folded = page.locator("details")
        assert folded.locator("summary").all_inner_texts() == [
            "Summary",
            "Phases",
            "Data",
            "Plan",
            "Hyperparameters",
            "Versions",
        ]
        assert not folded.locator("table").first.is_visible()
        folded.locator("summary").first.click()
        assert folded.locator("table").first.is_visible()
        assert page.locator("h3").all_inner_texts() == [
            f"The subject: {PROMPT}",
            f"Prompt: {PROMPT}",
            "Prompt: <b>a cat</b>",
            "Class prompt: photo of toy",
            "Class pictures that it was trained with",
        ]
        assert page.locator("figcaption").all_inner_texts()[:3] == [
            f"{when}, seed 2000" for when in ("before", "after step 1", "after step 2")
        ]
        widths = page.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
        assert widths == [2 * 192 + 4] + [64] * 9 + [64] * 2
        first = page.locator("img").first.bounding_box()
        assert first is not None
        assert first["y"] < 200
        curve = page.locator("svg polyline").first.bounding_box()
        assert curve is not None
        assert curve["width"] > 300
        browser.close()
    assert said == []
    assert [url for url in requests if not url.startswith(("data:", page_alone.as_uri()))] == []


def test_weights_that_the_export_can_not_hold(lay_out_job: Callable[..., JobTree]) -> None:
    tree = lay_out_job(learning_rate="1e5", max_train_steps="1", use_ema="false")
    ended = tree.run()
    assert ended.code == EXIT_BAD_INPUT, ended.log
    assert tree.failure is not None
    assert "export_precision=fp16 can't hold the trained model" in tree.failure
    assert "lower learning_rate" in tree.failure
    kept = weights(load_base(hyperparameters(pretrained_model_name_or_path=str(tree.model))).unet)
    assert all(value.isfinite().all() for value in kept.values())
    assert max(value.abs().max() for value in kept.values()) > torch.finfo(torch.float16).max
