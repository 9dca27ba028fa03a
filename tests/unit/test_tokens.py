"""Tokens are counted as the tokenizers of the models count them, without torch."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_sm import toybox
from dreambooth_sm.data.tokens import clip_vocabulary, find_vocabulary
from dreambooth_sm.stored.model import clip_tokenizer
from tests.helpers.tiny import byte_tokenizer

CLIP = clip_tokenizer("<|endoftext|>")
PROMPTS = [
    "photo of zwx toy",
    "a photo of sks dog, it's on the table, wearing 123 hats!!! (8k, masterpiece:1.2)",
    "黄色鸭子 on the beach, утка на столе, गुड़िया, 🦆🦆",
    "I'll don't they've we're I'm he'd o'clock 'sup",
    "<|startoftext|>a toy<|endoftext|>, <|endoftext|",
    "ΣΊΣΥΦΟΣ İstanbul ǅ ½ ² Ⅷ 一二三 ﬁ e\u0301",
    "trailing, , ,, blanks \t\n and\u3000wide\u00a0ones",
    "supercalifragilisticexpialidocious" * 5,
    "",
]


def counted(tokenizer: object, prompt: str) -> int:
    return len(tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids)  # type: ignore[operator]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_as_many_as_clips_tokenizer_makes(prompt: str) -> None:
    assert clip_vocabulary().count(prompt) == counted(CLIP, prompt)


letters = st.characters(categories=["L", "N", "P", "S", "Zs", "Mn"], max_codepoint=0x2FFF)


@given(st.text(st.one_of(letters, st.sampled_from("'strevmld <|>,.-!0")), max_size=60))
def test_as_many_for_any_text(prompt: str) -> None:
    assert clip_vocabulary().count(prompt) == counted(CLIP, prompt)


@given(st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"], max_codepoint=0x2FFF), max_size=40))
def test_models_with_a_tokenizer_of_their_own(prompt: str) -> None:
    from transformers import CLIPTokenizer

    toy = find_vocabulary(toybox.NAME)
    assert toy is not None
    assert toy.count(prompt) == counted(CLIPTokenizer.from_pretrained(toybox.BASE / "tokenizer"), prompt)
    assert toy.limit(75) == 30


def test_directories_in_either_layout(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "new" / "tokenizer")
    old = tmp_path / "old" / "tokenizer"
    old.mkdir(parents=True)
    merges = [" ".join(pair) for pair in clip_vocabulary().ranks]
    (old / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    (old / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    new, clip = (find_vocabulary(str(tmp_path / name)) for name in ("new", "old"))
    assert new is not None
    assert clip is not None
    for prompt in PROMPTS:
        assert new.count(prompt) == counted(tokenizer, prompt)
        assert clip.count(prompt) == counted(CLIP, prompt)
    (old / "tokenizer_config.json").write_text("[")
    assert find_vocabulary(str(tmp_path / "old")) is None
    assert find_vocabulary("stable-diffusion-v1-5/stable-diffusion-v1-5") is clip_vocabulary()
