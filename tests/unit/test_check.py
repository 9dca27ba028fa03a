"""What is said of a folder of pictures before a job starts."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFilter, ImageOps

from dreambooth_sm.cli import main
from dreambooth_sm.data.check import BLURRED, FEWEST, NEAR, Findings, check_folder, difference_hash, sharpness
from dreambooth_sm.data.folder import list_pictures
from dreambooth_sm.data.pictures import open_picture
from dreambooth_sm.hyperparameters import Hyperparameters
from tests.helpers.patience import PATIENCE

PROMPT = "photo of zwx toy"
EXAMPLES = Path(__file__).parents[1] / "data" / "duck_toy"


def check(folder: Path, **values: object) -> Findings:
    return check_folder(folder, Hyperparameters.parse({"instance_prompt": PROMPT, "resolution": 64, **values}))


def blocks(number: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """A picture that is like no other, with sharp edges."""
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def content(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def with_alpha(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    return picture


def deep(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)


SRGB, LAB = (ImageCms.createProfile(space) for space in ("sRGB", "LAB"))  # type: ignore[arg-type]


def lab_profile() -> bytes:
    return ImageCms.ImageCmsProfile(LAB).tobytes()


def animation(kind: str, **options: object) -> bytes:
    return content(blocks(50), kind, save_all=True, append_images=[blocks(51), blocks(52)], **options)


# Name to content; what can be used comes first.
GOOD: dict[str, Callable[[int], bytes]] = {
    "plain.jpg": lambda n: content(blocks(n), "JPEG"),
    "UPPER.JPEG": lambda n: content(blocks(n), "JPEG", quality=30),
    "progressive.jpg": lambda n: content(blocks(n), "JPEG", progressive=True, subsampling=2),
    "turned.jpg": lambda n: content(blocks(n), "JPEG", exif=exif(6)),
    "grey.jpg": lambda n: content(blocks(n).convert("L"), "JPEG"),
    "cmyk.jpg": lambda n: content(blocks(n).convert("CMYK"), "JPEG"),
    "other profile.jpg": lambda n: content(blocks(n), "JPEG", icc_profile=lab_profile()),
    "broken profile.jpg": lambda n: content(blocks(n), "JPEG", icc_profile=b"no profile"),
    "rgb.png": lambda n: content(blocks(n), "PNG"),
    "alpha.png": lambda n: content(with_alpha(blocks(n)), "PNG"),
    "grey alpha.png": lambda n: content(with_alpha(blocks(n)).convert("LA"), "PNG"),
    "palette.png": lambda n: content(blocks(n).quantize(16), "PNG", transparency=0),
    "16 bits.png": lambda n: content(deep(blocks(n)), "PNG"),
    "one bit.png": lambda n: content(blocks(n).convert("1"), "PNG"),
    "lossy.webp": lambda n: content(blocks(n), "WEBP"),
    "alpha.webp": lambda n: content(with_alpha(blocks(n)), "WEBP", lossless=True),
    "animated.webp": lambda n: animation("WEBP", lossless=True),
    "phone.heic": lambda n: content(blocks(n), "HEIF"),
    "phone.HEIF": lambda n: content(with_alpha(blocks(n)), "HEIF"),
    "new.avif": lambda n: content(blocks(n), "AVIF"),
    "animated.gif": lambda n: content(blocks(n), "GIF", save_all=True, append_images=[blocks(53)]),
    "old.bmp": lambda n: content(blocks(n), "BMP"),
    "scan.tif": lambda n: content(blocks(n), "TIFF", compression="tiff_lzw"),
    "16 bits.tiff": lambda n: content(deep(blocks(n)), "TIFF"),
    "cmyk.tif": lambda n: content(blocks(n).convert("CMYK"), "TIFF"),
    "утка.jpg": lambda n: content(blocks(n), "JPEG"),
    "鸭子 🦆.png": lambda n: content(blocks(n), "PNG"),
    "a'b\"c;$(d)%20.jpg": lambda n: content(blocks(n), "JPEG"),
    "deep/er/inside.jfif": lambda n: content(blocks(n), "JPEG"),
    "named wrongly.png": lambda n: content(blocks(n), "JPEG"),
    "tall.jpg": lambda n: content(blocks(n, (90, 200)), "JPEG"),
    "no suffix": lambda n: content(blocks(n), "JPEG"),
    "another suffix.jpe": lambda n: content(blocks(n), "JPEG"),
    "lab.tif": lambda n: content(ImageCms.profileToProfile(blocks(n), SRGB, LAB, outputMode="LAB"), "TIFF"),
}
LEFT_OUT = {
    **dict.fromkeys([".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt", "readme.md", "a.jpg.part"], b"x"),
    ".hidden.jpg": b"x",
    "._plain.jpg": b"x",
    ".ipynb_checkpoints/plain-checkpoint.jpg": b"x",
    "__MACOSX/plain.jpg": b"x",
    "plain-mask.png": content(Image.new("L", (120, 90), 255), "PNG"),
    "deep/plain.txt": b"of a picture that lies elsewhere",
    "clip.mp4": b"\0\0\0\x18ftypmp42",
    "@eaDir/plain.jpg/SYNOPHOTO_THUMB_M.jpg": content(blocks(60), "JPEG"),
}
# Of those, what people may think is used.
NAMED = ["a.jpg.part", "clip.mp4", "deep/plain.txt", "notes.txt", "readme.md"]
BAD = {
    "text.jpg": (b"remember to add pictures", "is not a picture"),
    "page.png": (b"<!DOCTYPE html>", "is not a picture"),
    "empty.webp": (b"", "is not a picture"),
    "half.jpg": (content(blocks(61), "JPEG")[:900], "is damaged"),
    "half.heic": (content(blocks(62, (640, 480)), "HEIF")[:900], "is"),
    "half.avif": (content(blocks(63, (640, 480)), "AVIF")[:500], "is"),
    "float.tif": (content(Image.fromarray(np.zeros((80, 80), np.float32)), "TIFF"), "32 bits a pixel"),
    "stamp.png": (content(blocks(64, (12, 9)), "PNG"), "12 x 9 pixels and would be enlarged 7.1 times"),
}


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for number, (name, make) in enumerate(GOOD.items()):
        write(folder / name, make(number))
    for name, its in LEFT_OUT.items():
        write(folder / name, its)
    return folder


def write(path: Path, its: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(its)


def test_more_than_thirty_awkward_pictures_are_read(awkward: Path) -> None:
    assert len(GOOD) >= 30
    found = check(awkward)
    assert found.errors == ()
    left_out, *profiles = found.warnings
    assert left_out.endswith(": " + ", ".join(NAMED))
    assert [line.split(": ")[0] for line in profiles] == [
        str(awkward / f"{kind} profile.jpg") for kind in ("broken", "other")
    ]
    seen = {picture.path.relative_to(awkward).as_posix(): picture for picture in found.pictures}
    assert seen.keys() == GOOD.keys()
    turned = {"turned.jpg": (90, 120), "tall.jpg": (90, 200)}
    for name, picture in seen.items():
        assert picture.size == turned.get(name, (120, 90)), name
        assert open_picture(picture.path).mode == "RGB"
        assert open_picture(picture.path).size == picture.size


def test_each_picture_that_can_not_be_used_is_named_with_its_reason(awkward: Path) -> None:
    for name, (its, _) in BAD.items():
        write(awkward / name, its)
    found = check(awkward)
    assert len(found.errors) == len(BAD)
    for name, (_, said) in BAD.items():
        (line,) = [line for line in found.errors if line.startswith(f"{awkward / name} ")]
        assert said in line
        assert "\n" not in line
    skipping = check(awkward, on_bad_image="skip")
    assert skipping.errors == ()
    assert skipping.warnings == (*found.warnings, *(f"left out: {line}" for line in found.errors))
    assert skipping.pictures == found.pictures
    assert len(found.pictures) == len(GOOD)


def test_a_folder_of_which_nothing_is_left_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", b"x")
    assert check(tmp_path, on_bad_image="skip").errors == check(tmp_path).errors != ()


def test_real_photos_are_found_to_be_fine() -> None:
    found = check(EXAMPLES, resolution=512)
    assert (found.errors, found.warnings) == ((), ())
    assert {picture.shape for picture in found.pictures} == {(512, 512)}


# What is odd


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four real photos, of 400 x 300 pixels."""
    for path in sorted(EXAMPLES.glob("*.jpg")):
        with Image.open(path) as picture:
            ImageOps.fit(picture, (400, 300)).save(tmp_path / path.name, quality=95)
    return tmp_path


