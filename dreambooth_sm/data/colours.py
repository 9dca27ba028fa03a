"""Pictures of any mode, colour space and profile as 8-bit sRGB. No torch."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image, ImageChops, ImageCms

# Colour spaces of ICC profiles, and the modes whose pictures they describe.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
# A PNG's gamma that every program takes for sRGB, and how far from it others may be.
_USUAL_GAMMA, _SLACK = 1 / 2.2, 0.05


def to_8_bits(picture: Image.Image) -> Image.Image:
    """The picture as L, LA, RGB, RGBA, CMYK or LAB, whatever its mode; an alpha channel stands for all transparency.

    Raises:
        ValueError: 32 bits a pixel, of a range that nothing names.
    """
    if picture.mode.startswith("I;16"):
        return _from_16_bits(picture)
    if picture.mode in ("I", "F"):
        raise ValueError(f"mode {picture.mode} names no range of its values")
    if picture.has_transparency_data:
        mode = "LA" if picture.mode in ("1", "L", "LA") else "RGBA"
    else:
        mode = {"1": "L", "L": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(picture.mode, "RGB")
    return picture if picture.mode == mode else picture.convert(mode)


def to_srgb(picture: Image.Image, warn: Callable[[str], None]) -> Image.Image:
    """A picture of :func:`to_8_bits` as RGB, or RGBA where it has an alpha channel, in sRGB.

    The colours are those that its ICC profile says, or else a PNG's gamma.

    Args:
        warn: gets a line where there is a profile that can't be used; the colours are then taken for sRGB.
    """
    plain = {"LA": "L", "RGBA": "RGB"}.get(picture.mode)
    colours = picture.convert(plain) if plain else picture
    converted = _from_profile(colours, picture.info, warn).convert("RGB")
    if plain:
        converted.putalpha(picture.getchannel("A"))
    return converted


def _from_profile(
    colours: Image.Image, info: dict[str | tuple[int, int], object], warn: Callable[[str], None]
) -> Image.Image:
    profile, gamma = info.get("icc_profile"), info.get("gamma")
    if isinstance(profile, bytes) and profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = source.profile.xcolor_space.strip()
            if _MODES.get(space) == "RGB" and colours.mode == "L":
                colours = colours.convert("RGB")
            if _MODES.get(space) == colours.mode:
                return _transformed(colours, source)
            warn(f"its colour profile is for {space} and its pixels are {colours.mode}; they are taken for sRGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
            warn(f"its colour profile is damaged ({' '.join(str(error).split())}); its colours are taken for sRGB")
    elif isinstance(gamma, float) and "srgb" not in info and colours.mode in ("L", "RGB"):
        return _from_gamma(colours, gamma)
    return _transformed(colours, ImageCms.createProfile("LAB", 5000)) if colours.mode == "LAB" else colours


def _transformed(colours: Image.Image, source: ImageCms.ImageCmsProfile | ImageCms.core.CmsProfile) -> Image.Image:
    srgb = ImageCms.createProfile("sRGB")
    found = ImageCms.profileToProfile(colours, source, srgb, outputMode="RGB")
    assert found is not None  # it is not changed in place
    return found


def _from_gamma(colours: Image.Image, gamma: float) -> Image.Image:
    """Reads a PNG's gAMA chunk: values are light to the power of ``gamma``."""
    if gamma <= 0 or abs(gamma / _USUAL_GAMMA - 1) < _SLACK:
        return colours
    light = [(value / 255) ** (1 / gamma) for value in range(256)]
    curve = [round(255 * (12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055)) for x in light]
    return colours.point(curve * len(colours.getbands()))


def _from_16_bits(picture: Image.Image) -> Image.Image:
    """Scaled down; Pillow's own conversion cuts 16 bits off at 255, which leaves a white picture."""
    grey = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        values = picture.convert("I")
        above = values.point(lambda value: value * 1 - transparent).convert("L")
        below = values.point(lambda value: value * -1 + transparent).convert("L")
        grey.info.pop("transparency", None)
        grey.putalpha(ImageChops.lighter(above, below).point(lambda difference: 255 * (difference > 0)))
    return grey
