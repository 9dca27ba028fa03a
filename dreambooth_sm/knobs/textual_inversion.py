"""Knobs for the words that a textual inversion learns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated

from annotated_types import Ge, Le

from dreambooth_sm.knobs.declare import knob, rule
from dreambooth_sm.knobs.lora import PIVOTAL
from dreambooth_sm.knobs.messages import short
from dreambooth_sm.knobs.pictures import FILEWORDS
from dreambooth_sm.knobs.prior import PriorKnobs
from dreambooth_sm.knobs.training import TrainingKnobs

TEXTUAL_INVERSION = "textual_inversion"
# Those that learn words.
_METHODS = (TEXTUAL_INVERSION, PIVOTAL)
# What names a file everywhere, and is a word to every program that draws.
_WORD = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_ARTICLES = frozenset({"a", "an", "the"})


class TextualInversionKnobs(TrainingKnobs, PriorKnobs):
    """The words, and what they start from."""

    group = "Textual inversion"

    placeholder_token: str | None = knob(
        None,
        "The word of the instance prompt that is learned: zwx. None: the only one that the class prompt does not have.",
        methods=_METHODS,
    )
    num_vectors: Annotated[int, Ge(1), Le(32)] = knob(
        1,
        "Vectors of a learned word, for each text encoder; it takes as many tokens of a prompt.",
        methods=_METHODS,
    )
    initial_text: str | None = knob(
        None,
        "Words whose vectors the learned ones start from, again and again where they are fewer. None: the last word of "
        "the class prompt, or else what the text encoder makes of the learned word's letters.",
        text=True,
        methods=_METHODS,
    )

    @property
    def placeholders(self) -> dict[str, str | None]:
        """The words that are learned, and what each starts from: its own letters for None. Empty with methods that
        learn none."""
        if self.method not in _METHODS:
            return {}
        found = {}
        for prompt, class_prompt in self._prompts():
            if word := self._placeholder(prompt, class_prompt):
                found[word] = self.initial_text or _last_word(class_prompt)
        return found

    def _prompts(self) -> list[tuple[str, str]]:
        """The instance prompt and the class prompt of each subject."""
        given = [(concept.instance_prompt, concept.class_prompt) for concept in self.inline_concepts] or [(None, None)]
        return [(one or self.instance_prompt or "", other or self.class_prompt or "") for one, other in given]

    def _placeholder(self, prompt: str, class_prompt: str) -> str | None:
        """The word of a subject; None where it can't be told."""
        if self.placeholder_token is not None:
            return self.placeholder_token.lower()
        own = set(_words(prompt)) - set(_words(class_prompt)) - _ARTICLES
        return own.pop() if class_prompt and len(own) == 1 else None

    @rule("method", "placeholder_token", "instance_prompt", "class_prompt", "concepts_list")
    def _learned_word_can_be_told(self) -> Iterator[str]:
        if self.method not in _METHODS or isinstance(self.concepts_list, str):
            return
        for prompt, class_prompt in dict.fromkeys(self._prompts()):
            word = self._placeholder(prompt, class_prompt)
            asked = "" if self.placeholder_token is None else f"={short(self.placeholder_token)}"
            if not prompt:
                continue
            if word is None:
                yield (
                    f"placeholder_token: which word of {short(prompt)} is to be learned can't be told; set it to that "
                    "word, such as zwx"
                )
            elif not _WORD.fullmatch(word):
                yield (
                    f"placeholder_token{asked}: {short(word)} names a file, and has to be letters of the English "
                    "alphabet, digits, - and _; take another word, such as zwx"
                )
            elif FILEWORDS not in prompt and not mentions(prompt, [word]):
                yield (
                    f"placeholder_token{asked}: {short(word)} is no word of {short(prompt)}; put it into "
                    "instance_prompt"
                )
            elif mentions(class_prompt, [word]):
                yield (
                    f"placeholder_token{asked}: {short(word)} is a word of the class prompt {short(class_prompt)} as "
                    "well; take a rare one, such as zwx"
                )

    @rule("method", "caption_dropout")
    def _words_are_learned_from_prompts(self) -> Iterator[str]:
        if self.method == TEXTUAL_INVERSION and self.caption_dropout:
            yield (
                f"caption_dropout={self.caption_dropout:g}: method={self.method} learns nothing from pictures without "
                "their prompt; leave it out"
            )


def split_at(prompt: str, words: Sequence[str]) -> list[str]:
    """The prompt in pieces; every second one is one of ``words``, in lower case.

    >>> split_at("Photo of ZWX, on a table", ["zwx"])
    ['Photo of ', 'zwx', ', on a table']
    """
    if not words:
        return [prompt]
    longest_first = sorted(words, key=len, reverse=True)
    pieces = re.split(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)", prompt, flags=re.IGNORECASE)
    return [piece.lower() if number % 2 else piece for number, piece in enumerate(pieces)]


def mentions(prompt: str, words: Sequence[str]) -> bool:
    """Whether one of the words is in the prompt."""
    return len(split_at(prompt, words)) > 1


def _words(prompt: str) -> list[str]:
    return re.findall(r"\w[\w-]*", prompt.replace(FILEWORDS, " ").lower())


def _last_word(prompt: str) -> str | None:
    words = _words(prompt)
    return words[-1] if words else None
