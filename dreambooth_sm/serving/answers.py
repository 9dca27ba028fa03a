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
from dreambooth_sm.serving.orders import Shown, Withheld
from dreambooth_sm.serving.output_places import OutputPlaces
from dreambooth_sm.serving.refusal import Refusal
from dreambooth_sm.serving.requests import PictureFormat, PictureRequest

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


def answer(request: PictureRequest, pictures: Sequence[Image | Withheld], places: OutputPlaces) -> tuple[bytes, str]:
    """The body of an answer, and its type.

    Args:
        places: that pictures are put to, where the request names one.

    Raises:
        Refusal: where a picture is withheld, and the answer can't say so.
        UserError, TransferError: where the pictures can't go to S3.
    """
    if request.manner == "ours":
        width, height = request.size
        described = [_described(request, number, picture, places) for number, picture in enumerate(pictures)]
        content: dict[str, Any] = {"pictures": described, "format": request.format, "width": width, "height": height}
    else:
        shown = [each for each in pictures if not isinstance(each, Withheld)]
        if withheld := [each.label for each in pictures if isinstance(each, Withheld)]:
            raise Refusal(
                f"{len(withheld)} of {len(pictures)} pictures are withheld by the endpoint's safety check "
                f"({', '.join(sorted({*withheld}))}); ask with another seed or prompt",
                422,
            )
        if request.manner == "picture":
            return encode_picture(shown[0], request.format), f"image/{request.format}"
        content = _content(request, shown, places)
    return json.dumps(content, separators=(",", ":")).encode(), "application/json"


def _content(request: PictureRequest, pictures: Sequence[Image], places: OutputPlaces) -> dict[str, Any]:
    if request.output is not None:
        return {"result": [_put(places, request.output, each, request.format) for each in pictures]}
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


def answer_line(request: PictureRequest, shown: Shown, places: OutputPlaces) -> bytes:
    """A line of an answer that comes bit by bit: of a picture, or of one while it is drawn.

    Args:
        places: as of :func:`answer`.

    Raises:
        UserError, TransferError: where the picture can't go to S3.
    """
    told: dict[str, Any] = {"number": shown.number}
    if shown.step is None or isinstance(shown.picture, Withheld):
        return line_of({**told, **_described(request, shown.number, shown.picture, places), "format": request.format})
    preview = _base64(encode_picture(shown.picture, "jpeg"))
    return line_of({**told, "step": shown.step, "steps": shown.steps, "picture": preview, "format": "jpeg"})


def line_of(told: Mapping[str, Any]) -> bytes:
    """A line of JSON."""
    return json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def _described(request: PictureRequest, number: int, picture: Image | Withheld, places: OutputPlaces) -> dict[str, Any]:
    """What an answer says of a picture, and where it is."""
    told: dict[str, Any] = {"prompt": request.prompts[number], "seed": request.seeds[number]}
    if isinstance(picture, Withheld):
        return {"withheld": picture.label, "certainty": round(picture.certainty, 3), **told}
    if request.output is not None:
        return {"location": _put(places, request.output, picture, request.format), **told}
    return {"picture": _base64(encode_picture(picture, request.format)), **told}


def _put(places: OutputPlaces, prefix: S3Uri, picture: Image, form: PictureFormat) -> str:
    name = f"{uuid.uuid4()}.{'jpg' if form == 'jpeg' else form}"
    return str(places.put(prefix, name, encode_picture(picture, form)))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _numbers(picture: Image) -> list[Any]:
    """Rows of pixels of red, green and blue."""
    import numpy as np

    rows: list[Any] = np.asarray(picture.convert("RGB")).tolist()
    return rows
