"""Checkpoints that ``torch.save`` wrote, and what other programs make of them: held against ``torch.load``."""

from __future__ import annotations

import io
import itertools
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth_sm.errors import UserError
from dreambooth_sm.stored.opening import open_tensors

DTYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.uint8, torch.bool, torch.uint16, torch.complex64),
]
numbers = itertools.count()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    def content(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(-1).view(torch.uint8)

    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(content(one), content(other))


def read(path: Path) -> dict[str, torch.Tensor]:
    """All of a file's tensors, whole and in pieces of an odd size."""
    tensors = {}
    for name, stored in open_tensors(path).tensors.items():
        tensors[name] = stored.read()
        pieces = [stored.piece(at, min(at + 3, stored.numel)) for at in range(0, stored.numel, 3)]
        if pieces:
            assert same(torch.cat(pieces).reshape(stored.shape), tensors[name])
    return tensors


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of all types: some turned, some parts of others, some sharing a storage, some empty."""
    found: dict[str, torch.Tensor] = {}
    for number in range(draw(st.integers(1, 5))):
        dtype, rows = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 5))
        tensor = (torch.arange(rows * 4) % 5 + number).reshape(rows, 4).to(dtype)
        found[f"t{number}.weight"] = draw(st.sampled_from([tensor, tensor.t(), tensor[1:], tensor[:, :1], tensor[::2]]))
        if draw(st.booleans()):
            found[f"t{number}.again"] = tensor
    return found


@st.composite
def rewritings(draw: st.DrawFn) -> Any:
    """How a program writes the records of a zip file again."""
    order = draw(st.sampled_from(["as it is", "reversed", "sorted"]))
    compression = draw(st.lists(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]), min_size=1, max_size=4))
    return order, compression, draw(st.sampled_from([None, b"little", b"big"])), draw(st.booleans())


def rewrite(source: Path, target: Path, how: Any) -> None:
    order, compression, byteorder, extra = how
    with zipfile.ZipFile(source) as old:
        root = old.namelist()[0].partition("/")[0]
        records = {name: old.read(name) for name in old.namelist()}
    if byteorder:
        records[f"{root}/byteorder"] = byteorder
    names = list(records)
    names = {"as it is": names, "reversed": names[::-1], "sorted": sorted(names)}[order]
    with zipfile.ZipFile(target, "w") as new:
        for name, kind in zip(names, itertools.cycle(compression)):
            info = zipfile.ZipInfo(name)
            info.compress_type = kind
            info.extra = b"\xff\xff\x05\x00hello" if extra else b""
            new.writestr(info, records[name])


@settings(deadline=None)
@given(checkpoints(), rewritings())
def test_a_file_that_another_program_wrote_again(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor], how: Any
) -> None:
    folder = tmp_path_factory.mktemp("pickles", numbered=True)
    torch.save({"state_dict": tensors, "global_step": 3}, folder / "whole.ckpt")
    rewrite(folder / "whole.ckpt", folder / "again.ckpt", how)
    try:
        expected = torch.load(folder / "again.ckpt", weights_only=True)["state_dict"]
    except Exception:
        with pytest.raises(UserError, match=r"again\.ckpt"):
            read(folder / "again.ckpt")
        return
    found = read(folder / "again.ckpt")
    names = {name for name in tensors if not name.endswith("again") or name in found}
    assert found.keys() >= names
    for name in names:
        assert same(found[name], expected[name]), (name, how)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_bytes_are_told_in_one_line_or_are_what_torch_reads(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("pickles", numbered=True) / "m.ckpt"
    torch.save({"a.weight": torch.arange(30.0).reshape(5, 6).t(), "b": torch.ones(3)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + 1] = data.draw(st.binary(max_size=3))
    path.write_bytes(content)
    try:
        found = read(path)
    except UserError as error:
        (line,) = error.problems
        assert str(path) in line
        assert "\n" not in line
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = torch.load(path, weights_only=True)
    except Exception:
        return
    for name in found.keys() & expected.keys():
        assert same(found[name], expected[name])


def test_a_storage_that_is_shorter_than_its_tensor(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(100.0)}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as old, zipfile.ZipFile(tmp_path / "b.ckpt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[:40] if "/data/" in name else old.read(name))
    with pytest.raises(UserError, match=r"b\.ckpt ends in the middle of a; copy it again"):
        read(tmp_path / "b.ckpt")


def test_compressions_that_torch_does_not_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(100.0)}, tmp_path / "a.ckpt")
    rewrite(tmp_path / "a.ckpt", tmp_path / "b.ckpt", ("sorted", [zipfile.ZIP_BZIP2], None, False))
    with pytest.raises(UserError, match=r"b\.ckpt is not a whole checkpoint file .*torch does not read"):
        read(tmp_path / "b.ckpt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda tensors: tensors,
        lambda tensors: {"state_dict": tensors, "epoch": np.float64(3), "lr": np.array([1.0]), "none": None},
        lambda tensors: {"module": tensors, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
        lambda tensors: {"model": {"state_dict": tensors}, "args": Path("a")},
        lambda tensors: {f"module.{name}": value for name, value in tensors.items()},
        lambda tensors: {f"_orig_mod.{name}": value for name, value in tensors.items()},
        lambda tensors: {**tensors, 5: torch.ones(1), "stray": {"x": torch.ones(2)}},
        lambda tensors: {name: torch.nn.Parameter(value) for name, value in tensors.items()},
    ],
)
def test_what_trainers_put_around_and_beside_the_tensors(wrapped: Any, zipped: bool, tmp_path: Path) -> None:
    tensors = {f"layer.{number}.weight": torch.full((2, 3), float(number)) for number in range(4)}
    path = tmp_path / "m.ckpt"
    torch.save(wrapped(tensors), path, _use_new_zipfile_serialization=zipped)
    found = read(path)
    assert all(same(found[name], value) for name, value in tensors.items())
    assert found.keys() - tensors.keys() <= {"5"}


def test_files_of_a_card(tmp_path: Path) -> None:
    """A checkpoint says on which device its tensors were; it need not be here."""
    torch.save({"a": torch.arange(100.0)}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as old, zipfile.ZipFile(tmp_path / "b.ckpt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:7")
                assert b"cuda:7" in content
            new.writestr(name, content)
    assert same(read(tmp_path / "b.ckpt")["a"], torch.arange(100.0))


def test_what_torch_does_not_read_is_told_in_one_line(tmp_path: Path) -> None:
    script, plain, tar = tmp_path / "script.pt", tmp_path / "plain.ckpt", tmp_path / "tar.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    plain.write_bytes(pickle.dumps({"a": [1, 2]}))
    with tarfile.open(tar, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "pointer.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>Sign in</html>")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError) as caught:
            open_tensors(path)
        (line,) = caught.value.problems
        assert str(path) in line
        assert "\n" not in line
