"""Picture files as people's phones and folders have them, and the crops that are trained on."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from dreambooth_sm.data.folder import list_pictures
from dreambooth_sm.data.pictures import View, crop, open_picture, problems_of, read_size
from dreambooth_sm.errors import UserError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners() -> Image.Image:
    """6 x 4 pixels; one colour a corner, so that every turn shows."""
    picture = Image.new("RGB", (6, 4), "grey")
    for at, colour in {(0, 0): RED, (5, 0): GREEN, (0, 3): BLUE, (5, 3): WHITE}.items():
        picture.putpixel(at, colour)
    return picture


def damaged_jpeg() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


# Which files are pictures


def test_folders_are_searched_and_what_is_no_picture_is_left_out(tmp_path: Path) -> None:
    wanted = ["a.jpg", "B.JPEG", "c.Png", "deep/er/d.webp", "e.bmp", "f.tiff", "g.gif", "h.tif"]
    others = [".DS_Store", "._a.jpg", ".hidden.png", ".ipynb_checkpoints/a-checkpoint.jpg", "a.txt", "captions.json"]
    others += ["deep/.cache/x.jpg", "jpg", "a.jpg.part", "Thumbs.db", "model.safetensors"]
    for name in [*wanted, *others]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert list_pictures(tmp_path) == sorted(tmp_path / name for name in wanted)


def test_a_missing_or_empty_folder_has_no_pictures(tmp_path: Path) -> None:
    assert list_pictures(tmp_path) == list_pictures(tmp_path / "missing") == []


# Reading

# Where each EXIF orientation puts the stored corners of `corners()`: top left, top right, bottom left, bottom right.
ORIENTATIONS = {
    1: (RED, GREEN, BLUE, WHITE),
    2: (GREEN, RED, WHITE, BLUE),
    3: (WHITE, BLUE, GREEN, RED),
    4: (BLUE, WHITE, RED, GREEN),
    5: (RED, BLUE, GREEN, WHITE),
    6: (BLUE, RED, WHITE, GREEN),
    7: (WHITE, GREEN, BLUE, RED),
    8: (GREEN, WHITE, RED, BLUE),
}


KINDS: dict[str, dict[str, object]] = {
    "a.jpg": {"quality": 95, "subsampling": 0},
    "a.png": {},
    "a.tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
    "a.webp": {"lossless": True},
    "a.heic": {"quality": 95},
    "a.avif": {"quality": 95},
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_pictures_are_upright(tmp_path: Path, orientation: int, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = corners().resize((96, 64), Image.Resampling.NEAREST)
    raw = name.endswith(("heic", "avif"))
    stored.save(tmp_path / name, exif=exif.tobytes() if raw else exif, **KINDS[name])  # type: ignore[arg-type]
    upright = open_picture(tmp_path / name)
    assert upright.size == read_size(tmp_path / name) == ((96, 64) if orientation < 5 else (64, 96))
    right, bottom = upright.width - 5, upright.height - 5
    for at, colour in zip([(4, 4), (right, 4), (4, bottom), (right, bottom)], ORIENTATIONS[orientation], strict=True):
        assert np.abs(np.asarray(upright)[at[1], at[0]].astype(int) - colour).max() < 40


def test_a_turned_jpeg_of_a_phone(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = Image.new("RGB", (64, 32), BLUE)
    tall.paste(RED, (0, 0, 32, 32))
    tall.save(tmp_path / "a.jpg", exif=exif)
    upright = np.asarray(open_picture(tmp_path / "a.jpg")).astype(int)
    assert upright.shape == (64, 32, 3)
    assert np.abs(upright[:24] - RED).max() < 10
    assert np.abs(upright[40:] - BLUE).max() < 10


def test_transparency_is_white(tmp_path: Path) -> None:
    layers = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 255, 128)):
        layers.putpixel((x, 0), (255, 0, 0, alpha))
    layers.save(tmp_path / "rgba.png")
    seen = open_picture(tmp_path / "rgba.png")
    assert [seen.getpixel((x, 0)) for x in range(3)] == [WHITE, RED, (255, 127, 127)]
    grey = Image.new("LA", (2, 1))
    grey.putpixel((1, 0), (40, 255))
    grey.save(tmp_path / "la.png")
    seen = open_picture(tmp_path / "la.png")
    assert [seen.getpixel((x, 0)) for x in range(2)] == [WHITE, (40, 40, 40)]


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([*RED, *GREEN])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "opaque.png")
    picture.save(tmp_path / "clear.png", transparency=0)
    assert [open_picture(tmp_path / "opaque.png").getpixel((x, 0)) for x in range(2)] == [RED, GREEN]
    assert [open_picture(tmp_path / "clear.png").getpixel((x, 0)) for x in range(2)] == [WHITE, GREEN]


def test_cmyk_greyscale_and_black_and_white(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "one.png")
    assert np.abs(np.asarray(open_picture(tmp_path / "cmyk.jpg")).astype(int) - RED).max() < 10
    assert open_picture(tmp_path / "grey.png").getpixel((0, 0)) == (77, 77, 77)
    assert open_picture(tmp_path / "one.png").getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_a_pixel_keep_their_tones(tmp_path: Path, suffix: str) -> None:
    tones = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(tones).save(tmp_path / f"deep{suffix}")
    seen = np.asarray(open_picture(tmp_path / f"deep{suffix}"))
    assert np.array_equal(seen[..., 0].reshape(-1), np.arange(256))
    assert np.array_equal(seen[..., 0], seen[..., 2])


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_phones_newer_formats(tmp_path: Path, kind: str) -> None:
    picture = Image.new("RGBA", (64, 32), (*BLUE, 0))
    picture.paste((*RED, 255), (0, 0, 32, 32))
    path = tmp_path / {"HEIF": "a.heic", "AVIF": "a.AVIF"}[kind]
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(path, kind, exif=exif.tobytes(), quality=95)
    assert list_pictures(tmp_path) == [path]
    upright = np.asarray(open_picture(path)).astype(int)
    assert upright.shape == (64, 32, 3)
    assert read_size(path) == (32, 64)
    assert np.abs(upright[:24] - RED).max() < 20
    assert np.abs(upright[40:] - WHITE).max() < 20


def swapped_profile() -> bytes:
    """sRGB but for the names of its primaries: red is called green and the other way round."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"xXYZ").replace(b"gXYZ", b"rXYZ").replace(b"xXYZ", b"gXYZ")
    return profile.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG")])