def test_copies_are_reported(photos: Path) -> None:
    assert check(photos).warnings == ()
    write(photos / "copy.jpg", (photos / "00.jpg").read_bytes())
    with Image.open(photos / "01.jpg") as picture:
        picture.resize((300, 225)).save(photos / "saved again.jpg", quality=50)
    same, near = check(photos).warnings
    assert same.startswith("the same file twice")
    assert same.endswith("copy.jpg = 00.jpg")
    assert near.startswith("nearly the same picture twice")
    assert near.endswith("saved again.jpg ~ 01.jpg")


@pytest.mark.parametrize("change", ["scaled", "saved", "brighter"])
def test_a_changed_copy_looks_the_same_and_another_photo_does_not(change: str) -> None:
    photos = [open_picture(path) for path in list_pictures(EXAMPLES)]
    changes: dict[str, Callable[[Image.Image], Image.Image]] = {
        "scaled": lambda p: p.resize((333, 333)),
        "saved": lambda p: Image.open(io.BytesIO(content(p, "JPEG", quality=20))),
        "brighter": lambda p: p.point(lambda value: value * 0.8 + 50),
    }
    for number, photo in enumerate(photos):
        distances = [(difference_hash(changes[change](photo)) ^ difference_hash(other)).bit_count() for other in photos]
        assert distances[number] <= NEAR
        assert min(distances[:number] + distances[number + 1 :]) > 1.5 * NEAR


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.jpg")), ids=lambda path: path.name)
def test_blur_is_told_from_a_soft_background(path: Path) -> None:
    photo = open_picture(path).resize((512, 512))
    assert sharpness(photo) > 2 * BLURRED
    assert sharpness(photo.filter(ImageFilter.GaussianBlur(2))) < BLURRED
    before_a_wall = Image.new("RGB", (512, 512), "grey")
    before_a_wall.paste(photo.resize((256, 256)), (128, 128))
    assert sharpness(before_a_wall) > BLURRED


