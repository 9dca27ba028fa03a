"""What the files of a folder are: what they hold decides, and what is left out is named."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreambooth_sm.data.captions import read_captions
from dreambooth_sm.data.check import check_class_folder
from dreambooth_sm.data.folder import list_pictures, masks_of
from dreambooth_sm.data.masks import read_mask, subject_box
from dreambooth_sm.hyperparameters import Hyperparameters
from launcher.staging import picture_files
from tests.unit.test_check import blocks, check, content

MASK = Image.new("L", (120, 90))
MASK.paste(255, (0, 0, 60, 90))


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_pictures(folder)]


def fill_with(folder: Path, *files: str) -> None:
    for number, name in enumerate(files):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(blocks(number), "PNG"))


# Masks


@pytest.mark.parametrize(
    "name",
    [
        "duck-mask.png",
        "duck-mask.PNG",
        "Duck-Mask.png",
        "duck_mask.png",
        "duck.mask.png",
        "duck-masklabel.png",
        "duck-mask.jpg",
        "duck_mask.webp",
        "duck.jpg-mask.png",
        "duck.jpg.mask.png",
        "masks/duck.png",
        "Mask/duck.jpg",
    ],
)
def test_masks_as_programs_name_them(tmp_path: Path, name: str) -> None:
    blocks(0).save(tmp_path / "duck.jpg")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    MASK.save(path, quality=95)
    assert names(tmp_path) == ["duck.jpg"]
    assert masks_of(tmp_path / "duck.jpg") == [path]
    mask = read_mask(tmp_path / "duck.jpg")
    assert mask is not None
    assert subject_box(mask) == pytest.approx((0, 0, 0.5, 1), abs=0.02)
    assert sorted(picture_files(tmp_path)) == sorted(["duck.jpg", name])
    assert not any("left out" in line for line in check(tmp_path).warnings)


def test_what_is_named_like_a_mask_of_nothing_is_a_picture_and_is_named(tmp_path: Path) -> None:
    fill_with(tmp_path, "a.png", "b-mask.png", "masks/c.png", "d mask.png")
    assert names(tmp_path) == ["a.png", "b-mask.png", "d mask.png", "masks/c.png"]
    (line,) = [line for line in check(tmp_path).warnings if "named like the mask" in line]
    assert line.endswith("trained as pictures: b-mask.png, d mask.png, masks/c.png")


def test_masks_that_are_not_used_are_named(tmp_path: Path) -> None:
    fill_with(tmp_path, "a.png", "a-mask.png", "a_mask.png", "a-condlabel.png")
    (line,) = [line for line in check(tmp_path).warnings if line.startswith("left out")]
    assert line.endswith(": a-condlabel.png, a_mask.png")
    assert names(tmp_path) == ["a.png"]


@pytest.mark.parametrize("colour", ["white", "black"])
def test_white_on_nothing_is_a_mask(tmp_path: Path, colour: str) -> None:
    blocks(0).save(tmp_path / "duck.png")
    layers = Image.new("RGBA", (120, 90), (*[255 * (colour == "white")] * 3, 0))
    layers.paste("white", (0, 0, 60, 90))
    layers.save(tmp_path / "duck-mask.png")
    mask = read_mask(tmp_path / "duck.png")
    assert mask is not None
    assert subject_box(mask) == (0, 0, 0.5, 1)


# Captions


@pytest.mark.parametrize(
    "name", ["duck.txt", "duck.TXT", "duck.caption", "Duck.Caption", "duck.png.txt", "duck.PNG.TXT", "duck.png.caption"]
)
def test_captions_as_programs_name_them(tmp_path: Path, name: str) -> None:
    fill_with(tmp_path, "duck.png")
    (tmp_path / name).write_text("on a table")
    assert read_captions(tmp_path, list_pictures(tmp_path)) == {tmp_path / "duck.png": "on a table"}
    assert sorted(picture_files(tmp_path)) == sorted(["duck.png", name])
    assert check(tmp_path, instance_prompt="zwx, [filewords]").pictures[0].prompt == "zwx, on a table"


def test_a_caption_that_is_not_used_is_named(tmp_path: Path) -> None:
    fill_with(tmp_path, "duck.png")
    for name in ("duck.caption", "duck.txt", "duk.txt"):
        (tmp_path / name).write_text(name)
    found = check(tmp_path, instance_prompt="zwx, [filewords]")
    assert found.pictures[0].prompt == "zwx, duck.txt"
    (line,) = [line for line in found.warnings if line.startswith("left out")]
    assert line.endswith(": duck.caption, duk.txt")


def test_a_blank_caption_means_no_words(tmp_path: Path) -> None:
    fill_with(tmp_path, "red duck.png", "blue duck.png")
    (tmp_path / "red duck.txt").write_text(" \n")
    found = check(tmp_path, instance_prompt="photo of zwx toy, [filewords]")
    assert [picture.prompt for picture in found.pictures] == ["photo of zwx toy, blue duck", "photo of zwx toy"]
    (line,) = check(tmp_path, instance_prompt="[filewords]").errors
    assert "red duck.png has an empty caption" in line


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_captions_say_their_encoding(tmp_path: Path, encoding: str) -> None:
    fill_with(tmp_path, "duck.png")
    (tmp_path / "duck.txt").write_text("Ente für Käthe", encoding=encoding)
    assert check(tmp_path, instance_prompt="[filewords]").pictures[0].prompt == "Ente für Käthe"


@pytest.mark.parametrize("its", ["Ente für Käthe".encode("cp1252"), "Ente".encode("utf-16-le"), b"x" * (1 << 21)])
def test_a_caption_that_can_not_be_read_counts_where_it_is_used(tmp_path: Path, its: bytes) -> None:
    fill_with(tmp_path, "duck.png")
    (tmp_path / "duck.txt").write_bytes(its)
    (tmp_path / "metadata.csv").write_text("nothing\n")
    found = check(tmp_path)
    assert found.errors == ()
    assert any("captions, which are not used" in line for line in found.warnings)
    (line,) = check(tmp_path, instance_prompt="[filewords]").errors
    assert f"{tmp_path / 'duck'}" in line
    assert "again" in line


@pytest.mark.parametrize("base", ["stable-diffusion-v1-5/stable-diffusion-v1-5", "toybox"])
def test_prompts_that_are_too_long_are_found_before_a_model_is(tmp_path: Path, base: str) -> None:
    fill_with(tmp_path, "duck.png", "toy.png")
    (tmp_path / "duck.txt").write_text("red, " * 50)
    values = {"instance_prompt": "zwx, [filewords]", "pretrained_model_name_or_path": base}
    class_prompt = {"with_prior_preservation": True, "class_prompt": "a toy " * 80}
    first, second = check(tmp_path, **values, **class_prompt).errors
    assert first.startswith(f"{tmp_path / 'duck.png'}: its prompt 'zwx, red,")
    limit, tokens = (75, 103) if base != "toybox" else (30, 104)
    assert f"has {tokens} tokens and max_token_length=75 allows {limit}; shorten it or set" in first
    assert second.startswith("class_prompt 'a toy")
    assert check(tmp_path, **values, max_token_length=225, resolution=64).errors == () or base == "toybox"


# Everything else


def test_what_a_file_holds_decides(tmp_path: Path) -> None:
    (tmp_path / "photo").write_bytes(content(blocks(0), "JPEG"))
    (tmp_path / "photo.avif").write_bytes(content(blocks(1), "AVIF"))
    (tmp_path / "photo.bin").write_bytes(content(blocks(2), "WEBP"))
    (tmp_path / "BMW.txt").write_text("BM is how a bitmap begins as well")
    (tmp_path / "photo.jxl").write_bytes(b"\xff\x0a" + bytes(60))
    raw = Image.new("RGB", (16, 16))
    raw.save(tmp_path / "raw.tif", tiffinfo={254: 1})
    (tmp_path / "raw.tif").rename(tmp_path / "photo.dng")
    assert names(tmp_path) == ["photo", "photo.avif", "photo.bin"]
    (line,) = [line for line in check(tmp_path).warnings if line.startswith("left out")]
    assert line.endswith(": BMW.txt, photo.dng, photo.jxl")
    (tmp_path / "photo.dng").rename(tmp_path / "photo.tif")
    (line,) = check(tmp_path).errors
    assert "photo.tif is a camera's raw file" in line


def test_hundreds_of_files_are_left_out_in_one_line(tmp_path: Path) -> None:
    fill_with(tmp_path, "a.png", "b.png", "c.png", "d.png")
    for number in range(300):
        (tmp_path / f"{number:03}.npz").write_bytes(b"PK")
    (line,) = check(tmp_path).warnings
    assert line.endswith(": 000.npz, 001.npz, 002.npz, 003.npz, 004.npz and 295 more")


def test_litter_is_left_out_without_a_line(tmp_path: Path) -> None:
    fill_with(tmp_path, "a.png", "b.png", "c.png", "d.png")
    fill_with(tmp_path, "@eaDir/a.png/SYNOPHOTO_THUMB_XL.jpg", "__MACOSX/._a.png", ".cache/a.png", ".hidden.png")
    fill_with(
        tmp_path, "#recycle/e.png", "$RECYCLE.BIN/f.png", "Thumbs.db", "desktop.ini", ".DS_Store", "manifest.json"
    )
    found = check(tmp_path)
    assert (len(found.pictures), found.warnings) == (4, ())
    assert sorted(picture_files(tmp_path)) == ["a.png", "b.png", "c.png", "d.png"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    fill_with(tmp_path / "elsewhere", "a.png", "deep/b.png")
    folder = tmp_path / "pictures"
    fill_with(folder, "c.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "round").symlink_to(folder)
    (folder / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    assert len(names(folder)) == 3
    assert sorted(picture_files(folder)) == names(folder)


def test_pipes_sockets_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    fill_with(tmp_path, "a.png")
    for name in ("b.png", "c", "a.txt", "metadata.jsonl", "dataset_info.json", "a-mask.png"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "d.jpg"))
        found = check(tmp_path, instance_prompt="[filewords]")
    assert len(found.errors) >= 5
    for name in ("b.png", "d.jpg", "zero.png"):
        assert any(line.startswith(f"{tmp_path / name} is not a file") for line in found.errors)


def test_folders_that_can_not_be_looked_into_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_with(tmp_path, "a.png", "locked/b.png")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("locked"):  # tests may run as root, who is refused nothing
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    (line,) = check(tmp_path).errors
    assert line == f"{tmp_path / 'locked'} can't be looked into: Permission denied"


def test_names_can_not_forge_lines(tmp_path: Path) -> None:
    fill_with(tmp_path, "a.png", "b\nerror: c.png", "\x1b[31mred.png")
    (tmp_path / "b\nerror: c.png").write_text("text")
    (tmp_path / "note\r\nwarning: s.txt").write_text("text")
    found = check(tmp_path)
    assert found.errors
    for line in (*found.errors, *found.warnings):
        assert line.isprintable()
    assert any(r"note\r\nwarning" in line for line in found.warnings)


def test_more_class_pictures_than_are_wanted_are_named(tmp_path: Path) -> None:
    fill_with(tmp_path, "a.png", "b.png", "c.png", "notes.pdf")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / f"class-{'0' * 20}-000000.safetensors").write_bytes(b"latents of an earlier job")
    values = {"with_prior_preservation": True, "instance_prompt": "a zwx toy", "class_prompt": "a toy"}
    found = check_class_folder(tmp_path, Hyperparameters.parse({**values, "num_class_images": 2}))
    assert [path.name for path in found.pictures] == ["a.png", "b.png"]
    left_out, more = found.warnings
    assert left_out.endswith(": notes.pdf")
    assert more.startswith(f"of 3 class pictures in {tmp_path} the first 2 by name are used; set num_class_images=3")
    found = check_class_folder(tmp_path, Hyperparameters.parse({**values, "num_class_images": 3}))
    assert (len(found.pictures), len(found.warnings)) == (3, 1)


# Hostile pictures


def png_of(width: int, height: int) -> bytes:
    whole = io.BytesIO()
    Image.new("L", (1, 1)).save(whole, "PNG")
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rest = whole.getvalue()[33:]
    return whole.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + rest


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (1, 100_000), (100_000, 1), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_sizes_that_no_picture_has(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a.png").write_bytes(png_of(*size))
    (line,) = check(tmp_path).errors
    assert line.startswith(f"{tmp_path / 'a.png'} ")


def test_a_strip_is_refused_for_what_it_is(tmp_path: Path) -> None:
    Image.new("L", (1, 100_000)).save(tmp_path / "a.png")
    (line,) = check(tmp_path).errors
    assert "1 x 100000 pixels and would be enlarged 64.0 times" in line


def test_ghostscript_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("gs", "gswin64c", "gswin32c"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
    folder = tmp_path / "pictures"
    fill_with(folder, "good.png", "good2.png")
    for name in ("a.png", "b.jpg", "c", "d.eps", "good-mask.png"):
        (folder / name).write_bytes(eps)
    with Image.open(io.BytesIO(eps)) as picture, pytest.raises(Exception):  # noqa: B017, PT011
        picture.load()
    assert (tmp_path / "started").is_file(), "Pillow itself starts it"
    (tmp_path / "started").unlink()
    found = check(folder)
    assert [Path(line.split(" is ")[0]).name for line in found.errors] == ["a.png", "b.jpg", "good-mask.png"]
    assert any(line.endswith(": c, d.eps") for line in found.warnings)
    assert not (tmp_path / "started").exists()


def test_pngs_with_a_workflow(tmp_path: Path) -> None:
    information = PngInfo()
    information.add_text("workflow", "node " * 1_000_000, zip=True)
    information.add_itxt("prompt", "节点" * 1_000_000, zip=True)
    information.add_text("more", "x" * 3_000_000)
    for number in range(4):
        blocks(number).save(tmp_path / f"{number}.png", pnginfo=information)
    found = check(tmp_path)
    assert (found.errors, found.warnings) == ((), ())
    assert [picture.size for picture in found.pictures] == [(120, 90)] * 4


@pytest.mark.slow
def test_text_that_fills_the_memory_is_refused_in_a_line(tmp_path: Path) -> None:
    information = PngInfo()
    information.add_text("bomb", "x" * (200 << 20), zip=True)
    blocks(0).save(tmp_path / "a.png", pnginfo=information)
    (line,) = check(tmp_path).errors
    assert "a.png is damaged and can't be read (Decompressed data too large" in line
