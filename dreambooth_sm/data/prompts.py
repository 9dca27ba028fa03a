"""Prompts as token ids and embeddings, also those that are longer than the text encoder's window."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from dreambooth_sm.data.tokens import too_long
from dreambooth_sm.errors import UserError

# Orders of a prompt's tags that are kept for `shuffle_tags`.
TAG_ORDERS = 16


def tokenize(tokenizer: Any, prompts: list[str], *, max_tokens: int | None = 75, pad: bool = True) -> torch.Tensor:
    """Token ids in chunks that the text encoder can take.

    Args:
        max_tokens: longest prompt, in tokens without the start and end marks; a multiple of 75. None for no limit.
        pad: pad to the text encoder's full length; otherwise to the longest prompt.

    Returns:
        int64 ``(prompts, chunks, length)``; every chunk begins with the start mark and ends with the end mark.

    Raises:
        UserError: for prompts of more than ``max_tokens`` tokens.
    """
    return tokenize_for([tokenizer], prompts, max_tokens=max_tokens, pad=pad)[0]


def tokenize_for(
    tokenizers: Sequence[Any], prompts: list[str], *, max_tokens: int | None = 75, pad: bool = True
) -> list[torch.Tensor]:
    """:func:`tokenize` for text encoders whose states lie side by side: as many chunks, of the same length, for each,
    although their tokenizers may count differently."""
    words = [
        [tokenizer(p, add_special_tokens=False, truncation=False, verbose=False).input_ids for p in prompts]
        for tokenizer in tokenizers
    ]
    window = tokenizers[0].model_max_length - 2
    longest = [max(map(len, each)) for each in zip(*words, strict=True)]
    if max_tokens is not None:
        limit = max_tokens // 75 * window
        problems = {
            too_long(f"the prompt {prompt!r}", length, max_tokens, limit)
            for prompt, length in zip(prompts, longest, strict=True)
            if length > limit
        }
        if problems:
            raise UserError(sorted(problems))
    chunks = max(1, -(-max(longest) // window))
    length = window if pad or chunks > 1 else max(longest)
    return [
        _in_chunks(tokenizer, ids, chunks, window, length) for tokenizer, ids in zip(tokenizers, words, strict=True)
    ]


def _in_chunks(tokenizer: Any, words: list[list[int]], chunks: int, window: int, length: int) -> torch.Tensor:
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    rows = torch.full((len(words), chunks, length + 2), filler, dtype=torch.int64)
    for row, ids in zip(rows, words, strict=True):
        for number, chunk in enumerate(row):
            part = ids[number * window : (number + 1) * window]
            chunk[: len(part) + 2] = torch.tensor([start, *part, end])
    return rows


def encode(text_encoder: Any, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states of chunked token ids.

    Args:
        ids: ``(prompts, chunks, length)`` as :func:`tokenize` makes them, on the text encoder's device.

    Returns:
        ``(prompts, chunks * length, width)`` in the text encoder's dtype.
    """
    prompts, chunks, length = ids.shape
    hidden = text_encoder(ids.reshape(prompts * chunks, length))[0]
    return hidden.reshape(prompts, chunks * length, -1)


def encode_two(text_encoders: Sequence[Any], ids: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The states before the last layer of two text encoders, side by side, and the second one's projected state of the
    whole prompt; of the first chunk where there are several.

    Args:
        ids: of each encoder, as :func:`encode` takes them.

    Returns:
        ``(prompts, chunks * length, width of both)`` and ``(prompts, width)``.
    """
    prompts, chunks, length = ids[0].shape
    outputs = [
        encoder(rows.reshape(prompts * chunks, length), output_hidden_states=True)
        for encoder, rows in zip(text_encoders, ids, strict=True)
    ]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    pooled = outputs[1].text_embeds.reshape(prompts, chunks, -1)[:, 0]
    return states.reshape(prompts, chunks * length, -1), pooled


def tag_orders(prompt: str, seed: int) -> list[str]:
    """The prompt with its comma-separated tags in ``TAG_ORDERS`` random orders, itself first."""
    tags = [tag.strip() for tag in prompt.split(",") if tag.strip()]
    if len(tags) < 2:
        return [prompt]
    shuffle = random.Random(f"{seed} {prompt}")
    return [prompt] + [", ".join(shuffle.sample(tags, len(tags))) for _ in range(TAG_ORDERS - 1)]
