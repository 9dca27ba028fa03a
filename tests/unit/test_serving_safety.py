"""Pictures that a classifier of the user's own withholds."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dreambooth_sm.errors import UserError
from dreambooth_sm.serving.answers import answer, answer_line
from dreambooth_sm.serving.orders import Shown
from dreambooth_sm.serving.output_places import OutputPlaces
from dreambooth_sm.serving.refusal import Refusal
from dreambooth_sm.serving.requests import LINES, read_request
from dreambooth_sm.serving.safety import SafetyCheck
from launcher.endpoints.endpoint import Endpoint
from tests.helpers.serving import engine_of, pictures

DARK, BRIGHT = Image.new("RGB", (40, 30), (10, 10, 10)), Image.new("L", (30, 40), 250)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer to which bright pictures are "nsfw": the first row gets the mean of the pixels from the one
    patch, by attention, and the answer is read off it."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {"image_size": 8, "patch_size": 8, "hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = ViTConfig(**sizes, intermediate_size=2, id2label={0: "normal", 1: "nsfw"})
    model = ViTForImageClassification(config)
    for name, weight in model.named_parameters():
        if "layernorm" in name and name.endswith("weight"):
            torch.nn.init.ones_(weight)
        elif "attention" in name and weight.dim() == 2:
            torch.nn.init.eye_(weight)
        else:
            torch.nn.init.zeros_(weight)
    with torch.no_grad():
        model.vit.embeddings.patch_embeddings.projection.weight[0] = 1
        model.classifier.weight[1] = torch.tensor([2.0, -2.0])
    directory = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(directory)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(directory)
    return directory


def test_a_picture_counts_as_what_it_is_for_sure(classifier: Path) -> None:
    check = SafetyCheck(classifier, ("nsfw",), 90, CPU)
    assert check(DARK) is None
    withheld = check(BRIGHT)
    assert withheld
    assert (withheld.label, round(withheld.certainty)) == ("nsfw", 1)
    either = SafetyCheck(classifier, ("nsfw", "normal"), 90, CPU)(DARK)
    assert either
    assert either.label == "normal"


def test_every_answer_says_what_is_withheld(classifier: Path, tiny_base: Path) -> None:
    wishes = {"prompt": "a toy", "width": 32, "height": 32, "steps": 2, "seed": 5}
    checked = {"safety_model": str(classifier), "safety_labels": "nsfw, normal", "safety_percent": 1}
    with engine_of(tiny_base, **checked) as engine:
        seen: list[Shown] = []

        def drawn(accept: str, **more: Any) -> tuple[Any, Any]:
            asked = read_request(json.dumps({**wishes, **more}).encode(), engine.offer, accept=accept)
            return asked, pictures(engine.submit(asked, seen.append))

        body, _ = answer(*drawn("application/json", number=2), OutputPlaces())
        told = json.loads(body)["pictures"]
        assert [(each["seed"], "picture" in each) for each in told] == [(5, False), (6, False)]
        assert {each["withheld"] for each in told} <= {"nsfw", "normal"}
        seen.clear()
        asked, _ = drawn(LINES, previews=1)
        (line,) = (json.loads(answer_line(asked, shown, OutputPlaces())) for shown in seen)
        assert ("withheld" in line, "picture" in line) == (True, False)
        others: dict[str, Any] = {"application/json;jpeg": {"steps": None, "num_inference_steps": 1}, "image/png": {}}
        for accept, more in others.items():
            with pytest.raises(Refusal, match="1 of 1 pictures are withheld by the endpoint's safety check") as caught:
                answer(*drawn(accept, **more), OutputPlaces())
            assert caught.value.status == 422
    with engine_of(tiny_base, **checked | {"safety_labels": "nsfw", "safety_percent": 100}) as engine:
        body, _ = answer(*drawn("application/json"), OutputPlaces())
        assert base64.b64decode(json.loads(body)["pictures"][0]["picture"])


def test_the_launcher_says_so_too() -> None:
    class Answered(Endpoint):
        def invoke(self, request: Any) -> dict[str, Any]:
            return {"pictures": [{"withheld": "nsfw"}]}

        def invoke_lines(self, request: Any) -> Any:
            yield {"number": 0, "withheld": "nsfw"}

        wait = update = delete = None  # type: ignore[assignment]

    endpoint = Answered()  # type: ignore[abstract]
    for ask in (endpoint.draw, lambda prompt: list(endpoint.stream(prompt))):
        with pytest.raises(UserError, match=r"withholds a picture \(nsfw\)"):
            ask("a toy")


def test_a_check_that_can_not_be_made_ends_the_start(classifier: Path, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="SERVE_SAFETY_LABELS: 'rude': the model knows normal, nsfw"):
        SafetyCheck(classifier, ("nsfw", "rude"), 50, CPU)
    with pytest.raises(UserError, match=r"SERVE_SAFETY_MODEL: .* can't be read"):
        SafetyCheck(tmp_path, ("nsfw",), 50, CPU)
    with (
        pytest.raises(UserError, match="SERVE_SAFETY_LABELS: it names none"),
        engine_of(tiny_base, safety_model=str(classifier), safety_labels=" ,"),
    ):
        pass
