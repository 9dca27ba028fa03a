"""Requests to an endpoint: what is read of them, and what is refused before anything is drawn."""

from __future__ import annotations

import io
import json
import string
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreambooth_sm.errors import UserError
from dreambooth_sm.s3_uri import S3Uri
from dreambooth_sm.serving.answer_size import picture_bytes
from dreambooth_sm.serving.answers import answer
from dreambooth_sm.serving.offer import Offer
from dreambooth_sm.serving.output_places import OutputPlaces
from dreambooth_sm.serving.refusal import Refusal
from dreambooth_sm.serving.requests import PictureRequest, read_request
from dreambooth_sm.serving.settings import LARGEST_BODY, ServingSettings


def found_prompt(name: str) -> str:
    """Of an adapter."""
    if name not in ("duck", "dumb"):
        raise Refusal("not known", 404)
    return {"duck": "photo of a duck"}.get(name, "")


OFFER = Offer(
    steps=25,
    guidance=7.5,
    size=(512, 512),
    multiple=8,
    schedulers=("default", "euler", "euler_a", "ddim"),
    subjects={"zwx": "photo of zwx toy"},
    find_prompt=found_prompt,
)


def read(values: object, **headers: Any) -> PictureRequest:
    return read_request(json.dumps(values).encode(), OFFER, **headers)


def refused(values: object, **headers: Any) -> list[str]:
    with pytest.raises(Refusal) as caught:
        read(values, **headers)
    assert caught.value.status == 400
    return caught.value.problems


def test_what_is_not_said_is_the_models() -> None:
    request = read({"prompt": "photo of zwx toy"})
    assert (request.prompts, request.negative_prompt) == (("photo of zwx toy",), "")
    assert (request.steps, request.guidance, request.size) == (25, 7.5, (512, 512))
    assert (request.scheduler, request.format, request.manner) == ("default", "png", "ours")
    assert len(request.seeds) == 1
    assert read({"prompt": "a"}).seeds != request.seeds


def test_each_prompt_gets_its_number_of_pictures_and_each_picture_a_seed() -> None:
    request = read({"prompts": ["one", "two"], "number": 2, "seed": 7, "width": 64, "height": 128})
    assert request.prompts == ("one", "one", "two", "two")
    assert request.seeds == (7, 8, 9, 10)
    assert request.size == (64, 128)
    assert read({"prompt": "one", "number": 2, "seeds": [5, 3], "format": "jpg"}).seeds == (5, 3)


def test_a_subject_stands_for_the_prompt_that_it_was_taught_with() -> None:
    alone = read({"subject": "zwx"})
    assert (alone.prompts, alone.adapters) == (("photo of zwx toy",), {})
    assert read({"subject": "duck"}).adapters == {"duck": 1.0}
    assert read({"subject": "zwx", "prompt": "{subject} on the beach"}).prompts == ("photo of zwx toy on the beach",)
    assert read({"subject": "duck", "adapters": {"duck": 0.5, "style": 1}}).adapters == {"duck": 0.5, "style": 1.0}
    assert read({"prompt": "a"}, adapter="duck").adapters == {"duck": 1.0}
    for unknown in ("other", "dumb", "../x"):
        assert refused({"subject": unknown}) == [f"subject: {unknown!r} is not known; the model knows zwx"]
    (problem,) = refused({"prompt": "{subject}"})
    assert "set subject" in problem


def test_all_problems_are_told_at_once() -> None:
    values = {
        "prompt": 3,
        "number": 0,
        "steps": 10**9,
        "guidance": "high",
        "width": 100,
        "seed": -1,
        "seeds": [1, 2, 3],
        "scheduler": "magic",
        "format": "gif",
        "adapters": {"../x": 1},
        "output": "http://bucket",
        "promptt": "x",
    }
    problems = refused(values)
    for name in ("prompt", "number", "steps", "guidance", "width", "seed", "seeds", "scheduler", "format", "adapters"):
        assert [line for line in problems if line.startswith(f"{name}: ")], (name, problems)
    assert [line for line in problems if line.startswith("'promptt': unknown field")]
    assert [line for line in problems if "http://bucket" in line]
    assert all("\n" not in line for line in problems)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[1]", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b"\xff", {}, 400),
        (b'{"prompt": "\\ud800"}', {}, 400),
        (b'{"prompt": "a", "guidance": NaN}', {}, 400),
        (b'{"prompt": "a", "seed": 1e999}', {}, 400),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", {}, 400),
        (b"<x/>", {"content_type": "text/xml"}, 415),
        (b'{"prompt": "a"}', {"accept": "audio/ogg"}, 406),
        (b'{"prompt": "a", "number": 2}', {"accept": "image/png"}, 400),
        (b'{"prompt": "a", "format": "webp"}', {"accept": "image/png"}, 400),
    ],
)
def test_bodies_and_headers_that_can_not_be_read(body: bytes, headers: dict[str, str], status: int) -> None:
    with pytest.raises(Refusal) as caught:
        read_request(body, OFFER, **headers)
    assert caught.value.status == status


