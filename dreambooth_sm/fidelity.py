"""Fidelity: how like the subject and their prompts a trained model's pictures are, and what the training cost.

The measures of the DreamBooth paper (Ruiz et al. 2023, section 4.2 and supplementary), with any encoder: the judge of
the toybox, offline, or DINOv2 and CLIP. A picture is compared by the cosine of embeddings, from -1 to 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dreambooth_sm.errors import UserError
from dreambooth_sm.toybox.judge import Judge, load_judge
from dreambooth_sm.toybox.labels import LABELS

JUDGE = "judge"
_SPEC = f"set {JUDGE}, or dino=MODEL clip=MODEL (or one of them), hub ids or directories without spaces"
_BATCH = 32


class Encoder(Protocol):
    """Sees what a picture shows."""

    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings ``(pictures, width)``, float32, of length 1, on the CPU."""


class PromptReader(Protocol):
    """Sees whether a picture shows what its prompt says."""

    def agreement(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> float | None:
        """Measures how well pictures show their prompts, one each; None where no prompt can be checked."""


@dataclass(frozen=True)
class Encoders:
    """The encoders that pictures are measured with; ``prompts`` is None where prompt fidelity is not measured."""

    pictures: Encoder
    prompts: PromptReader | None = None


@dataclass(frozen=True)
class Fidelity:
    """The findings of :func:`measure`.

    Attributes:
        subject: subject fidelity: mean similarity of generated and training pictures (DINO and CLIP-I in the paper).
        nearest: mean similarity of a generated picture to the training picture nearest to it. Far above that of
            :func:`measure_real`, the pictures are copies.
        prompt: prompt fidelity: mean similarity of pictures and prompts (CLIP-T in the paper); with the judge, the
            share of kinds, colours, patterns and backgrounds named in the prompts that pictures show.
        prior: mean similarity of class pictures and training pictures (PRES in the paper): lower is better.
        diversity: mean distance, 1 - similarity, between class pictures (the paper takes LPIPS for it).
    """

    subject: float
    nearest: float
    prompt: float | None = None
    prior: float | None = None
    diversity: float | None = None


@dataclass(frozen=True)
class Verdict:
    """One word for a trained model, and why, in one line."""

    word: Literal["underfit", "good", "overfit"]
    reason: str


def measure(
    encoders: Encoders,
    *,
    training: Sequence[Image.Image],
    generated: Sequence[Image.Image],
    prompts: Sequence[str] | None = None,
    class_pictures: Sequence[Image.Image] = (),
) -> Fidelity:
    """Measures a model by its pictures. The order of the pictures does not matter.

    Args:
        training: real pictures of the subject.
        generated: the model's pictures of the subject.
        prompts: of ``generated``, one each; left out, there is no prompt fidelity.
        class_pictures: the model's pictures of the class prompt; ``prior`` needs one, ``diversity`` two.

    Raises:
        ValueError: without pictures of the subject, or with another number of prompts than of pictures.
    """
    if not training or not generated:
        raise ValueError("fidelity needs training pictures and generated ones")
    if prompts is not None and len(prompts) != len(generated):
        raise ValueError(f"{len(generated)} generated pictures have {len(prompts)} prompts")
    real = encoders.pictures.embed(training)
    similarity = encoders.pictures.embed(generated) @ real.T
    prior = diversity = None
    if class_pictures:
        classes = encoders.pictures.embed(class_pictures)
        prior = (classes @ real.T).mean().item()
        if len(classes) > 1:
            diversity = 1 - _among_others(classes).mean().item()
    return Fidelity(
        subject=similarity.mean().item(),
        nearest=similarity.amax(1).mean().item(),
        prompt=encoders.prompts.agreement(generated, prompts) if encoders.prompts and prompts is not None else None,
        prior=prior,
        diversity=diversity,
    )


def measure_real(encoders: Encoders, training: Sequence[Image.Image]) -> Fidelity:
    """The real pictures, each measured against the others: what a perfect model would reach.

    Raises:
        ValueError: for fewer than two pictures.
    """
    if len(training) < 2:
        raise ValueError("real pictures can't be compared with each other: there are fewer than two")
    similarity = _among_others(encoders.pictures.embed(training))
    return Fidelity(subject=similarity.mean().item(), nearest=similarity.amax(1).mean().item())


def _among_others(embeddings: Tensor) -> Tensor:
    """Similarities of every picture to all others, ``(pictures, pictures - 1)``."""
    count = len(embeddings)
    others = ~torch.eye(count, dtype=torch.bool)
    return (embeddings @ embeddings.T)[others].view(count, count - 1)


def score(fidelity: Fidelity, base: Fidelity) -> float:
    """One number to choose the best of several checkpoints by: higher is better.

    Subject fidelity, less what was paid for it: the share of the base's diversity and prompt fidelity that is lost,
    and how far class pictures have moved towards the subject. Measures that either side lacks do not count, and doing
    better than the base there earns nothing.

    Args:
        fidelity: of a checkpoint.
        base: of the model before training, measured with the same encoders, prompts and seeds.
    """
    lost = sum(1 - kept for kept in (_kept(fidelity.diversity, base.diversity), _kept(fidelity.prompt, base.prompt)))
    return fidelity.subject - lost - _drift(fidelity, base)


# Between what training with prior preservation and without it comes to with the judge, 50 to 200 steps on toys that the
# base does not know (benchmarks/fidelity.py): 92 to 100 % of the diversity kept, or 41 to 70 %; drifts up to 21 %, or
# 49 to 68 %.
_KEPT_DIVERSITY = 0.8
_DRIFT = 0.35
_KEPT_PROMPT = 0.7
# From here on people take the pictures for the subject: hat, teeth and belly are there.
_LEARNED = 0.85
# Nearer to a training picture than this share of what separates training pictures from each other: nearly a copy.
_COPIED = 0.5


def verdict(fidelity: Fidelity, base: Fidelity, real: Fidelity) -> Verdict:
    """Judges whether a model was trained too little, well, or too much; by shares of the way from ``base`` to ``real``.

    Args:
        fidelity: of the trained model.
        base: of the model before training, measured with the same encoders, prompts and seeds.
        real: of the training pictures, from :func:`measure_real`.
    """
    way = real.subject - base.subject
    learned, drift = fidelity.subject - base.subject, _drift(fidelity, base)
    learned, drift = (learned / way, drift / way) if way > 0 else (1.0, drift)  # or the base knows the subject
    diversity, prompt = _kept(fidelity.diversity, base.diversity), _kept(fidelity.prompt, base.prompt)
    if diversity < _KEPT_DIVERSITY:
        return Verdict("overfit", f"class pictures kept {diversity:.0%} of their diversity")
    if drift > _DRIFT:
        return Verdict("overfit", f"class pictures came {drift:.0%} of the way to the subject")
    if prompt < _KEPT_PROMPT:
        return Verdict("overfit", f"pictures show {prompt:.0%} as much of their prompts as the base model's")
    if fidelity.nearest > real.nearest + _COPIED * (1 - real.nearest):
        return Verdict("overfit", "pictures are copies of training pictures")
    if learned < _LEARNED:
        return Verdict("underfit", f"pictures came {learned:.0%} of the way to the real ones")
    return Verdict("good", f"pictures came {learned:.0%} of the way to the real ones, at {diversity:.0%} diversity")


def _kept(value: float | None, before: float | None) -> float:
    """The share that is left, at most 1."""
    return 1.0 if value is None or not before else min(1.0, value / before)


def _drift(fidelity: Fidelity, base: Fidelity) -> float:
    """Measures how much more alike to the subject class pictures have become."""
    return 0.0 if fidelity.prior is None or base.prior is None else max(0.0, fidelity.prior - base.prior)


def load_encoders(spec: str = JUDGE, device: str | torch.device = "cpu") -> Encoders:
    """The encoders that a spec names.

    Args:
        spec: ``judge``, the toybox's own, for its pictures alone; or ``dino=MODEL clip=MODEL``, hub ids or
            directories. DINOv2 (Oquab et al. 2023) compares pictures and CLIP (Radford et al. 2021) reads prompts;
            without DINOv2, CLIP does both, without CLIP nothing reads prompts.

    Raises:
        UserError: for a spec that can't be understood, and a model that is not there, is damaged or of another kind.

    Examples:
        >>> load_encoders("dino=facebook/dinov2-base clip=openai/clip-vit-large-patch14")  # doctest: +SKIP
    """
    if spec.strip() == JUDGE:
        judge = load_judge().to(device)
        return Encoders(judge, JudgeReader(judge))
    names = _parse(spec)
    dino = Dino(names["dino"], device) if "dino" in names else None
    clip = Clip(names["clip"], device) if "clip" in names else None
    pictures = dino or clip
    assert pictures is not None
    return Encoders(pictures, clip)


def _parse(spec: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for word in spec.split():
        role, _, name = word.partition("=")
        if role not in ("dino", "clip") or not name:
            raise UserError(f"fidelity_encoders: can't understand {word!r}; {_SPEC}")
        if role in names:
            raise UserError(f"fidelity_encoders: {role} is named twice; {_SPEC}")
        names[role] = name
    if not names:
        raise UserError(f"fidelity_encoders: names no encoder; {_SPEC}")
    return names


class JudgeReader:
    """Reads kinds, colours, patterns and backgrounds of toys, as in "a red striped cat toy on the beach"."""

    _HEADS = ("kind", "colour", "pattern", "background")

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def agreement(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> float | None:
        """The share of the attributes named in the prompts that the pictures show."""
        right = [
            read[head] == label
            for read, prompt in zip(self._judge.read(pictures), prompts, strict=True)
            for head, label in self._named(prompt)
        ]
        return sum(right) / len(right) if right else None

    def _named(self, prompt: str) -> list[tuple[str, str]]:
        """Heads of ``LABELS`` with their labels. Words after "with" are of parts, but for the background."""
        toy, _, parts = prompt.lower().partition(" with ")
        words = re.findall("[a-z]+", toy)
        places = re.findall("[a-z]+", parts)
        return [
            (head, label)
            for head in self._HEADS
            for label in LABELS[head]
            if label in words or (head == "background" and label in places)
        ]


class Dino:
    """DINOv2: the class token of the last layer.

    Raises:
        UserError: where ``name``, a hub id or a directory, is not a DINOv2 model.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        from transformers import AutoImageProcessor, Dinov2Model

        self._model = _load_model(Dinov2Model, name, "dino").to(device)
        self._processor = _load(AutoImageProcessor, name, "dino")

    @torch.inference_mode()
    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        batches = _pixel_batches(self._processor, pictures, self._model.device)
        return _unit_rows(self._model(pixels).last_hidden_state[:, 0] for pixels in batches)


class Clip:
    """CLIP: pictures and prompts in one space; as a prompt reader, CLIP-T.

    Raises:
        UserError: where ``name``, a hub id or a directory, is not a CLIP model.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self._model = _load_model(CLIPModel, name, "clip").to(device)
        self._processor = _load(AutoImageProcessor, name, "clip")
        self._tokenizer = _load(AutoTokenizer, name, "clip")

    @torch.inference_mode()
    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        vision, projection = self._model.vision_model, self._model.visual_projection
        batches = _pixel_batches(self._processor, pictures, self._model.device)
        return _unit_rows(projection(vision(pixels).pooler_output) for pixels in batches)

    def agreement(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> float:
        """Mean similarity of each picture and its prompt."""
        return (self.embed(pictures) * self._embed_texts(prompts)).sum(1).mean().item()

    @torch.inference_mode()
    def _embed_texts(self, prompts: Sequence[str]) -> Tensor:
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        states = self._model.text_model(tokens.input_ids.to(self._model.device))
        return F.normalize(self._model.text_projection(states.pooler_output), dim=1).cpu()


def _unit_rows(batches: Iterable[Tensor]) -> Tensor:
    return torch.cat([F.normalize(batch, dim=1).cpu() for batch in batches])


def _pixel_batches(processor: Any, pictures: Sequence[Image.Image], device: torch.device) -> list[Tensor]:
    batches = [list(pictures[start : start + _BATCH]) for start in range(0, len(pictures), _BATCH)]
    return [
        processor(images=[picture.convert("RGB") for picture in batch], return_tensors="pt").pixel_values.to(device)
        for batch in batches
    ]


def _load_model(kind: Any, name: str, role: str) -> Any:
    from transformers import AutoConfig

    if Path(name).is_absolute() and not Path(name).is_dir():
        raise UserError(f"fidelity_encoders: {role}={name}: there is no such directory")
    config, wanted = _load(AutoConfig, name, role), kind.config_class.model_type
    if getattr(config, "auto_map", None):
        raise _own_code(name, role)
    found = config.model_type
    if found != wanted:
        raise UserError(f"fidelity_encoders: {role}={name} is a {found} model; name a {wanted} model")
    model, info = _load(kind, name, role, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise UserError(f"fidelity_encoders: {role}={name} lacks {min(info['missing_keys'])}; copy the model again")
    return model.requires_grad_(False).eval()


def _load(kind: Any, name: str, role: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # a damaged directory makes the library raise nearly anything
        if "trust_remote_code" in str(error):
            raise _own_code(name, role) from None
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"fidelity_encoders: {role}={name} can't be loaded as {kind.__name__} ({reason}); name a hub id that can "
            "be reached, or a directory with the whole model"
        ) from error


def _own_code(name: str, role: str) -> UserError:
    return UserError(
        f"fidelity_encoders: {role}={name} brings code of its own (auto_map in its configuration), which is never run; "
        "name a model of transformers' own classes"
    )
