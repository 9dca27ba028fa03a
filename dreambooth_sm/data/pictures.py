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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                upright = ImageOps.exif_transpose(file)
                if upright.has_transparency_data:
                    layer = upright.convert("RGBA")
                    canvas = Image.new("RGBA", layer.size, "white")
                    return Image.alpha_composite(canvas, layer).convert("RGB")
                return upright.convert("RGB")
    except UnidentifiedImageError:
        raise UserError(f"{path} is no picture, whatever its name says; remove or replace it") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is damaged and can't be read ({error}); replace it") from None


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
    """The square view of a picture, ``resolution`` pixels a side: the shorter side is scaled to it, the rest cut."""
    scale = resolution / min(picture.size)
    width, height = (max(resolution, round(side * scale)) for side in picture.size)
    scaled = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = round((width - resolution) * view.left), round((height - resolution) * view.top)
    square = scaled.crop((left, top, left + resolution, top + resolution))
    return ImageOps.mirror(square) if view.mirrored else square