def test_colours_are_those_of_the_profile(tmp_path: Path, mode: str, kind: str) -> None:
    path = tmp_path / f"a.{kind.lower()}"
    Image.new("RGB", (16, 16), RED).convert(mode).save(path, kind, icc_profile=swapped_profile())
    assert np.abs(np.asarray(open_picture(path)).astype(int) - GREEN).max() < 10
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()):
        Image.new("RGB", (16, 16), RED).convert(mode).save(path, "PNG", icc_profile=profile)
        assert open_picture(path).getcolors() == [(256, RED)]


def test_a_mask_beside_its_picture_is_no_picture(tmp_path: Path) -> None:
    for name in ("a.jpg", "a-mask.png", "b.mask.png", "c-mask.png"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in list_pictures(tmp_path)] == ["a.jpg", "b.mask.png", "c-mask.png"]


def test_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    for name in ("a.gif", "a.webp"):
        assert open_picture(tmp_path / name).getpixel((4, 4)) == RED
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path / "a.png").getpixel((4, 4)) == RED


def test_several_pictures_in_one_file_as_phones_make_them(tmp_path: Path) -> None:
    """MPO: two lenses, or a second picture with the brightness of a display (Ultra HDR)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.new("RGB", (64, 32), colour) for colour in (RED, GREEN)]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:], exif=exif)
    with Image.open(tmp_path / "a.jpg") as file:
        assert file.format == "MPO"
    seen = np.asarray(open_picture(tmp_path / "a.jpg", (8, 8)))
    assert seen.shape[0] > seen.shape[1]
    assert np.abs(seen.astype(int) - RED).max() < 10
    assert read_size(tmp_path / "a.jpg") == (32, 64)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jpg", b"", "is not a picture, whatever its name says"),
        ("text.jpg", b"remember to add pictures", "is not a picture, whatever its name says"),
        ("page.png", b"<!DOCTYPE html><html></html>", "is not a picture, whatever its name says"),
        ("half.jpg", damaged_jpeg(), "is damaged and can't be read"),
        ("half.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", "is"),
    ],
)
def test_what_can_not_be_read_gets_one_clear_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_picture(path)
    (line,) = caught.value.problems
    assert line.startswith(f"{path} {said}")
    assert "replace" in line
    assert "\n" not in line


def test_other_reasons_why_a_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    Image.new("RGB", (40, 40)).save(tmp_path / "huge.png")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name, said in (("float.tif", "8-bit"), ("huge.png", "more than 1,000 pixels"), ("link.jpg", "link to nothing")):
        (line,) = problems_of(tmp_path / name)
        assert said in line


def test_every_picture_is_checked_to_the_end(tmp_path: Path) -> None:
    corners().save(tmp_path / "a.png")
    for name in ("b.jpg", "d.jpg"):
        (tmp_path / name).write_bytes(damaged_jpeg())
    corners().save(tmp_path / "c.png")
    told = [line for path in list_pictures(tmp_path) for line in problems_of(path)]
    assert [line.split(" ")[0] for line in told] == [str(tmp_path / "b.jpg"), str(tmp_path / "d.jpg")]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.binary(max_size=60), st.integers(0, 200))
def test_no_damage_is_worth_a_traceback(noise: bytes, at: int) -> None:
    whole = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    corners().save(whole, "JPEG", exif=exif)
    content = bytearray(whole.getvalue())
    content[at : at + len(noise)] = noise
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        file.write(content)
        file.flush()
        told = problems_of(Path(file.name))  # any exception but UserError fails the test
        assert len(told) <= 1


# Cropping

sides = st.integers(1, 300)
shares = st.floats(0, 1)


def gradient(width: int, height: int) -> Image.Image:
    """Red grows from left to right and green from top to bottom; blue is full, so that padding would show."""
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


@given(sides, sides, st.integers(1, 12).map(lambda n: n * 8), st.builds(View, shares, shares, st.booleans()))
def test_a_crop_is_square_and_never_padded(width: int, height: int, resolution: int, view: View) -> None:
    if max(width, height) > 20 * min(width, height):
        width = height
    view_of_it = crop(gradient(width, height), (resolution, resolution), view)
    assert view_of_it.size == (resolution, resolution)
    assert np.asarray(view_of_it)[..., 2].min() == 255


@given(sides, sides, st.tuples(st.integers(1, 64), st.integers(1, 64)), st.builds(View, shares, shares))
def test_a_crop_of_any_shape_is_never_padded_nor_distorted(
    width: int, height: int, shape: tuple[int, int], view: View
) -> None:
    seen = np.asarray(crop(gradient(width, height), shape, view)).astype(int)
    assert seen.shape == (shape[1], shape[0], 3)
    assert seen[..., 2].min() == 255
    # On one axis all is seen; on the other as much as the shape's ratio leaves.
    scale = min(width / shape[0], height / shape[1])
    for axis, (side, length) in enumerate(((shape[0], width), (shape[1], height))):
        span = seen[..., axis].max() - seen[..., axis].min()
        assert span <= 255 * min(1, (side * scale + 2) / length)


@given(st.integers(10, 200), st.integers(10, 200))
def test_the_centre_crop_is_symmetrical(width: int, height: int) -> None:
    resolution = 64
    seen = np.asarray(crop(gradient(width, height), (resolution, resolution), View())).astype(int)
    pixel = 255 / (resolution - 1) * 2  # one pixel of the scaled picture, and one of the original
    slack = pixel + 255 / min(width, height)
    for channel in (0, 1):
        first, last = seen[..., channel].min(), seen[..., channel].max()
        assert abs(first - (255 - last)) <= slack


def test_the_shorter_side_is_seen_whole() -> None:
    wide = np.asarray(crop(gradient(200, 100), (64, 64), View()))
    assert wide[..., 1].min() <= 4
    assert wide[..., 1].max() >= 251
    assert 60 <= wide[..., 0].min() <= 68
    tall = np.asarray(crop(gradient(100, 200), (64, 64), View()))
    assert tall[..., 0].min() <= 4
    assert tall[..., 0].max() >= 251
    assert 60 <= tall[..., 1].min() <= 68


def test_the_crop_slides_along_the_longer_side() -> None:
    picture = gradient(200, 100)
    left, right = (np.asarray(crop(picture, (64, 64), View(left=at)))[..., 0] for at in (0.0, 1.0))
    assert left.min() <= 4
    assert 120 <= left.max() <= 132
    assert 123 <= right.min() <= 135
    assert right.max() >= 251
    assert np.array_equal(
        np.asarray(crop(picture, (64, 64), View(top=0.0))), np.asarray(crop(picture, (64, 64), View(top=1.0)))
    )


def test_mirrored_is_from_left_to_right() -> None:
    picture = gradient(90, 70)
    plain, mirrored = (np.asarray(crop(picture, (32, 32), View(0.3, 0.6, mirrored))) for mirrored in (False, True))
    assert np.array_equal(mirrored, plain[:, ::-1])
    assert not np.array_equal(mirrored, plain)
