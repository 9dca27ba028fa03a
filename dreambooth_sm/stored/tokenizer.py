"""Tokenizers as files that transformers 4 reads as well as 5."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

# Of a token that was added to a vocabulary, what its configuration says.
_ADDED_TOKEN = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
# What transformers 5 writes about how it loaded a tokenizer.
_LOADING = ("is_local", "local_files_only")


def write_tokenizer(tokenizer: CLIPTokenizer, directory: Path) -> None:
    """Writes a tokenizer that transformers 4 reads as well: it wants the vocabulary and the merges as files of their
    own, and tokens that were added in the configuration."""
    tokenizer.save_pretrained(directory)
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
