"""Whole jobs that learn a word: what they leave, and what can be drawn with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import launcher
from dreambooth_sm.errors import EXIT_OK, UserError
from dreambooth_sm.results import REPORT_FILES
from tests.helpers.jobs import JobTree
from tests.helpers.readme_blocks import python_blocks

PROMPT = "photo of ZWX toy"
VALUES = {"method": "textual_inversion", "instance_prompt": PROMPT, "class_prompt": "photo of a toy"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_job_leaves_a_word_that_its_model_card_draws_with(
    family: str, request: pytest.FixtureRequest, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = request.getfixturevalue({"sd": "tiny_base", "sdxl": "tiny_xl_base"}[family])
    shown = {"validation_prompt": f"{PROMPT} | a zwx toy", "validation_steps": "1", "with_prior_preservation": "true"}
    values = {**VALUES, **shown, "learning_rate": "1e-2", "num_vectors": "2", "use_ema": "true"}
    job = JobTree.lay_out(tmp_path / "opt-ml", values, {"images": pictures, "model": base}, {})
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert [step["step"] for step in ended.steps] == ["1", "2"]
    found = {path.relative_to(job.model).as_posix() for path in job.model.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith("samples/")} == {"zwx.safetensors", *REPORT_FILES}
    for step in (0, 1, 2):  # with each prompt, and the class'
        assert sum(name.startswith(f"samples/step-{step:06}") for name in found) == 3

    facts = json.loads((job.model / "report.json").read_text())
    assert facts["hyperparameters"]["num_vectors"] == 2
    assert facts["plan"]["train_text_encoder"] is False
    card = job.model / "README.md"
    fields = yaml.safe_load(card.read_text().split("---\n")[1])
    assert fields["base_model_relation"] == "adapter"
    assert "textual_inversion" in fields["tags"]
    (block,) = python_blocks(card)
    monkeypatch.chdir(job.model)
    namespace: dict[str, Any] = {}
    small = ", height=64, width=64, num_inference_steps=1).images[0]"
    exec(block.replace("'the-base-model'", repr(str(base))).replace(").images[0]", small), namespace)
    assert isinstance(namespace["picture"], Image.Image)


def test_the_launcher_asks_for_the_word_before_anything_starts() -> None:
    with pytest.raises(UserError, match="placeholder_token: which word of 'photo of zwx toy' is to be learned"):
        launcher.estimate(
            instance_type="ml.g4dn.xlarge", instance_prompt="photo of zwx toy", method="textual_inversion"
        )
    prompts = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
    estimate = launcher.estimate(instance_type="ml.g4dn.xlarge", method="textual_inversion", **prompts)
    assert any(line.startswith("plan: roomy: embedding, fp16") for line in estimate.lines())