def test_blurred_small_few_and_many_are_reported(photos: Path) -> None:
    with Image.open(photos / "02.jpg") as picture:
        picture.filter(ImageFilter.GaussianBlur(3)).save(photos / "02.jpg")
    with Image.open(photos / "03.jpg") as picture:
        picture.resize((60, 48)).save(photos / "03.jpg")
    (photos / "00.jpg").unlink()
    few, small, blurred = check(photos).warnings
    assert few.startswith(f"3 pictures in {photos} are few")
    assert small == "smaller than resolution=64 and enlarged: 03.jpg 1.3 times"
    assert blurred.startswith("blurred")
    assert blurred.endswith(": 02.jpg")
    for number in range(101):
        blocks(number).save(photos / f"{number}.png")
    assert any("104 pictures" in line and "many" in line for line in check(photos).warnings)
    assert FEWEST == 4


def test_long_lists_are_cut(tmp_path: Path) -> None:
    for number in range(8):
        blocks(number, (40, 40)).save(tmp_path / f"{number}.png")
    (line,) = check(tmp_path).warnings
    assert line.count("times") == 5
    assert line.endswith(" and 3 more")


def test_captions_are_in_the_prompts_or_missed(photos: Path) -> None:
    write(photos / "00.txt", b"on a road")
    assert [p.prompt for p in check(photos).pictures] == [PROMPT] * 4
    (line,) = check(photos).warnings
    assert "1 pictures have captions, which are not used" in line
    told = check(photos, instance_prompt=f"{PROMPT}, [filewords]")
    assert told.warnings == ()
    assert [p.prompt for p in told.pictures] == [f"{PROMPT}, on a road", *[PROMPT] * 3]
    errors = check(photos, instance_prompt="[filewords]").errors
    assert len(errors) == 3
    assert all("no caption and no words in its name" in line for line in errors)


def test_the_hyperparameters_win_over_dataset_info(photos: Path) -> None:
    write(photos / "dataset_info.json", json.dumps({"instance_prompt": "a sks dog", "class_prompt": "a dog"}).encode())
    (line,) = check(photos).warnings
    assert line == (
        f"{photos / 'dataset_info.json'} says instance_prompt='a sks dog'; "
        f"the hyperparameters win: instance_prompt={PROMPT!r}"
    )
    write(photos / "dataset_info.json", b"{")
    assert "can't be read as JSON" in check(photos).errors[0]


def test_names_that_are_no_text_are_shown_all_the_same(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"\xff.jpg")
    write(photos / name, (photos / "00.jpg").read_bytes())
    (line,) = check(photos, instance_prompt=f"{PROMPT} [filewords]").warnings
    assert line.endswith(r"\udcff.jpg = 00.jpg")
    assert main(["check", str(photos)]) == 0
    assert r"\udcff.jpg" in capsys.readouterr().out


