"""Picture files: reading them, and the views the model trains on. No torch.

What a file holds decides what it is, not its name.
"""

from __future__ import annotations

import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

from dreambooth_sm.data.colours import to_8_bits, to_srgb
from dreambooth_sm.errors import UserError

# The formats that are read. Pillow knows more, and starts Ghostscript for one of them.
PICTURE_FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"]
try:
    from pillow_heif import register_heif_opener
except ImportError:  # a platform that it has no wheel for
    _HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
else:
    _HEIC_BRANDS = frozenset()
    register_heif_opener()
    PICTURE_FORMATS.append("HEIF")

Shape = tuple[int, int]  # width and height, in pixels

SUFFIXES = frozenset(
    f".{kind}" for kind in ("jpg", "jpeg", "jfif", "png", "webp", "heic", "heif", "avif", "gif", "bmp", "tif", "tiff")
)
# Pixels that are decoded at most, half a gigabyte of memory. Baseline JPEGs, which are decoded at a fraction of their
# size, may have twice as many: phones make 108 and 200 million. Pillow refuses any file of more than twice its limit.
Image.MAX_IMAGE_PIXELS = 1 << 27
# Image generators write their whole workflow into PNGs: megabytes of text, of which Pillow reads one.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 27
_ORIENTATION = 0x0112  # EXIF
# What the first picture in a camera's raw file, a TIFF, says: a preview, or Adobe's DNG.
_NEW_SUBFILE_TYPE, _DNG_VERSION = 254, 50706
# Pictures are decoded at a fraction of their size where that leaves this many times the pixels a side that are needed.
_SPARE = 4


def _say_nothing(line: str) -> None:
    """Takes a warning that nobody asked for."""


@dataclass(frozen=True)
class View:
    """The part of a picture that one training row shows.

    Attributes:
        left, top: where the crop lies on the free axis, from 0 to 1; 0.5 is the centre.
        mirrored: flipped from left to right.
    """

    left: float = 0.5
    top: float = 0.5
    mirrored: bool = False


def open_picture(path: Path, needed: Shape | None = None, warn: Callable[[str], None] = _say_nothing) -> Image.Image:
    """Reads one picture: as :func:`load_picture`, in RGB, transparency on white."""
    return on_background(load_picture(path, needed, warn), "white")


def on_background(picture: Image.Image, colour: str) -> Image.Image:
    """A picture of :func:`load_picture` in RGB, before a background of one colour."""
    if picture.mode != "RGBA":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, colour), picture).convert("RGB")


def load_picture(path: Path, needed: Shape | None = None, warn: Callable[[str], None] = _say_nothing) -> Image.Image:
    """Reads one picture: upright (EXIF), in sRGB, the first frame, as RGB, or RGBA where anything is transparent.

    Args:
        needed: width and height that are enough; a picture of many times that size is read at a fraction of its own.
        warn: gets a line where a colour profile can't be used.

    Raises:
        UserError: where the file is not a picture, is damaged or too large.
    """
    with _opened(path) as file:
        if needed:
            file.draft(None, (_SPARE * max(needed), _SPARE * max(needed)))
        if file.width * file.height > _most_pixels():
            raise UserError(_too_large(path))
        ImageOps.exif_transpose(file, in_place=True)
        try:
            picture = to_8_bits(file)
        except ValueError:
            raise UserError(
                f"{path} has 32 bits a pixel, of a range that it does not name; save it as 8-bit JPEG or PNG"
            ) from None
        if needed and (fraction := min(picture.size) // (_SPARE * max(needed))) > 1:
            picture = picture.reduce(fraction)
        return to_srgb(picture, lambda line: warn(f"{path}: {line}"))


def read_size(path: Path) -> Shape:
    """Width and height of a picture when it is upright.

    Raises:
        UserError: where the file is not a picture.
    """
    status = path.stat()
    return _size_of(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1024)  # a PNG's orientation may come after its pixels, and needs all of them
def _size_of(path: Path, *version: int) -> Shape:
    with _opened(path) as file:
        # Pillow turns TIFFs by itself, size and all.
        turned = file.format != "TIFF" and file.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
        return (file.height, file.width) if turned else file.size


def has_transparency(path: Path) -> bool:
    """Whether a picture has an alpha channel or a transparent colour; reads its header alone.

    Raises:
        UserError: where the file is not a picture.
    """
    with _opened(path) as file:
        return file.has_transparency_data


def is_picture(path: Path) -> bool:
    """Whether a file holds a picture, by its header; it may be damaged after that."""
    try:
        with _opened(path):
            return True
    except UserError:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """A picture file, for a block in which whatever goes wrong is a UserError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise UserError(f"{path} is not a file; remove it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes, which have limits of their own here
            with Image.open(path, formats=PICTURE_FORMATS) as file:
                _check_header(path, file)
                yield file
    except UnidentifiedImageError:
        raise UserError(_unidentified(path)) from None
    except Image.DecompressionBombError:
        raise UserError(_too_large(path)) from None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist, or is a link to nothing; remove or replace it") from None
    except UserError:
        raise
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{path} can't be read: {error.strerror}") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged and can't be read ({reason}); replace it") from None


def _check_header(path: Path, file: ImageFile.ImageFile) -> None:
    if min(file.size) < 1:
        raise UserError(f"{path} is damaged and can't be read (it has {file.width} x {file.height} pixels); replace it")
    progressive = "progressive" in file.info  # all of it has to be in memory before any of it can be decoded
    if file.width * file.height > _most_pixels() and (file.format not in ("JPEG", "MPO") or progressive):
        raise UserError(_too_large(path))
    tags = getattr(file, "tag_v2", {}) if file.format == "TIFF" else {}
    if tags and (tags.get(_NEW_SUBFILE_TYPE, 0) == 1 or _DNG_VERSION in tags or _begins(path)[8:10] == b"CR"):
        raise UserError(f"{path} is a camera's raw file, whose preview alone could be read; develop it and save a JPEG")


def _most_pixels() -> int:
    assert Image.MAX_IMAGE_PIXELS is not None
    return Image.MAX_IMAGE_PIXELS


def _too_large(path: Path) -> str:
    return f"{path} has more than {_most_pixels():,} pixels; scale it down"


def _unidentified(path: Path) -> str:
    begin = _begins(path)
    if begin[4:8] == b"ftyp" and begin[8:12] in _HEIC_BRANDS:
        return f"{path} is HEIC, which needs the package pillow-heif; install it, or save it as JPEG or PNG"
    return (
        f"{path} is not a picture, whatever its name says; remove or replace it "
        f"(what is read: {', '.join(PICTURE_FORMATS[:-1])} and {PICTURE_FORMATS[-1]})"
    )


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def problems_of(path: Path, needed: Shape | None = None) -> list[str]:
    """Reads a picture to its end; why it can't be used, nothing where it can."""
    try:
        open_picture(path, needed)
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
