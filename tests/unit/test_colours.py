"""Pictures are seen in the colours that their files say."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from dreambooth_sm.data.masks import read_mask
from dreambooth_sm.data.pictures import load_picture, open_picture

# Linear light of sRGB's primaries, adapted to D50: red and green have changed places.
SWAPPED = {"rXYZ": (0.3851, 0.7169, 0.0971), "gXYZ": (0.4361, 0.2225, 0.0139), "bXYZ": (0.1431, 0.0606, 0.7141)}
SRGB = {"rXYZ": SWAPPED["gXYZ"], "gXYZ": SWAPPED["rXYZ"], "bXYZ": SWAPPED["bXYZ"]}


def icc(space: str, gamma: float, primaries: dict[str, tuple[float, ...]] = SRGB, name: str = "test") -> bytes:
    """A profile of one gamma, for GRAY or RGB (ICC.1:2001-04)."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    text = name.encode() + b"\0"
    curve = b"curv\0\0\0\0" + struct.pack(">IH2x", 1, round(gamma * 256))
    tags = {"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(79)}
    tags |= {"cprt": b"text\0\0\0\0none\0\0\0\0", "wtpt": xyz(0.9642, 1, 0.8249)}
    if space == "GRAY":
        tags["kTRC"] = curve
    else:
        tags |= {key: xyz(*value) for key, value in primaries.items()}
        tags |= dict.fromkeys(("rTRC", "gTRC", "bTRC"), curve)
    table, body = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for key, value in tags.items():
        table += key.encode() + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    size = start + len(body)
    header = struct.pack(">I4xI", size, 0x02400000) + b"mntr" + space.encode().ljust(4) + b"XYZ "
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + xyz(0.9642, 1, 0.8249)[8:]
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def saved(path: Path, picture: Image.Image, **options: object) -> Image.Image:
    picture.save(path, **options)  # type: ignore[arg-type]
    return open_picture(path)


def palette(picture: Image.Image) -> Image.Image:
    return picture.convert("RGB").quantize(4)


MODES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "grey": lambda p: p,
    "grey and alpha": lambda p: p.convert("LA"),
    "palette": palette,
    "colour": lambda p: p.convert("RGB"),
    "colour and alpha": lambda p: p.convert("RGBA"),
    "16 bits": lambda p: Image.fromarray(np.asarray(p).astype(np.uint16) * 257),
}