def test_jumpstarts_requests() -> None:
    """As the notebook of JumpStart's Stable Diffusion endpoints sends them."""
    values = {
        "prompt": "astronaut on a horse",
        "negative_prompt": "blurry",
        "width": 256,
        "height": 256,
        "num_images_per_prompt": 2,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "seed": 1,
    }
    arrays = read(values, accept="application/json")
    assert (arrays.manner, arrays.steps, len(arrays.prompts), arrays.seeds) == ("arrays", 50, 2, (1, 2))
    encoded = read(values, accept="application/json;jpeg")
    assert (encoded.manner, encoded.format) == ("encoded", "jpeg")
    text = read_request(b"a cottage", OFFER, content_type="application/x-text", accept="application/json;jpeg")
    assert (text.prompts, text.manner, text.single) == (("a cottage",), "encoded", True)
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    content = json.loads(answer(arrays, [picture, picture], OutputPlaces())[0])
    assert content == {"generated_images": [[[[1, 2, 3]] * 3] * 2] * 2, "prompt": "astronaut on a horse"}
    assert list(json.loads(answer(text, [picture], OutputPlaces())[0])) == ["generated_image", "prompt"]


def test_the_quick_kits_requests() -> None:
    values = {
        "prompt": "a photo of an astronaut riding a horse on mars",
        "negative_prompt": "",
        "steps": 20,
        "sampler": "eular",
        "count": 2,
        "seed": 9,
        "output_s3uri": "s3://bucket/prefix/",
    }
    request = read(values)
    assert (request.manner, request.scheduler, request.format) == ("locations", "euler", "jpeg")
    assert (request.steps, request.seeds, request.output) == (20, (9, 10), S3Uri("bucket", "prefix"))
    assert read({**values, "sampler": None}).scheduler == "default"
    assert [line[:11] for line in refused({**values, "input_image": "https://x/y.png"})] == ["'input_imag"]
    (problem,) = refused({"prompt": "a", "sampler": "ddim"})
    assert problem.startswith("output_s3uri: it is missing")


def test_an_answer_that_may_not_fit_is_refused_with_what_fits() -> None:
    two = {"prompt": "a", "num_images_per_prompt": 2, "width": 512, "height": 512}
    (problem,) = refused(two)
    assert "ask for 1" in problem
    assert "application/json;jpeg" in problem
    read(two | {"num_images_per_prompt": 1})
    read(two, accept="application/json;jpeg")
    assert "ask for 1," in refused({"prompt": "a", "number": 2, "width": 1024, "height": 1024})[0]
    read({"prompt": "a", "number": 2, "width": 1024, "height": 1024, "format": "jpeg"})
    read({"prompt": "a", "number": 9, "width": 1024, "height": 1024, "output": "s3://bucket/x"})


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("manner", ["picture", "ours", "arrays"])
def test_no_picture_takes_more_than_was_counted(form: str, manner: str) -> None:
    """Noise of all values, and of black and white, which JPEG makes larger."""
    generator = np.random.default_rng(0)
    for side in (8, 64, 256):
        noise = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        for pixels in (noise, (noise > 127).astype(np.uint8) * 255, np.full_like(noise, 255)):
            names = {"prompt": "a", "seed": 0, "width": side, "height": side}
            if manner == "arrays":
                request = read({**names, "num_inference_steps": 1})
            else:
                request = read({**names, "format": form}, accept=f"image/{form}" if manner == "picture" else "")
            assert request.manner == manner
            body, _ = answer(request, [Image.fromarray(pixels)], OutputPlaces())
            assert len(body) <= picture_bytes(manner, request.format, (side, side)) + 700
            if manner == "picture":
                with Image.open(io.BytesIO(body)) as picture:
                    assert (picture.format, picture.size) == (form.upper(), (side, side))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = (
    "prompt", "prompts", "subject", "negative_prompt", "number", "steps", "guidance", "width", "height", "seed",
    "seeds", "scheduler", "adapters", "format", "output", "num_images_per_prompt", "num_inference_steps",
    "guidance_scale", "sampler", "count", "output_s3uri", "model",
)  # fmt: skip


@given(
    st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), values, max_size=8),
    st.sampled_from(["", "*/*", "image/png", "application/json;jpeg"]) | st.text(string.printable, max_size=20),
)
def test_whatever_is_asked_is_taken_or_refused(asked: dict[str, Any], accept: str) -> None:
    try:
        request = read(asked, accept=accept)
    except Refusal as refusal:
        status, pictures, seeds = refusal.status, 1, 1
    else:
        status, pictures, seeds = 400, len(request.prompts), len(request.seeds)
    assert 400 <= status < 500
    assert 1 <= pictures == seeds <= OFFER.settings.max_pictures


def test_settings_come_from_the_environment() -> None:
    settings = ServingSettings.of({"SERVE_BATCH": "4", "SERVE_LOG_PROMPTS": "TRUE", "PATH": "x"})
    assert (settings.batch, settings.log_prompts, settings.answer_bytes) == (4, True, LARGEST_BODY)
    with pytest.raises(UserError) as caught:
        ServingSettings.of(
            {"SERVE_BATCH": "0", "SERVE_QUEUES": "3", "SERVE_PRECISION": "fp8", "SERVE_LOG_PROMPTS": "x"}
        )
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "SERVE_BATCH",
        "SERVE_QUEUES",
        "SERVE_LOG_PROMPTS",
        "SERVE_PRECISION",
    ]
