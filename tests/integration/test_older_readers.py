"""Every kind of export draws with the diffusers and transformers of today and of years ago, and the same pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig
from transformers import CLIPImageProcessor

from dreambooth_sm import toybox
from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.kohya_file import write_kohya
from dreambooth_sm.adapters.peft_file import write_peft
from dreambooth_sm.convert import convert, merge_into
from dreambooth_sm.errors import EXIT_OK
from dreambooth_sm.models import load_base
from dreambooth_sm.stored.directory import read_directory
from dreambooth_sm.stored.model import configs_of
from dreambooth_sm.stored.tokenizer import write_tokenizer
from tests.helpers.adapters import ATTENTION, pipeline, trained
from tests.helpers.jobs import JobTree
from tests.helpers.tiny import byte_tokenizer, save_tiny_pipeline, save_tiny_xl_pipeline
from tests.helpers.training import hyperparameters

ROOT = Path(__file__).parents[2]
# `make test` makes these environments.
OLDER = (".venv-diffusers-0.27", ".venv-diffusers-0.32")
KINDS = ("toybox", "sd", "sd2", "sdxl")
LOADS = ("bare", "float32", "small", "small float16")
# The only one for adapters, and for exports whose files are written by the same means as others'.
ADAPTER = "small"
SCRIPT = ROOT / "tests" / "helpers" / "draw.py"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base models: as the hub has SD 1.5, with a feature extractor; as SD 2; as SDXL; and the toybox."""
    folder = tmp_path_factory.mktemp("bases")
    first = save_tiny_pipeline(folder / "sd")
    CLIPImageProcessor().save_pretrained(first / "feature_extractor")
    second = save_tiny_pipeline(folder / "sd2", scheduler_options={"prediction_type": "v_prediction"})
    padded = byte_tokenizer()
    padded.add_special_tokens({"pad_token": "!"})
    write_tokenizer(padded, second / "tokenizer")
    return {"toybox": toybox.BASE, "sd": first, "sd2": second, "sdxl": save_tiny_xl_pipeline(folder / "sdxl")}


