"""CLIP tokenizers: made from merges, and written as files that transformers 4 reads as well as 5."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedTokenizerBase

# Of a token that was added to a vocabulary, what its configuration says.
_ADDED_TOKEN = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
# What transformers 5 writes about how it loaded a tokenizer.
_LOADING = ("is_local", "local_files_only")


def bpe_tokenizer(merges: Sequence[str], length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer that knows all bytes, and what ``merges`` make of them.

    Args:
        merges: pairs of tokens with a space between, such as ``"ca t</w>"``; earlier ones go first.
        length: the longest prompt in tokens, with the start and end marks.
    """
    from dreambooth_sm.stored.classes import CLIPTokenizer

    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary_file.write_text(json.dumps({token: row for row, token in enumerate(vocabulary)}))
        merges_file.write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        return CLIPTokenizer(vocab=str(vocabulary_file), merges=str(merges_file), model_max_length=length)


def byte_letters() -> list[str]:
    """One printable letter for each byte, as GPT-2's byte-level BPE assigns them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return [chr(byte) for byte in printable] + [chr(256 + number) for number, _ in enumerate(others)]


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes a tokenizer. CLIP's is one that transformers 4 reads as well: it wants the vocabulary and the merges as
    files of their own, and tokens that were added in the configuration."""
    from dreambooth_sm.stored.classes import CLIPTokenizer

    tokenizer.save_pretrained(directory)
    if not isinstance(tokenizer, CLIPTokenizer):
        return
    tokenizer.backend_tokenizer.model.save(str(directory))
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    added = {str(number): {name: getattr(token, name) for name in _ADDED_TOKEN} for number, token in _added(tokenizer)}
    write_json(path, {key: config[key] for key in config if key not in _LOADING} | {"added_tokens_decoder": added})
    write_json(directory / "special_tokens_map.json", tokenizer.special_tokens_map)
    vocabulary = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    if own := {token.content: number for number, token in _added(tokenizer) if token.content not in vocabulary}:
        write_json(directory / "added_tokens.json", own)


def _added(tokenizer: CLIPTokenizer) -> list[tuple[int, Any]]:
    return sorted(tokenizer.added_tokens_decoder.items())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a configuration, as people read it."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
