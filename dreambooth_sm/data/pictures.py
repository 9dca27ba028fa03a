"""Picture files: which files of a folder are pictures, reading them, and the views the model trains on."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from dreambooth_sm.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})


@dataclass(frozen=True)
class View:
    """What of a picture one training sample sees.

    Attributes:
        left, top: where the square crop lies on the free axis, from 0 to 1; 0.5 is the centre.
        mirrored: flipped from left to right.
    """

    left: float = 0.5
    top: float = 0.5
    mirrored: bool = False


def list_pictures(directory: Path) -> list[Path]:
    """The picture files below a directory, sorted; hidden files and folders are left out, whatever they hold."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [
            Path(folder, name) for name in names if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return sorted(found)


def open_picture(path: Path) -> Image.Image:
    """Reads one picture: upright (EXIF), RGB, transparency on white.

    Raises:
        UserError: where the file is no picture, or is damaged.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise UserError(f"{path} is no file; remove it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                upright = _to_8_bits(ImageOps.exif_transpose(file), path)
                if upright.has_transparency_data:
                    layer = upright.convert("RGBA")
                    canvas = Image.new("RGBA", layer.size, "white")
                    return Image.alpha_composite(canvas, layer).convert("RGB")
                return upright.convert("RGB")
    except UnidentifiedImageError:
        raise UserError(f"{path} is no picture, whatever its name says; remove or replace it") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down") from None
    except UserError:
        raise
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise UserError(f"{path} is damaged and can't be read ({error}); replace it") from None


def is_square(path: Path) -> bool:
    """Whether a picture, known to be readable, is as wide as it is high; reads its header alone."""
    with Image.open(path) as file:
        return file.width == file.height


def _to_8_bits(picture: Image.Image, path: Path) -> Image.Image:
    """Scales 16-bit greyscale down; Pillow's own conversion cuts it off at 255, which leaves a white picture."""
    if picture.mode.startswith("I;16"):
        return picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if picture.mode in ("I", "F"):
        raise UserError(f"{path} has 32 bits a pixel, of a range that it does not name; save it as 8-bit JPEG or PNG")
    return picture


def check_pictures(paths: list[Path]) -> list[str]:
    """Reads every picture in full; one line for each that can't be used."""
    problems: list[str] = []
    for path in paths:
        try:
            open_picture(path)
        except UserError as error:
            problems += error.problems
    return problems


def crop(picture: Image.Image, resolution: int, view: View) -> Image.Image:
    """The square view of a picture, ``resolution`` pixels a side: the shorter side is scaled to it, the rest cut.

    Only the square itself is scaled: a strip of 1 x 60,000 pixels would take gigabytes otherwise.
    """
    side = min(picture.size)
    left, top = ((length - side) * place for length, place in zip(picture.size, (view.left, view.top), strict=True))
    box = (left, top, left + side, top + side)
    square = picture.resize((resolution, resolution), Image.Resampling.LANCZOS, box)
    return ImageOps.mirror(square) if view.mirrored else square
