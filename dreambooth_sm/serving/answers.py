"""Pictures as answers: in JSON, as they are, or in S3."""

from __future__ import annotations

import base64
import io
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Image

from dreambooth_sm.s3_uri import S3Uri
from dreambooth_sm.serving.orders import Shown
from dreambooth_sm.serving.requests import PictureFormat, PictureRequest
from dreambooth_sm.storage import put_object

# Twice as fast as the usual level, and a tenth larger.
_PNG = {"compress_level": 1}
_JPEG = {"quality": 92}
_WEBP = {"quality": 90}
_OPTIONS: dict[str, dict[str, Any]] = {"png": _PNG, "jpeg": _JPEG, "webp": _WEBP}


def encode_picture(picture: Image, form: PictureFormat) -> bytes:
    """A picture's file."""
    file = io.BytesIO()
    picture.save(file, form.upper(), **_OPTIONS[form])
    return file.getvalue()


def answer(request: PictureRequest, pictures: Sequence[Image]) -> tuple[bytes, str]:
    """The body of an answer, and its type.

    Raises:
        UserError, TransferError: where the pictures can't go to S3.
    """
    if request.manner == "picture":
        return encode_picture(pictures[0], request.format), f"image/{request.format}"
    return json.dumps(_content(request, pictures), separators=(",", ":")).encode(), "application/json"


def _content(request: PictureRequest, pictures: Sequence[Image]) -> dict[str, Any]:
    if request.output is not None:
        places = [_put(request.output, encode_picture(each, request.format), request.format) for each in pictures]
        if request.manner == "locations":
            return {"result": places}
        return _described(request, "location", places)
    if request.manner == "ours":
        return _described(request, "picture", [_base64(encode_picture(each, request.format)) for each in pictures])
    prompt = request.prompts[0]
    found: list[Any]
    if request.manner == "encoded":
        found = [_base64(encode_picture(each, "jpeg")) for each in pictures]
    else:
        found = [_numbers(each) for each in pictures]
    return (
        {"generated_image": found[0], "prompt": prompt}
        if request.single
        else {
            "generated_images": found,
            "prompt": prompt,
        }
    )


def answer_line(request: PictureRequest, shown: Shown) -> bytes:
    """A line of an answer that comes bit by bit: of a picture, or of one while it is drawn.

    Raises:
        UserError, TransferError: where the picture can't go to S3.
    """
    told: dict[str, Any] = {"number": shown.number}
    if shown.step is None:
        content, form = encode_picture(shown.picture, request.format), request.format
        told |= {"prompt": request.prompts[shown.number], "seed": request.seeds[shown.number]}
        if request.output is not None:
            told["location"] = _put(request.output, content, form)
        else:
            told["picture"] = _base64(content)
    else:
        content, form = encode_picture(shown.picture, "jpeg"), "jpeg"
        told |= {"step": shown.step, "steps": shown.steps, "picture": _base64(content)}
    return line_of({**told, "format": form})


def line_of(told: Mapping[str, Any]) -> bytes:
    """A line of JSON."""
    return json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def _described(request: PictureRequest, name: str, values: Sequence[str]) -> dict[str, Any]:
    width, height = request.size
    told = zip(values, request.prompts, request.seeds, strict=True)
    pictures = [{name: value, "prompt": prompt, "seed": seed} for value, prompt, seed in told]
    return {"pictures": pictures, "format": request.format, "width": width, "height": height}


def _put(prefix: S3Uri, content: bytes, form: PictureFormat) -> str:
    place = prefix / f"{uuid.uuid4()}.{'jpg' if form == 'jpeg' else form}"
    put_object(place, content)
    return str(place)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _numbers(picture: Image) -> list[Any]:
    """Rows of pixels of red, green and blue."""
    import numpy as np

    rows: list[Any] = np.asarray(picture.convert("RGB")).tolist()
    return rows
