"""Textual inversion (Gal et al. 2022, "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual
Inversion"): a new word is learned, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dreambooth_sm.planning.ladder import Rung

if TYPE_CHECKING:
    import torch

    from dreambooth_sm.adapters.learned_words import LearnedWords
    from dreambooth_sm.families import ModelFootprint
    from dreambooth_sm.hyperparameters import Hyperparameters
    from dreambooth_sm.models import PretrainedModel
    from dreambooth_sm.planning.plan import Plan


class TextualInversion:
    """Trains the vectors of words before frozen text encoders."""

    name = "textual_inversion"
    trains = "embedding"
    title = "with a word that was learned by textual inversion"
    hub: Mapping[str, str] = MappingProxyType({"library_name": "diffusers", "base_model_relation": "adapter"})
    tags = ("textual_inversion",)
    leaves_base = True
    trains_text_encoder = False
    encodes_prompts = True
    has_live_base = False  # of class prompts, which have no learned word, it is the model itself
    ladder = (
        #     name      GiB  weights    bits  keeps grads  checkpoints  text encoder  EMA
        Rung("roomy", 0, "master", 32, True, False, False, False, "adamw"),
        Rung("small", 0, "master", 32, True, True, False, False, "adamw"),
    )

    def trained_millions(self, footprint: ModelFootprint, h: Hyperparameters, text_encoder: bool) -> float:
        return 1e-6 * footprint.text_width * h.num_vectors * max(1, len(h.placeholders))

    def activations(self, h: Hyperparameters) -> str:
        return "frozen_"

    def attach(self, model: PretrainedModel, plan: Plan, h: Hyperparameters, seed: int) -> Embeddings:
        from dreambooth_sm.adapters.learned_words import LearnedWords

        return Embeddings(LearnedWords.make(model, h.placeholders, h.num_vectors))

    def usage(self, pipeline: str, base: str, prompt: str, hyperparameters: Mapping[str, Any]) -> str:
        words = words_of(hyperparameters)
        code = drawing_code(pipeline, base, prompt, words)
        called = ", ".join(f"`embedding:{word}`" for word in words)
        return f"""In diffusers:

```python
{code}
```

In WebUI, the file goes to `embeddings`, and prompts call it by its name without the ending, as those above do. In
ComfyUI, it goes to `models/embeddings`, and prompts call it {called}."""


METHOD = TextualInversion()


def words_of(hyperparameters: Mapping[str, Any]) -> tuple[str, ...]:
    """The words that a job learns.

    Args:
        hyperparameters: by name.
    """
    from dreambooth_sm.hyperparameters import Hyperparameters

    return tuple(Hyperparameters.model_validate(dict(hyperparameters)).placeholders)


def drawing_code(pipeline: str, base: str, prompt: str, words: Sequence[str], load: Sequence[str] = ()) -> str:
    """Lines of Python that draw with the files of words, in diffusers.

    Args:
        pipeline, base, prompt: see :meth:`dreambooth_sm.methods.Method.usage`.
        load: lines that load what else there is.
    """
    from dreambooth_sm.adapters.embedding_file import KEYS
    from dreambooth_sm.families import FAMILIES

    (parts,) = (family.facts.parts for family in FAMILIES.values() if family.facts.pipeline == pipeline)
    encoders = [part for part in parts if part.startswith("text_encoder")]
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in encoders]
    for word in words:  # diffusers knows it in small letters
        prompt = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", word, prompt, flags=re.IGNORECASE)
    lines = [f"from diffusers import {pipeline}", "", f"pipeline = {pipeline}.from_pretrained({base!r})"]
    for word in words:
        file = f"{word}.safetensors"
        if len(encoders) == 1:
            lines.append(f"pipeline.load_textual_inversion({file!r}, token={word!r})")
            continue
        lines.append(f"vectors = load_file({file!r})")
        for key, part, tokenizer in zip(KEYS, encoders, tokenizers, strict=True):
            places = f"tokenizer=pipeline.{tokenizer}, text_encoder=pipeline.{part}"
            lines.append(f"pipeline.load_textual_inversion(vectors[{key!r}], token={word!r}, {places})")
    if len(encoders) > 1:
        lines.insert(1, "from safetensors.torch import load_file")
        # Some configurations name another end of prompts, and then the largest id is taken for it: the new word's.
        lines.append(f"pipeline.{encoders[-1]}.text_model.eos_token_id = pipeline.{tokenizers[-1]}.eos_token_id")
    return "\n".join([*lines, *load, f"picture = pipeline({prompt!r}).images[0]"])


class Embeddings:
    """A model that reads some words more, and their vectors."""

    rates: Mapping[str, float] = MappingProxyType({})

    def __init__(self, words: LearnedWords) -> None:
        self._words = words

    @property
    def model(self) -> PretrainedModel:
        return self._words.model

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return self._words.parameters

    def load(self) -> None:
        self.model.load(self.model.family.facts.denoiser, *self.model.text_parts)

    def place(self, plan: Plan, device: torch.device) -> None:
        from dreambooth_sm.training.placement import place, speed_up

        place(self.model.denoiser, plan, device, trained=False)
        self._words.place(plan, device)
        speed_up(self.model.denoiser, plan)

    def drawable(self, dtype: torch.dtype) -> Embeddings:
        self.model.load(self.model.family.facts.denoiser)  # which stays the same one
        return Embeddings(self._words.copy(dtype))

    def export(self, directory: Path, h: Hyperparameters, dtype: torch.dtype | None) -> None:
        from dreambooth_sm.adapters.embedding_file import write_embedding

        for word in self._words.names:
            path, vectors = directory / f"{word}.safetensors", self._words.tensors(word)
            write_embedding(path, word, vectors, dtype=dtype, trigger=h.instance_prompt or word)

    def exported_values(self, h: Hyperparameters) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())
