"""Picture files: which files of a folder are pictures, reading them, and the views the model trains on. No torch."""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from dreambooth_sm.errors import UserError

try:
    from pillow_heif import register_heif_opener
except ImportError:  # a platform that it has no wheel for
    _HEIC_SUFFIXES = frozenset({".heic", ".heif"})
else:
    _HEIC_SUFFIXES = frozenset()
    register_heif_opener()

Shape = tuple[int, int]  # width and height, in pixels

SUFFIXES = frozenset(
    f".{kind}" for kind in ("jpg", "jpeg", "jfif", "png", "webp", "heic", "heif", "avif", "gif", "bmp", "tif", "tiff")
)
# Beside ``duck.jpg``, ``duck-mask.png`` is its mask and no picture of its own.
MASK_SUFFIX = "-mask.png"
# What archives and operating systems leave behind; hidden files and folders are left out as well.
_LITTER = frozenset({"__MACOSX", "$RECYCLE.BIN"})
_ORIENTATION = 0x0112  # EXIF
# JPEGs are decoded at a fraction of their size where that leaves this many times the pixels a side that are needed.
_SPARE = 4


@dataclass(frozen=True)
class View:
    """What of a picture one training sample sees.

    Attributes:
        left, top: where the crop lies on the free axis, from 0 to 1; 0.5 is the centre.
        mirrored: flipped from left to right.
    """

    left: float = 0.5
    top: float = 0.5
    mirrored: bool = False


def list_pictures(directory: Path) -> list[Path]:
    """The picture files below a directory, sorted; left out are hidden files and folders, litter, and masks."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in _LITTER]
        pictures = [n for n in names if not n.startswith(".") and Path(n).suffix.lower() in SUFFIXES]
        masks = {Path(name).stem + MASK_SUFFIX for name in pictures}
        found += [Path(folder, name) for name in pictures if name not in masks]
    return sorted(found)


def open_picture(path: Path, needed: Shape | None = None) -> Image.Image:
    """Reads one picture: as :func:`load_picture`, in RGB, transparency on white."""
    picture = load_picture(path, needed)
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(canvas, layer).convert("RGB")
    return picture.convert("RGB")


def load_picture(path: Path, needed: Shape | None = None) -> Image.Image:
    """Reads one picture: upright (EXIF), in sRGB where it has a colour profile, the first frame, of whatever mode.

    Args:
        needed: width and height that are enough; a JPEG of many times that size is decoded at a fraction of its own.

    Raises:
        UserError: where the file is no picture, or is damaged.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise UserError(f"{path} is no file; remove it")
    if path.suffix.lower() in _HEIC_SUFFIXES:
        raise UserError(f"{path} is HEIC, which needs the package pillow-heif; install it, or save it as JPEG or PNG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                if needed:
                    file.draft(None, (_SPARE * max(needed), _SPARE * max(needed)))
                return _to_srgb(_to_8_bits(ImageOps.exif_transpose(file), path))
    except UnidentifiedImageError:
        raise UserError(f"{path} is no picture, whatever its name says; remove or replace it") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down") from None
    except UserError:
        raise
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged and can't be read ({reason}); replace it") from None


def read_size(path: Path) -> Shape:
    """Width and height of a picture, known to be readable, when it is upright; reads its header alone."""
    with Image.open(path) as file:
        turned = file.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
        return (file.height, file.width) if turned else file.size


def has_transparency(path: Path) -> bool:
    """Whether a picture, known to be readable, has an alpha channel or a transparent colour; reads its header alone."""
    with Image.open(path) as file:
        return file.has_transparency_data


def _to_8_bits(picture: Image.Image, path: Path) -> Image.Image:
    """Scales 16-bit greyscale down; Pillow's own conversion cuts it off at 255, which leaves a white picture."""
    if picture.mode.startswith("I;16"):
        return picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if picture.mode in ("I", "F"):
        raise UserError(f"{path} has 32 bits a pixel, of a range that it does not name; save it as 8-bit JPEG or PNG")
    return picture


def _to_srgb(picture: Image.Image) -> Image.Image:
    """Converts from the picture's colour profile; one that is damaged or of another mode is ignored."""
    profile = picture.info.get("icc_profile")
    if not profile or picture.mode not in ("RGB", "RGBA", "CMYK"):
        return picture
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return picture
        colours = picture.convert("RGB") if picture.mode == "RGBA" else picture
        converted = ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return picture
    if picture.mode == "RGBA":
        converted.putalpha(picture.getchannel("A"))
    return converted


def check_pictures(paths: list[Path]) -> list[str]:
    """Reads every picture in full; one line for each that can't be used."""
    return [line for path in paths for line in problems_of(path)]


def problems_of(path: Path) -> list[str]:
    """Reads a picture in full; why it can't be used, nothing where it can."""
    try:
        open_picture(path)
    except UserError as error:
        return error.problems
    return []


def cut_off(size: Shape, shape: Shape, view: View) -> tuple[int, int]:
    """Pixels to the left of and above a view, in the picture as it is shown: scaled, and mirrored or not.

    Args:
        size: width and height of the picture itself.
    """
    scale = min(size[0] / shape[0], size[1] / shape[1])
    across, down = (length / scale - side for length, side in zip(size, shape, strict=True))
    return round(across * (1 - view.left if view.mirrored else view.left)), round(down * view.top)


def crop(
    picture: Image.Image, shape: Shape, view: View, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """The view of a picture in ``shape``: scaled until it covers the shape, the rest cut off.

    Only what is seen is scaled: a strip of 1 x 60,000 pixels would take gigabytes otherwise.
    """
    width, height = shape
    scale = min(picture.width / width, picture.height / height)
    seen = (min(width * scale, picture.width), min(height * scale, picture.height))
    left, top = (
        (length - side) * place for length, side, place in zip(picture.size, seen, (view.left, view.top), strict=True)
    )
    box = (left, top, min(left + seen[0], picture.width), min(top + seen[1], picture.height))
    part = picture.resize(shape, resample, box)
    return ImageOps.mirror(part) if view.mirrored else part