@pytest.mark.parametrize("name", ["test", "sRGB with another curve"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("gamma", "seen"), [(1.0, 128), (1.8, 71), (2.2, 52)])
def test_tones_are_those_of_the_profile(tmp_path: Path, gamma: float, seen: int, mode: str, name: str) -> None:
    picture = MODES[mode](Image.new("L", (4, 4), 55))
    spaces = ["RGB"] if "colour" in mode or mode == "palette" else ["GRAY", "RGB"]
    for space in spaces:
        found = saved(tmp_path / "a.png", picture, icc_profile=icc(space, gamma, name=name))
        assert np.abs(np.asarray(found).astype(int) - seen).max() <= 1, space


@pytest.mark.parametrize(("kind", "mode"), [("png", "RGBA"), ("webp", "RGBA"), ("tif", "RGBA"), ("png", "LA")])
def test_transparency_stays_where_there_is_a_profile(tmp_path: Path, kind: str, mode: str) -> None:
    layers = Image.new("RGBA", (8, 4), (55, 55, 55, 255))
    layers.paste((55, 55, 55, 0), (0, 0, 4, 4))
    options = {"lossless": True} if kind == "webp" else {}
    found = saved(tmp_path / f"a.{kind}", layers.convert(mode), icc_profile=icc("RGB", 1.0), **options)
    assert [found.getpixel(at) for at in ((0, 0), (7, 3))] == [(255, 255, 255), (128, 128, 128)]
    mask = read_mask(tmp_path / f"a.{kind}")
    assert mask is not None
    assert mask.getextrema() == (0, 255)


def test_a_transparent_colour_stays_where_there_is_a_profile(tmp_path: Path) -> None:
    clear, grey = (10, 20, 30), (55, 55, 55)
    picture = Image.new("RGB", (2, 1), clear)
    picture.putpixel((1, 0), grey)
    indexed = picture.quantize(4)
    number = indexed.getpixel((0, 0))
    assert isinstance(number, int)
    for its, transparent in ((picture, clear), (indexed, number)):
        found = saved(tmp_path / "a.png", its, icc_profile=icc("RGB", 1.0), transparency=transparent)
        assert [found.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (128, 128, 128)]
    tones = Image.new("L", (2, 1), 7)
    tones.putpixel((1, 0), 55)
    deep = Image.fromarray(np.asarray(tones).astype(np.uint16) * 257)
    for its, value in ((tones, 7), (deep, 7 * 257)):
        found = saved(tmp_path / "a.png", its, icc_profile=icc("GRAY", 1.0), transparency=value)
        assert [found.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (128, 128, 128)]


def test_colours_of_paper_and_of_the_eye(tmp_path: Path) -> None:
    swapped = saved(tmp_path / "a.jpg", Image.new("RGB", (16, 16), (255, 0, 0)), icc_profile=icc("RGB", 2.2, SWAPPED))
    assert np.abs(np.asarray(swapped).astype(int) - (0, 255, 0)).max() <= 3
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(np.asarray(saved(tmp_path / "ink.tif", ink)).astype(int) - (255, 0, 0)).max() <= 3
    lab = Image.new("LAB", (4, 4), (136, 128, 128))  # L* = 53.3, which is sRGB's 127
    assert np.abs(np.asarray(saved(tmp_path / "lab.tif", lab)).astype(int) - 127).max() <= 1


def test_the_gamma_of_a_png_counts_where_nothing_else_is_said(tmp_path: Path) -> None:
    def with_chunks(*chunks: tuple[bytes, bytes], **options: object) -> int:
        information = PngImagePlugin.PngInfo()
        for kind, content in chunks:
            information.add(kind, content)
        found = saved(tmp_path / "a.png", Image.new("L", (4, 4), 55), pnginfo=information, **options)
        tone = found.getpixel((0, 0))
        assert isinstance(tone, tuple)
        return int(tone[0])

    def gamma(value: float) -> tuple[bytes, bytes]:
        return b"gAMA", struct.pack(">I", round(value * 100_000))

    assert with_chunks(gamma(1.0)) == 128
    assert with_chunks(gamma(1 / 1.8)) in (70, 71, 72)
    assert with_chunks(gamma(0.45455)) == with_chunks() == with_chunks(gamma(0)) == 55
    assert with_chunks(gamma(1.0), (b"sRGB", b"\0")) == 55
    assert with_chunks(gamma(1.0), icc_profile=icc("GRAY", 2.2)) == 52


def test_a_profile_that_is_srgb_changes_nothing(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.abs(np.asarray(saved(tmp_path / "a.png", noise, icc_profile=srgb)).astype(int) - noise).max() <= 1


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        (b"no profile", "is damaged"),
        (icc("RGB", 1.0)[:200], "is damaged"),
        (bytes(300), "is damaged"),
        (icc("GRAY", 1.0), "is for GRAY"),
        (ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(), "is for Lab"),
    ],
)
def test_a_profile_that_can_not_be_used_gives_a_warning_and_the_picture(
    tmp_path: Path, profile: bytes, said: str
) -> None:
    Image.new("RGB", (4, 4), (200, 100, 50)).save(tmp_path / "a.png", icc_profile=profile)
    warnings: list[str] = []
    assert load_picture(tmp_path / "a.png", warn=warnings.append).getpixel((0, 0)) == (200, 100, 50)
    (line,) = warnings
    assert line.startswith(f"{tmp_path / 'a.png'}: its colour profile {said}")


def test_no_damage_to_a_profile_is_worth_a_traceback(tmp_path: Path) -> None:
    whole = icc("RGB", 1.8)
    random = np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(whole)
        for place in random.integers(0, len(content), 8):
            content[place] = random.integers(256)
        assert saved(tmp_path / "a.png", Image.new("RGB", (4, 4), (1, 2, 3)), icc_profile=bytes(content)).mode == "RGB"
