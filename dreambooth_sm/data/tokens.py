"""Counts the tokens of a prompt, before a base model is downloaded. No torch.

CLIP's tokenizer (Radford et al. 2021) as far as counting needs it. The job itself encodes with the model's own.
"""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

from dreambooth_sm import toybox

_SPECIAL = re.compile(r"<\|startoftext\|>|<\|endoftext\|>")
_ENDINGS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d")
# Tokens that the hyperparameter `max_token_length` counts a window as.
_WINDOW = 75


@dataclass(frozen=True)
class Vocabulary:
    """The pairs that a tokenizer puts together, in this order, and how many tokens its text encoder takes at a time.

    Attributes:
        ranks: pairs of parts of a word, by their place among the merges.
        window: tokens without the start and end marks.
    """

    ranks: Mapping[tuple[str, str], int]
    window: int = _WINDOW
    _counts: dict[str, int] = field(default_factory=dict, compare=False)

    def limit(self, max_token_length: int) -> int:
        """The longest prompt in tokens; see the hyperparameter."""
        return max_token_length // _WINDOW * self.window

    def count(self, prompt: str) -> int:
        """The tokens of a prompt, without start and end marks."""
        total = 0
        for word in _words(prompt):
            if word not in self._counts:
                self._counts[word] = 1 if _SPECIAL.fullmatch(word) else self._pieces(word)
            total += self._counts[word]
        return total

    def _pieces(self, word: str) -> int:
        parts = [_BYTES[byte] for byte in word.encode("utf-8", "replace")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            merged: list[str] = []
            place = 0
            while place < len(parts):
                together = tuple(parts[place : place + 2]) == best
                merged.append("".join(parts[place : place + 1 + together]))
                place += 1 + together
            parts = merged
        return len(parts)


def find_vocabulary(base: str) -> Vocabulary | None:
    """The vocabulary that prompts for a base model are encoded with.

    Args:
        base: a model that comes with us, a diffusers directory, or whatever else, which has CLIP's.

    Returns:
        None where a directory's own can't be read.
    """
    directory = toybox.SHIPPED.get(base, Path(base))
    try:
        return _read(directory / "tokenizer") if (directory / "tokenizer").is_dir() else clip_vocabulary()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def too_long(what: str, tokens: int, max_token_length: int, limit: int) -> str:
    """Says that a prompt has more tokens than the hyperparameters allow."""
    return (
        f"{what} has {tokens} tokens and max_token_length={max_token_length} allows {limit}; shorten it or set "
        "max_token_length to 150 or 225"
    )


@lru_cache(maxsize=1)
def clip_vocabulary() -> Vocabulary:
    """CLIP's own."""
    content = gzip.decompress(files("dreambooth_sm.stored").joinpath("clip_merges.txt.gz").read_bytes())
    return Vocabulary(_ranks(content.decode().splitlines()))


def _read(directory: Path) -> Vocabulary:
    path = directory / "merges.txt"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        merges: Sequence[str | Sequence[str]] = lines[1:] if lines and lines[0].startswith("#version") else lines
    else:
        merges = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8-sig"))
    length = config.get("model_max_length", _WINDOW + 2)
    # The tokenizers of some models name no length, which Hugging Face writes as 10^30.
    return Vocabulary(_ranks(merges), int(length) - 2 if 2 < length < 10**6 else _WINDOW)


def _ranks(merges: Sequence[str | Sequence[str]]) -> dict[tuple[str, str], int]:
    pairs = (merge.split() if isinstance(merge, str) else merge for merge in merges)
    return {(pair[0], pair[1]): rank for rank, pair in enumerate(pair for pair in pairs if len(pair) == 2)}


def _words(prompt: str) -> Iterator[str]:
    """Splits into what is encoded one by one: marks, endings, runs of letters, digits, and runs of anything else."""
    place = 0
    for mark in _SPECIAL.finditer(prompt):
        yield from _plain_words(prompt[place : mark.start()])
        yield mark[0]
        place = mark.end()
    yield from _plain_words(prompt[place:])


def _plain_words(prompt: str) -> Iterator[str]:
    text = "".join(character.lower() for character in unicodedata.normalize("NFC", prompt))
    kinds = [_kind(character) for character in text]
    place = 0
    while place < len(text):
        kind, start = kinds[place], place
        ending = _ENDINGS.match(text, place)
        if kind == "blank":
            place += 1
            continue
        if ending:
            place = ending.end()
        elif kind == "number":
            place += 1
        else:
            while place < len(text) and kinds[place] == kind:
                place += 1
        yield text[start:place]


def _kind(character: str) -> str:
    if character.isspace():
        return "blank"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "other")


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a vocabulary (GPT-2's table): itself where it can be printed."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + hidden.index(byte)) for byte in range(256)]


_BYTES = _byte_characters()
