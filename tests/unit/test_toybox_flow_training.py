"""How the toybox's flow pipeline is made, in miniature; what both pipelines share is in ``test_toybox_training.py``."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dreambooth_sm.families.z_image import FAMILY
from dreambooth_sm.models import load_base
from dreambooth_sm.sampling import draw
from dreambooth_sm.stored.directory import read_directory
from tests.helpers.training import hyperparameters
from toybox import flow_networks, toys, train_flow
from toybox.flow_networks import CAPTION_LENGTH

MEGABYTE = 1_000_000
SETTINGS = train_flow.FlowSettings(minutes=0, pictures=8, held_out=2, drawn=1, vae_batch=2, denoiser_batch=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the whole command makes in one step a stage."""
    out = tmp_path_factory.mktemp("toybox-flow")
    train_flow.make_all(out, SETTINGS, torch.device("cpu"))
    return out


@pytest.fixture(scope="module")
def captions() -> list[str]:
    rng = random.Random(1)
    return [toys.caption(toys.random_scene(rng), rng) for _ in range(3000)]


@pytest.mark.slow
def test_the_command_makes_a_base_model_that_jobs_take(made: Path) -> None:
    assert json.loads((made / "figures.json").read_text()).keys() >= {"vae", "psnr_db", "denoiser", "base_mb"}
    assert (made / "sheet.png").is_file()
    assert not [path for path in (made / "base").rglob("*.json") if "_name_or_path" in path.read_text()]
    assert sum(path.stat().st_size for path in (made / "base").rglob("*") if path.is_file()) <= 16 * MEGABYTE
    base = load_base(hyperparameters(pretrained_model_name_or_path=str(made / "base"), method="lora"))
    assert base.family is FAMILY
    ((picture,),) = draw(read_directory(made / "base").load(), "photo of zwx toy", [0], resolution=128, steps=2)
    assert picture.size == (128, 128)


@pytest.mark.slow
def test_a_second_command_goes_on_with_what_the_first_made(made: Path, tmp_path: Path) -> None:
    figures = train_flow.make_all(tmp_path, replace(SETTINGS, seed=1), torch.device("cpu"), made)
    assert "steps" in figures["denoiser"]
    assert "vae" not in figures
    before, after = (read_directory(out / "base").load() for out in (made, tmp_path))
    for part in ("vae", "transformer", "text_encoder"):  # in no time nothing is learned
        old, new = (getattr(pipeline, part).state_dict() for pipeline in (before, after))
        assert all(torch.equal(old[name], new[name]) for name in old), part


@pytest.mark.slow
def test_a_second_command_trains_the_denoiser_where_the_first_got_no_further_than_the_vae(
    made: Path, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "vae").symlink_to(made / "base" / "vae")
    figures = train_flow.make_all(tmp_path, SETTINGS, torch.device("cpu"))
    assert "vae" not in figures
    assert (tmp_path / "base" / "transformer").is_dir()


@pytest.mark.slow
def test_times_are_those_that_jobs_train(made: Path) -> None:
    """By default: as often as others, and shifted as the model is drawn with."""
    pipeline = read_directory(made / "base").load()
    theirs = FAMILY.objective(pipeline, hyperparameters(resolution=128, method="lora"))
    ours = train_flow.make_objective(pipeline)
    assert torch.equal(ours.sigmas, theirs.sigmas)


def test_captions_are_read_as_the_family_reads_them(captions: list[str]) -> None:
    """Ids, lengths, and the states of a prompt's own tokens."""
    torch.manual_seed(0)
    pipeline = flow_networks.make_pipeline(flow_networks.make_flow_vae(), flow_networks.make_tokenizer(captions))
    pipeline.text_encoder.eval()
    texts = [*captions[:4], "photo of zwx toy", ""]
    ids, lengths = train_flow.read_captions(pipeline.tokenizer, texts)
    tokens = FAMILY.tokenize(pipeline, texts)
    assert torch.equal(tokens["ids"][:, :CAPTION_LENGTH], ids)
    with torch.no_grad():
        theirs = FAMILY.encode(pipeline, tokens).text
        ours = train_flow.read_states(pipeline.text_encoder, ids)
    assert theirs.keys() == {"states", "lengths"}
    assert torch.equal(theirs["lengths"], lengths)
    own = torch.arange(CAPTION_LENGTH) < lengths[:, None]
    assert torch.allclose(theirs["states"][own], ours[own], atol=1e-5)


def test_captions_that_are_too_long_count_as_empty(captions: list[str]) -> None:
    tokenizer = flow_networks.make_tokenizer(captions)
    ids, lengths = train_flow.read_captions(tokenizer, ["", "a red toy " * 20, "a toy"])
    assert torch.equal(ids[0], ids[1])
    assert lengths.tolist() == [8, 8, 10]


def test_words_of_captions_are_one_token_and_fit(captions: list[str]) -> None:
    tokenizer = flow_networks.make_tokenizer(captions)
    for caption in captions[:500]:
        assert len(tokenizer(caption).input_ids) == len(caption.replace(",", " ,").split())
    _, lengths = train_flow.read_captions(tokenizer, captions)
    assert (lengths == 8).float().mean() < 0.005  # too long


@pytest.mark.parametrize("text", ["zwx", "ünïcode", "漢字", "🐱", "o'clock 42!", "PHOTO"])
def test_any_text_can_be_spelled(captions: list[str], text: str) -> None:
    tokenizer = flow_networks.make_tokenizer(captions)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
