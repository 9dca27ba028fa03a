"""Whole jobs that learn a word: what they leave, and what can be drawn with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
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
def test_a_job_leaves_a_word_that_its_model_card_draws_with(
    tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {"validation_prompt": PROMPT, "validation_steps": "1", "validation_guidance_scale": "1"}
    trained = {"learning_rate": "1e-2", "num_vectors": "2", "use_ema": "true", "with_prior_preservation": "true"}
    values = {**VALUES, **shown, **trained}
    job = JobTree.lay_out(tmp_path / "opt-ml", values, {"images": pictures, "model": tiny_base}, {})
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert [step["step"] for step in ended.steps] == ["1", "2"]
    found = {path.relative_to(job.model).as_posix() for path in job.model.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith("samples/")} == {"zwx.safetensors", *REPORT_FILES}
    drawn = [
        {np.asarray(Image.open(path)).tobytes() for path in job.model.glob(f"samples/step-*-prompt-{number}-*.png")}
        for number in range(2)
    ]
    # The word's picture is another one after each step, and the class' is not.
    assert [len(pictures) for pictures in drawn] == [3, 1]

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
    exec(block.replace("'the-base-model'", repr(str(tiny_base))).replace(").images[0]", small), namespace)
    assert isinstance(namespace["picture"], Image.Image)


def test_the_launcher_asks_for_the_word_before_anything_starts() -> None:
    with pytest.raises(UserError, match="placeholder_token: which word of 'photo of zwx toy' is to be learned"):
        launcher.estimate(
            instance_type="ml.g4dn.xlarge", instance_prompt="photo of zwx toy", method="textual_inversion"
        )
    prompts = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
    estimate = launcher.estimate(instance_type="ml.g4dn.xlarge", method="textual_inversion", **prompts)
    assert any(line.startswith("plan: roomy: embedding, fp16") for line in estimate.lines())
