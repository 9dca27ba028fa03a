"""Prompts as token ids and embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dreambooth_sm.data.prompts import TAG_ORDERS, encode, tag_orders, tokenize
from dreambooth_sm.data.training_set import PromptTable
from dreambooth_sm.errors import UserError
from dreambooth_sm.models import PretrainedModel
from tests.helpers.tiny import byte_tokenizer

PROMPT = "photo of zwx toy"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def count(tokenizer: Any, prompt: str) -> int:
    return len(tokenizer(prompt, add_special_tokens=False).input_ids)


def test_a_short_prompt_is_what_diffusers_own_call_gives(tokenizer: Any) -> None:
    prompts = [PROMPT, "", "a photo of the cat on the dog"]
    ours = tokenize(tokenizer, prompts)
    theirs = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours, theirs[:, None])


def test_unpadded_prompts_are_as_long_as_the_longest(tokenizer: Any) -> None:
    prompts = [PROMPT, "a cat"]
    ours = tokenize(tokenizer, prompts, pad=False)
    theirs = tokenizer(prompts, padding="longest", return_tensors="pt").input_ids
    assert torch.equal(ours, theirs[:, None])
    assert ours.shape[2] == count(tokenizer, PROMPT) + 2


def test_a_long_prompt_is_cut_into_chunks_each_with_its_marks(tokenizer: Any) -> None:
    prompt = "photo of zwx toy, " * 12
    words = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    assert 75 < len(words) <= 150
    rows = tokenize(tokenizer, [prompt, PROMPT], max_tokens=150)
    assert rows.shape == (2, 2, 77)
    start, end, filler = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rest = words[75:]
    assert rows[0].tolist() == [
        [start, *words[:75], end],
        [start, *rest, end, *[filler] * (75 - len(rest))],
    ]
    assert rows[1, 1].tolist() == [start, end, *[filler] * 75]


def test_chunks_are_encoded_one_by_one_and_put_in_a_row(base: PretrainedModel) -> None:
    ids = tokenize(base.tokenizer, ["photo of zwx toy, " * 12, PROMPT], max_tokens=150)
    whole = encode(base.text_encoder, ids)
    by_hand = torch.stack(
        [torch.cat([base.text_encoder(chunk[None]).last_hidden_state[0] for chunk in prompt]) for prompt in ids]
    )
    assert whole.shape == (2, 154, 32)
    torch.testing.assert_close(whole, by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("limit", "words"), [(75, 76), (150, 151), (225, 226)])
def test_too_long_a_prompt_is_the_users_to_shorten(tokenizer: Any, limit: int, words: int) -> None:
    fits = " ".join(["toy"] * (words - 1))
    assert count(tokenizer, fits) == words - 1
    assert tokenize(tokenizer, [fits], max_tokens=limit).shape == (1, limit // 75, 77)
    with pytest.raises(UserError) as caught:
        tokenize(tokenizer, [fits + " toy", PROMPT, fits + " cat"], max_tokens=limit)
    assert len(caught.value.problems) == 2
    assert all(f"has {words} tokens" in line and f"allows {limit}" in line for line in caught.value.problems)


def test_every_language_can_be_spelled(tokenizer: Any) -> None:
    prompts = ["фото zwx игрушки", "ズウクス", "zwx 🦆", "café"]
    rows = tokenize(tokenizer, prompts, max_tokens=75)
    unknown = tokenizer.unk_token_id
    assert all(unknown not in row[1 : row.index(tokenizer.eos_token_id)] for row in rows[:, 0].tolist())
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in rows[:, 0]] == prompts


def test_tags_are_shuffled_whole_and_the_same_for_one_seed() -> None:
    orders = tag_orders("zwx toy, on a table , red,, best quality", seed=3)
    assert len(orders) == TAG_ORDERS
    assert orders[0] == "zwx toy, on a table , red,, best quality"
    assert {tuple(sorted(order.split(", "))) for order in orders[1:]} == {
        ("best quality", "on a table", "red", "zwx toy")
    }
    assert len(set(orders)) > TAG_ORDERS // 2
    assert tag_orders(orders[0], seed=3) == orders
    assert tag_orders(orders[0], seed=4) != orders


@pytest.mark.parametrize("prompt", [PROMPT, "zwx toy,", ", ,", ""])
def test_nothing_to_shuffle(prompt: str) -> None:
    assert tag_orders(prompt, seed=0) == [prompt]


def test_the_prompt_table_holds_each_text_once(base: PretrainedModel) -> None:
    table = PromptTable(base.family, max_tokens=75, pad=True, shuffle=False, seed=0)
    assert [table.rows(prompt) for prompt in (PROMPT, "a toy", PROMPT)] == [(0,), (1,), (0,)]
    expected = base.text_encoder(tokenize(base.tokenizer, [PROMPT, "a toy"])[:, 0]).last_hidden_state
    torch.testing.assert_close(table.embeddings(base).text["states"], expected.detach(), rtol=0, atol=0)
    assert not table.embeddings(base).text["states"].requires_grad


def test_the_prompt_table_with_shuffled_tags(base: PretrainedModel) -> None:
    table = PromptTable(base.family, max_tokens=75, pad=True, shuffle=True, seed=0)
    rows = table.rows("zwx, red, small, new")
    assert len(rows) == TAG_ORDERS
    ids = table.tokens(base)["ids"]
    assert len(ids) == len(set(rows)) == len({tuple(row) for row in ids[:, 0].tolist()})