@pytest.fixture(scope="module")
def exports(bases: dict[str, Path], pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the project writes of them: converted there and back, exported in half precision, and by a whole job."""
    folder = tmp_path_factory.mktemp("exports")
    found = {"toybox": toybox.BASE}
    for kind, base in bases.items():
        convert(str(base), folder / f"{kind}.safetensors")
        convert(str(folder / f"{kind}.safetensors"), found.setdefault(f"{kind}-from-file", folder / f"{kind}-file"))
        convert(str(base), found.setdefault(f"{kind}-converted", folder / f"{kind}-converted"))
        load_base(hyperparameters(pretrained_model_name_or_path=str(base))).save(
            found.setdefault(f"{kind}-saved", folder / f"{kind}-saved")
        )
    tree = JobTree.lay_out(folder / "job", {}, {"images": pictures, "model": bases["sd"]}, {})
    ended = tree.run()
    assert ended.code == EXIT_OK, ended.log
    return found | {"sd-job": tree.model}


@pytest.fixture(scope="module")
def adapters(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """LoRAs of the UNet and of two layers of the text encoders, and what is left of them in a merged model."""
    folder = tmp_path_factory.mktemp("adapters")
    found: dict[str, str] = {}
    for kind in ("sd", "sdxl"):
        base = exports[f"{kind}-converted"]
        whole = pipeline(base)
        parts = {"unet": trained(whole.unet, LoraConfig(r=4, lora_alpha=6, target_modules=[*ATTENTION, "conv1"]))}
        for part in [part for part in configs_of(whole) if part.startswith("text_encoder")]:
            config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "fc1", "fc2"])
            parts[part] = trained(getattr(whole, part), config)
        write_peft(folder / f"{kind}-peft.safetensors", Adapter(parts))
        write_kohya(folder / f"{kind}-kohya.safetensors", Adapter(parts), configs_of(whole))
        merge_into(str(folder / f"{kind}-kohya.safetensors"), str(base), folder / f"{kind}-merged")
        found |= {f"{kind}-{layout}": f"{base}+{folder}/{kind}-{layout}.safetensors" for layout in ("peft", "kohya")}
        found[f"{kind}-merged"] = f"{folder}/{kind}-merged+"
    return found


def loads_of(name: str) -> tuple[str, ...]:
    """How an export is drawn with: in all ways what jobs write of each base model, and the base model that we ship."""
    return LOADS if name in ("toybox", "sd-job") or name.endswith("-saved") else (ADAPTER,)


def content(export: Path | str) -> str:
    """A checksum of all files of a directory and their names; anything else as it is."""
    if isinstance(export, str):
        return export.replace("/", "-")
    files = sorted(path for path in export.rglob("*") if path.is_file())
    return sha256(b"".join(str(f.relative_to(export)).encode() + f.read_bytes() for f in files)).hexdigest()


def draw(python: Path, exports: Mapping[str, Path | str], target: Path) -> dict[str, np.ndarray]:
    """Draws once with exports that are the same to the byte."""
    contents = {name: content(export) for name, export in exports.items()}
    in_all_ways = {key for name, key in contents.items() if loads_of(name) == LOADS}
    arguments = [
        f"{key}={exports[name]}" + ("" if key in in_all_ways or "+" in str(exports[name]) else "+")
        for key, name in {key: name for name, key in contents.items()}.items()
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(target.parent)}
    subprocess.run([python, SCRIPT, target, *arguments], env=environment, check=True)
    with np.load(target) as pictures:
        return {
            f"{name} {load}": pictures[f"{key} {load}"] for name, key in contents.items() for load in loads_of(name)
        }


@pytest.fixture(scope="module")
def drawn(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What today's versions draw, by the model's name and how it was drawn with."""
    return draw(Path(sys.executable), exports, tmp_path_factory.mktemp("today") / "pictures.npz")


def test_every_export_draws_however_it_is_loaded(exports: dict[str, Path], drawn: dict[str, np.ndarray]) -> None:
    assert drawn.keys() == {f"{name} {load}" for name in exports for load in loads_of(name)}
    assert all(drawn[f"{name} {ADAPTER}"].std() > 0.01 for name in exports)
    for name in [name for name in exports if loads_of(name) == LOADS]:
        bare, whole, small, half = (drawn[f"{name} {load}"] for load in LOADS)
        assert bare.std() > 0.01
        assert np.array_equal(bare, whole)
        assert 0 < np.abs(half - small).mean() < 0.05, name


@pytest.mark.parametrize("environment", OLDER)
def test_older_versions_draw_the_same_pictures(
    environment: str,
    exports: dict[str, Path],
    adapters: dict[str, str],
    drawn: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    python = ROOT / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{environment} is missing: `make {environment}/.installed` makes it")
    older = draw(python, {**exports, **adapters}, tmp_path / "pictures.npz")
    with_adapters = {name: older.pop(f"{name} {ADAPTER}") for name in adapters}
    for name, picture in with_adapters.items():  # as if they were in the weights
        merged = with_adapters[f"{name.partition('-')[0]}-merged"]
        assert np.abs(picture - merged).max() < 1e-3, name
    assert older.keys() == drawn.keys()
    for name, picture in older.items():
        if name.endswith("float16"):  # today's versions round at other places
            assert np.abs(picture - drawn[name]).mean() < 0.02, name
        else:
            assert np.array_equal(picture, drawn[name]), name


def test_the_vocabulary_stays_as_the_base_has_it(bases: dict[str, Path], exports: dict[str, Path]) -> None:
    ours, theirs = exports["sd2-saved"] / "tokenizer", bases["sd2"] / "tokenizer"
    assert json.loads((ours / "vocab.json").read_text()) == byte_tokenizer().get_vocab()
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_words_that_were_added_to_a_vocabulary_stay(bases: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = read_directory(bases["sd"]).pipeline.tokenizer
    tokenizer.add_tokens(["<zwx>"])
    write_tokenizer(tokenizer, tmp_path)
    number = len(byte_tokenizer())
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {"<zwx>": number}
    words = type(tokenizer).from_pretrained(tmp_path)("photo of <zwx> toy").input_ids
    assert number in words
    told = [sys.executable, "-c", "import sys, transformers; print(transformers.CLIPTokenizer.from_pretrained("]
    told[-1] += "sys.argv[1])('photo of <zwx> toy').input_ids)"
    for python in [path for environment in OLDER if (path := ROOT / environment / "bin" / "python").exists()]:
        answer = subprocess.run([python, *told[1:], tmp_path], capture_output=True, text=True, check=True)
        assert json.loads(answer.stdout.splitlines()[-1]) == words
