"""Texts without the escapes and quotes that they were given on the way."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping


def unescape_prompt(text: str) -> str:
    """A prompt as the tokenizer should see it: escaped blanks are blanks, and runs of blanks are one.

    >>> unescape_prompt(r"photo\\ of\\ zwx\\  toy")
    'photo of zwx toy'
    """
    return " ".join(re.sub(r"(?<!\\)\\++(?=\s|$)", " ", text).split())


def texts(value: object) -> Iterator[str]:
    """The texts that a decoded value consists of."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from texts(part)


def is_text(text: str) -> bool:
    """Whether tokenizers, paths and log files can take a text: no NUL, no half of a surrogate pair."""
    return not re.search("[\0\ud800-\udfff]", text)


def unquote(text: str) -> str:
    """Undoes JSON encoding, as often as it was applied. Quotes around parts of a text are the text's own."""
    text = text.strip()
    while len(text) >= 2 and text[0] == text[-1] == '"':
        try:
            inner = json.loads(text, strict=False)
        except json.JSONDecodeError:
            inner = text[1:-1]  # an escaped blank is not a JSON escape
            if re.search(r'(?<!\\)"', inner):
                break
        text = inner.strip()
    return text