def test_without_the_package_for_heic_all_else_is_read(photos: Path, tmp_path: Path) -> None:
    blocks(1).save(photos / "phone.heic")
    write(tmp_path / "none" / "pillow_heif.py", b"raise ImportError")
    command = [sys.executable, "-m", "dreambooth_sm.cli", "check", str(photos), "--on_bad_image", "skip"]
    path = os.pathsep.join([str(tmp_path / "none"), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": path}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "phone.heic is HEIC, which needs the package pillow-heif" in ended.stdout
    assert "4 pictures: 4 in " in ended.stdout


# Large photos


@pytest.mark.slow
def test_a_photo_of_50_megapixels_is_decoded_at_a_fraction(tmp_path: Path) -> None:
    blocks(1, (8160, 6120)).save(tmp_path / "phone.jpg", quality=80)
    whole, part = open_picture(tmp_path / "phone.jpg"), open_picture(tmp_path / "phone.jpg", (512, 512))
    assert whole.size == (8160, 6120)
    assert part.size == (4080, 3060)
    small = [np.asarray(p.resize((512, 384), Image.Resampling.LANCZOS)).astype(int) for p in (whole, part)]
    assert np.abs(small[0] - small[1]).mean() < 1
    (picture,) = check(tmp_path, resolution=512).pictures
    assert (picture.size, picture.shape) == ((8160, 6120), (576, 448))


@pytest.mark.slow
def test_phones_largest_photos_take_little_memory(tmp_path: Path) -> None:
    size = (16320, 12240)
    Image.linear_gradient("L").resize(size).save(tmp_path / "phone.jpg", quality=60)
    code = "import sys; from dreambooth_sm.cli import main; code = main(sys.argv[1:]); "
    code += "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]); sys.exit(code)"
    command = [sys.executable, "-c", code, "check", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    *_, memory = ended.stdout.split()
    assert "16320 x 12240" in ended.stdout
    assert int(memory) < 150_000, "KB; all of its pixels are 200,000"


# The command


@pytest.mark.slow
def test_the_command_prints_a_table_and_draws_a_sheet(awkward: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(awkward / "plain.txt", "ente на столе".encode())
    sheet = awkward.parent / "sheet.png"
    arguments = ["check", str(awkward), "--sheet", str(sheet), "--resolution", "64", "--bucket_step", "8"]
    assert main([*arguments, "--instance_prompt", "zwx [filewords]"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("plain.jpg")]
    assert line.split("  ")[0] == "plain.jpg"
    assert "120 x 90" in line
    assert "72 x 56" in line
    assert line.endswith("zwx ente на столе")
    assert f"{len(GOOD)} pictures: " in out
    with Image.open(sheet) as drawn:
        assert drawn.width > 5 * 72
        assert drawn.height > len(GOOD) // 5 * 72
        assert len(drawn.getcolors(maxcolors=1 << 24) or []) > 1000


def test_the_command_speaks_json_and_fails_on_errors(awkward: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(awkward / "text.jpg", b"text")
    assert main(["check", str(awkward), "--json", "--resolution", "64"]) == 2
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert len(found["pictures"]) == len(GOOD)
    assert "text.jpg is not a picture" in found["errors"][0]
    assert told.err.startswith(f"error: {awkward / 'text.jpg'} is not a picture")
    for arguments, said in (
        (["check", str(awkward / "gone")], "does not exist"),
        (["check", str(awkward), "--resolution", "65"], "set 64"),
        (["check", str(EXAMPLES), "--sheet", str(awkward / "no" / "sheet.png")], "--sheet"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err


def test_the_command_needs_no_torch(photos: Path, tmp_path: Path) -> None:
    write(tmp_path / "none" / "torch.py", b"raise SystemExit('torch was imported')")
    write(tmp_path / "none" / "numpy.py", b"raise SystemExit('numpy was imported')")
    path = os.pathsep.join([str(tmp_path / "none"), str(Path(__file__).parents[2])])
    ended = subprocess.run(
        [sys.executable, "-m", "dreambooth_sm.cli", "check", str(photos), "--sheet", str(tmp_path / "sheet.png")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "4 pictures: 4 in " in ended.stdout


def test_a_contact_sheet_needs_no_prompt_and_no_more_room_than_it_shows(tmp_path: Path) -> None:
    import launcher

    for number in range(3):
        blocks(number, (64, 64)).save(tmp_path / f"{number}.png")
    sheet = launcher.contact_sheet(tmp_path, resolution=64, base_model="toybox")
    assert sheet.width < 3 * 130, "pictures of 64 pixels and their names need no 256"
    assert sheet.height < 64 + 2 * 8 + 2 * 16 + 1
    with_prompt = launcher.contact_sheet(tmp_path, resolution=64, instance_prompt="photo of zwx toy in a meadow")
    assert (with_prompt.width, with_prompt.height > sheet.height) == (sheet.width, True)
    large = launcher.contact_sheet(EXAMPLES)
    assert large.width > 4 * 256
