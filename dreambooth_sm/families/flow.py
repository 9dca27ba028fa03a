"""What families share that match flows and read prompts with a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dreambooth_sm.families.family import LossKnobs

if TYPE_CHECKING:
    from torch import Tensor

# The longest prompt with its template, as the pipelines read it.
WINDOW = 512
_FROZEN = "its text encoder is a language model, which stays as it is"
_NO_SCHEDULE = "it is trained by flow matching, which has no such schedule of noise"
# How the shift of times grows with the words of a picture, of schedules that say nothing else (Esser et al. 2024,
# "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis").
_SHIFTS = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
# What transformers that match flows take of hyperparameters, and why nothing else.
TAKES: Mapping[str, tuple[tuple[object, ...], str]] = {
    "train_text_encoder": (("auto", False), _FROZEN),
    "text_encoder_lr": ((None,), _FROZEN),
    "max_token_length": ((75,), f"it reads prompts of up to {WINDOW} tokens at once"),
    "pad_tokens": ((True,), "how prompts are filled up is the model's own"),
    "prediction_type": (("auto",), _NO_SCHEDULE),
    "snr_gamma": ((None,), _NO_SCHEDULE),
    "debiased_loss": ((False,), _NO_SCHEDULE),
    "use_ema_weights": ((False,), "it comes as a directory, without an average"),
    "pretrained_vae_name_or_path": ((None,), "its latents are those of its own VAE"),
    "attention": (("auto", "default", "flash_attention"), "xformers does not know its rotary positions"),
    "lora_variant": (("lora",), "programs that draw with it read LoRA alone"),
    "lora_targets": (("attention", "linear"), "it has no convolutions"),
    "bucket_step": ((64,), "sides are multiples of 16"),
}


def read_prompts(
    tokenizer: Any, prompts: Sequence[str], title: str, *, thinking: bool, max_tokens: int | None
) -> dict[str, Tensor]:
    """Puts prompts into the chat template; all are filled up to the pipelines' length.

    Args:
        title: of the family.
        thinking: what the template is told of it.
        max_tokens: None cuts longer ones off, as the pipelines do; otherwise they are refused.

    Returns:
        ``ids``, int64 ``(rows, 512)``, and ``mask``, bool, of those that are the prompt's.

    Raises:
        UserError: for prompts that are too long.
    """
    texts = [_in_template(tokenizer, prompt, thinking) for prompt in prompts]
    return read_texts(tokenizer, prompts, texts, title, max_tokens=max_tokens)


def read_texts(
    tokenizer: Any,
    prompts: Sequence[str],
    texts: Sequence[str],
    title: str,
    *,
    before: int = 0,
    window: int = WINDOW,
    max_tokens: int | None,
) -> dict[str, Tensor]:
    """Reads what was made of prompts, as :func:`read_prompts` does.

    Args:
        texts: the prompts in their template.
        before: tokens of the template that are not among those of the window.
        window: tokens that are read.
    """
    from dreambooth_sm.errors import UserError

    if max_tokens is not None:
        counts = [len(ids) - before for ids in tokenizer(list(texts), verbose=False).input_ids]
        problems = {
            f"the prompt {prompt!r} has {count} tokens with its template, and {title} reads {window}; shorten it"
            for prompt, count in zip(prompts, counts, strict=True)
            if count > window
        }
        if problems:
            raise UserError(sorted(problems))
    length = window + before
    read = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt", verbose=False
    )
    return {"ids": read.input_ids, "mask": read.attention_mask.bool()}


def _in_template(tokenizer: Any, prompt: str, thinking: bool) -> str:
    said = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(
        said, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    return text


def chosen_shift(h: LossKnobs, config: Mapping[str, Any], by_size: float) -> float:
    """The shift of times that is trained with.

    Args:
        config: of the model's scheduler.
        by_size: of pictures of the job's resolution.
    """
    if isinstance(h.time_shift, float | int):
        return h.time_shift
    own = by_size if config.get("use_dynamic_shifting") else float(config["shift"])
    return {"auto": own, "resolution": by_size}[h.time_shift]


def shift_by_words(config: Mapping[str, Any], words: int) -> float:
    """The logarithm of the shift of times of pictures of so many words, as a scheduler's configuration says it."""
    least, most, low, high = (float(config.get(name, usual)) for name, usual in _SHIFTS.items())
    slope = (high - low) / (most - least)
    return words * slope + (low - slope * least)


def reader_problems(tokenizer: Any, encoder: Any) -> list[str]:
    """What keeps a tokenizer and a language model, by its configuration, from reading prompts."""
    problems = []
    if not tokenizer.chat_template:
        problems.append("its tokenizer has no chat template, which prompts are put into; copy the directory again")
    return problems + vocabulary_problems(tokenizer, encoder)


def vocabulary_problems(tokenizer: Any, encoder: Any) -> list[str]:
    """What keeps a language model, by its configuration, from taking what a tokenizer makes."""
    if len(tokenizer) <= encoder.vocab_size:
        return []
    return [f"the tokenizer has {len(tokenizer)} tokens and the text encoder {encoder.vocab_size}"]
