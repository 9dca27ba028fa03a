"""Words that a model is taught: vectors of their own beside the text encoders' tables, which stay as they are (Gal et
al. 2022, "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion")."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth_sm.errors import UserError
from dreambooth_sm.knobs.textual_inversion import split_at
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.plan import Plan

Vectors = dict[str, dict[str, nn.Parameter]]


class LearnedWords:
    """A model that knows some words more than its base model, and what they mean to it.

    Each word stands for as many tokens as it has vectors. To the tokenizers their ids are -1, -2, ...: below all
    others, as text encoders may look for the end of a prompt at its largest id.

    Args:
        base: stays as it is; the model shares its weights.
        vectors: ``(vectors, width)`` of each word, by text encoder and word; all text encoders have the same words in
            the same order.

    Attributes:
        model: reads prompts with these words as it reads others, and draws with them.
    """

    def __init__(self, base: PretrainedModel, vectors: Vectors) -> None:
        self._vectors = vectors
        self.model = base.with_frames(*vectors)
        for part, of_words in vectors.items():
            table = getattr(self.model, part).get_input_embeddings()
            table.forward = functools.partial(_look_up, table, list(of_words.values()))
            name = part.replace("text_encoder", "tokenizer")
            counts = {word: len(its) for word, its in of_words.items()}
            setattr(self.model, name, ExtendedTokenizer(getattr(base, name), counts))

    @classmethod
    def make(cls, base: PretrainedModel, initial: Mapping[str, str | None], count: int) -> LearnedWords:
        """New words.

        Args:
            initial: to each word the text whose tokens' vectors its own start from, again and again where they are
                fewer; None: its own letters.
            count: vectors of each word.

        Raises:
            UserError: where a text has more tokens than the word has vectors.
        """
        vectors: Vectors = {}
        problems: dict[str, None] = {}
        for part in base.text_parts:
            tokenizer = getattr(base, part.replace("text_encoder", "tokenizer"))
            vectors[part] = {}
            for word, text in initial.items():
                ids = tokenizer(text or word, add_special_tokens=False).input_ids
                if text and len(ids) > count:
                    problems[
                        f"initial_text: {text!r} has {len(ids)} tokens, and {word!r} has num_vectors={count}; set "
                        f"num_vectors={len(ids)}, or initial_text to a shorter word"
                    ] = None
                rows = _rows(base, part, list(islice(cycle(ids), count)))
                vectors[part][word] = nn.Parameter(rows, requires_grad=False)
        if problems:
            raise UserError(problems)
        return cls(base, vectors)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{part}.{word}": its for part, of_words in self._vectors.items() for word, its in of_words.items()}

    def place(self, plan: Plan, device: torch.device) -> None:
        """Puts text encoders and vectors on the device; the vectors get gradients. May be called again."""
        from dreambooth_sm.training.placement import place
        from dreambooth_sm.training.precision import weights_dtype

        for part in self._vectors:
            place(getattr(self.model, part), plan, device, trained=False)
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(device, weights_dtype(plan))
            parameter.requires_grad_(True)

    def copy(self, dtype: torch.dtype) -> LearnedWords:
        """The same words with vectors of their own, in ``dtype``, before the same weights."""
        copies = {
            part: {word: nn.Parameter(its.detach().to(dtype, copy=True), False) for word, its in of_words.items()}
            for part, of_words in self._vectors.items()
        }
        names = [name.replace("text_encoder", "tokenizer") for name in copies]
        plain = self.model.with_parts({})
        for name in names:
            setattr(plain, name, getattr(self.model, name).plain)
        return LearnedWords(plain, copies)

    @property
    def names(self) -> tuple[str, ...]:
        """The words."""
        return tuple(next(iter(self._vectors.values())))

    def tensors(self, word: str) -> dict[str, Tensor]:
        """What a word means to each text encoder, ``(vectors, width)``."""
        return {part: of_words[word].detach() for part, of_words in self._vectors.items()}


def _look_up(table: nn.Embedding, vectors: Sequence[Tensor], ids: Tensor) -> Tensor:
    """The vectors of tokens; those of ids below 0 are learned."""
    rows = F.embedding(ids.clamp(min=0), table.weight)
    learned = F.embedding((-1 - ids).clamp(min=0), torch.cat(list(vectors)).to(rows))
    return torch.where((ids < 0)[..., None], learned, rows)


def _rows(model: PretrainedModel, part: str, ids: Sequence[int]) -> Tensor:
    """Rows of a text encoder's table, float32; nothing else of it is read."""
    (table,) = (stored for name, stored in model.weights(part).items() if name.endswith("token_embedding.weight"))
    width = table.shape[1]
    return torch.stack([table.piece(row * width, (row + 1) * width).float() for row in ids])


class ExtendedTokenizer:
    """A tokenizer that knows some words more.

    Args:
        plain: the tokenizer without them; all else is asked of it.
        counts: tokens of each word.
    """

    def __init__(self, plain: Any, counts: Mapping[str, int]) -> None:
        self.plain = plain
        self._ids: dict[str, list[int]] = {}
        first = -1
        for word, count in counts.items():
            self._ids[word] = list(range(first, first - count, -1))
            first -= count

    def __call__(self, prompt: str, **options: Any) -> SimpleNamespace:
        """The ids of a prompt; without special tokens, which have no place between its pieces."""
        ids: list[int] = []
        for number, piece in enumerate(split_at(prompt, list(self._ids))):
            ids += self._ids[piece] if number % 2 else self.plain(piece, **options).input_ids
        return SimpleNamespace(input_ids=ids)

    def __getattr__(self, name: str) -> Any:
        if name == "plain":  # not there yet, while this is copied
            raise AttributeError(name)
        return getattr(self.plain, name)
