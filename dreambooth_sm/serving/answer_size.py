"""How large an answer can get, before it is drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dreambooth_sm.errors import UserError

# Bytes of a pixel of noise, which no picture exceeds: PNG can't make it smaller, and the others were measured on noise
# at the quality that they are written with (tests/unit/test_serving_requests.py).
_BYTES = {"png": 3.02, "jpeg": 1.35, "webp": 1.35}
_HEADER = 1000
# In an array of numbers: brackets, commas, and three digits a number.
_DIGITS = 14
_BESIDE = 700


def check_size(manner: str, form: str, size: tuple[int, int], prompts: Sequence[str], most: int) -> None:
    """Checks that an answer will not be larger than it may be.

    Args:
        manner, form: of the answer, see :class:`~dreambooth_sm.serving.requests.PictureRequest`.
        size: of a picture, in pixels.
        prompts: of each picture; they are part of the answer.
        most: bytes.

    Raises:
        UserError: where it may be; it says what fits.
    """
    each = picture_bytes(manner, form, size)
    beside = sum(_BESIDE + len(json.dumps(prompt)) for prompt in prompts)
    if each * len(prompts) + beside <= most:
        return
    fits = max(0, int((most - beside) // each))
    other = ", or accept application/json;jpeg" if manner == "arrays" else ", or set format to jpeg or webp"
    raise UserError(
        f"{len(prompts)} pictures of {size[0]} x {size[1]} pixels in this form may be "
        f"{each * len(prompts) + beside:,} bytes, and an answer may be {most:,}; ask for {fits or 'smaller ones'}"
        f"{other if form == 'png' else ''}, or let them go to S3 (output)"
    )


def picture_bytes(manner: str, form: str, size: tuple[int, int]) -> int:
    """The most bytes that a picture takes in an answer."""
    pixels = size[0] * size[1]
    if manner == "arrays":
        return pixels * _DIGITS + 3 * size[1]
    encoded = int(pixels * _BYTES[form]) + _HEADER + 30 * size[1]
    return encoded if manner == "picture" else (encoded + 2) // 3 * 4
