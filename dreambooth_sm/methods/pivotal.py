"""Pivotal tuning: a word is learned together with an adapter. The word finds the place of the subject in the model, and
the adapter changes the model around it (after Roich et al. 2021, "Pivotal Tuning for Latent-based Editing of Real
Images")."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dreambooth_sm.methods import lora, textual_inversion
from dreambooth_sm.planning.ladder import Rung

if TYPE_CHECKING:
    import torch

    from dreambooth_sm.adapters.learned_words import LearnedWords
    from dreambooth_sm.families import ModelFootprint
    from dreambooth_sm.hyperparameters import Hyperparameters
    from dreambooth_sm.models import PretrainedModel
    from dreambooth_sm.planning.plan import Plan


# Ends the name of the file that has adapter and words in it. diffusers refuses such files, so that it is not the
# adapter's own.
BUNDLED = "-bundled.safetensors"


class PivotalTuning:
    """Trains adapters beside layers of the denoiser, and the vectors of words before frozen text encoders."""

    name = "pivotal"
    trains = "adapters and embedding"
    title = "with an adapter and a word that were learned together"
    hub: Mapping[str, str] = MappingProxyType({"library_name": "diffusers", "base_model_relation": "adapter"})
    tags = ("lora", "textual_inversion", "pivotal-tuning")
    leaves_base = True
    trains_text_encoder = False  # what the word learns would be learned twice
    encodes_prompts = True
    has_live_base = False  # it knows no prompt with a learned word
    ladder = (
        #     name      GiB  weights    bits  keeps grads  checkpoints  text encoder  EMA
        Rung("roomy", 0, "master", 32, True, False, False, False, "adamw"),
        Rung("small", 0, "master", 32, True, True, False, False, "adamw"),
    )

    def trained_millions(self, footprint: ModelFootprint, h: Hyperparameters, text_encoder: bool) -> float:
        both = (lora.METHOD, textual_inversion.METHOD)
        return sum(method.trained_millions(footprint, h, text_encoder) for method in both)

    def activations(self, h: Hyperparameters) -> str:
        return lora.METHOD.activations(h)

    def attach(self, model: PretrainedModel, plan: Plan, h: Hyperparameters, seed: int) -> WordsAndAdapters:
        from dreambooth_sm.adapters.learned_words import LearnedWords

        words = LearnedWords.make(model, h.placeholders, h.num_vectors)
        adapters = lora.Adapters.of(words.model, plan, h, seed, base=model)
        return WordsAndAdapters(words, adapters, h.placeholder_factor)

    def usage(self, pipeline: str, base: str, prompt: str, hyperparameters: Mapping[str, Any]) -> str:
        variant, export = hyperparameters["lora_variant"], hyperparameters["export"]
        words = textual_inversion.words_of(hyperparameters)
        told = []
        if export == "merged":
            code = textual_inversion.drawing_code(pipeline, ".", prompt, words)
            told.append(f"In diffusers, base model and adapter as one, and the word:\n\n```python\n{code}\n```")
        elif variant in lora.DIFFUSERS_VARIANTS:
            load = ("pipeline.load_lora_weights('.')  # this directory",)
            code = textual_inversion.drawing_code(pipeline, base, prompt, words, load)
            told.append(f"In diffusers, both the adapter and the word:\n\n```python\n{code}\n```")
        if export != "merged" and variant in lora.FLAT_VARIANTS:
            called = ", ".join(f"`embedding:{word}`" for word in words)
            told.append(
                f"The file whose name ends with `{BUNDLED}` has both in it. In WebUI, it goes to `models/Lora`, and "
                "prompts call it by its name without the ending, `<lora:NAME:1>`, with the word as it is. In ComfyUI, "
                "it goes to `models/loras`, for the node Load LoRA, and the word's own file to `models/embeddings`, "
                f"which prompts call {called}."
            )
        if export == "both":
            told.append(
                "The directory is a whole model as well, of base model and adapter in one, which the word's own file "
                "goes with."
            )
        return "\n\n".join(told) or (
            f"`{lora.FILE}` is for PEFT; `dreambooth-sm convert` puts it into a base model, which the word's own file "
            "goes with."
        )


METHOD = PivotalTuning()


class WordsAndAdapters:
    """A model that reads some words more, and the adapters beside its layers.

    Args:
        adapters: in the model of ``words``, or one with the same denoiser.
        factor: of the learning rate, that the words are trained with.
    """

    def __init__(self, words: LearnedWords, adapters: lora.Adapters, factor: float) -> None:
        self._words, self._adapters, self._factor = words, adapters, factor

    @property
    def model(self) -> PretrainedModel:
        return self._words.model

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {**self._words.parameters, **self._adapters.parameters}

    @property
    def rates(self) -> dict[str, float]:
        return {**dict.fromkeys(self._words.parameters, self._factor), **self._adapters.rates}

    def load(self) -> None:
        self.model.load(*self.model.text_parts)
        self._adapters.load()

    def place(self, plan: Plan, device: torch.device) -> None:
        self._words.place(plan, device)
        self._adapters.place(plan, device)

    def watch(self, noise: torch.Tensor, times: torch.Tensor, count: int) -> None:
        """Is told the rows of a step, for the adapters."""
        self._adapters.watch(noise, times, count)

    def distance(self) -> torch.Tensor:
        """Of the adapters."""
        return self._adapters.distance()

    def drawable(self, dtype: torch.dtype) -> WordsAndAdapters:
        adapters, words = self._adapters.drawable(dtype), self._words.copy(dtype)
        words.model.put(self.model.family.facts.denoiser, adapters.model.denoiser)
        return WordsAndAdapters(words, adapters, self._factor)

    def export(self, directory: Path, h: Hyperparameters, dtype: torch.dtype | None) -> None:
        from dreambooth_sm.adapters.embedding_file import write_embedding
        from dreambooth_sm.adapters.kohya_file import write_kohya

        self._adapters.export(directory, h, dtype)
        words = {word: self._words.tensors(word) for word in self._words.names}
        for word, vectors in words.items():
            path = directory / f"{word}.safetensors"
            write_embedding(path, word, vectors, dtype=dtype, trigger=h.instance_prompt or word)
        if _bundles(h):
            path = directory / f"{h.model_name}{BUNDLED}"
            both = dataclasses.replace(self._adapters.adapter(), words=words)
            notes = {"modelspec.trigger_phrase": h.instance_prompt or ""}
            write_kohya(path, both, self.model.configs, dtype=dtype, notes=notes)

    def exported_values(self, h: Hyperparameters) -> int:
        words, adapters = (
            sum(parameter.numel() for parameter in trained.parameters.values())
            for trained in (self._words, self._adapters)
        )
        return self._adapters.exported_values(h) + words + (words + adapters if _bundles(h) else 0)


def _bundles(h: Hyperparameters) -> bool:
    return h.export != "merged" and h.lora_variant in lora.FLAT_VARIANTS
