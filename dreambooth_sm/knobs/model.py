"""Knobs for what is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dreambooth_sm.families import FAMILIES, Facts
from dreambooth_sm.families.find import find_facts, find_family, says_distilled
from dreambooth_sm.knobs.declare import Knobs, knob, rule
from dreambooth_sm.knobs.messages import near_name, short
from dreambooth_sm.toybox import SHIPPED

# A model of the hub: its owner and its name.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_NO_MODEL = "is neither a path that exists nor a model hub's id"
_WHAT_TO_WRITE = "write owner/name, s3://bucket/prefix or an absolute path"


# Of single files.
_FILES = (".safetensors", ".ckpt", ".pt", ".bin")
_FACTS = [family.facts for family in FAMILIES.values()]

if TYPE_CHECKING:
    Architecture = str
else:
    Architecture = Literal["auto", *FAMILIES]


class ModelKnobs(Knobs):
    """The base model, and what of it is taken."""

    group = "Model"

    pretrained_model_name_or_path: str = knob(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "Base model: hub id, diffusers directory (a channel, for example), `s3://` prefix or object, or a "
        "single-file checkpoint (`.safetensors`, `.ckpt`).",
        path=True,
    )
    base_architecture: Architecture = knob(
        "auto",
        "Kind of the base model, by which memory and resolution are planned before anything is downloaded: "
        f"{', or '.join(facts.listed for facts in _FACTS)}. auto: as its files or its name "
        f"({', '.join(f'`{facts.hint}`' for facts in _FACTS if facts.hint)} in it) say.",
        resume="free",
    )
    pretrained_vae_name_or_path: str | None = knob(
        None, "Replacement for the base model's VAE: as above; a file may hold the VAE alone.", path=True
    )
    pretrained_parts_name_or_path: str | None = knob(
        None,
        "What the other parts come from where the base model is a file of a denoiser alone "
        f"({', '.join(facts.title for facts in _FACTS if not facts.has_single_file)}): hub id, diffusers directory or "
        "`s3://` prefix of a model of that kind.",
        path=True,
    )
    revision: str | None = knob(None, "Revision of the base model, or of its other parts, on the hub.")
    variant: str | None = knob(
        None, "Variant of the base model's files on the hub; None takes fp16 files where there are some."
    )
    hf_token_secret: str | None = knob(
        None,
        "Name of the AWS Secrets Manager secret that holds the hub's token. A token in the environment (HF_TOKEN) "
        "needs none; never put a token here.",
        resume="free",
    )
    use_ema_weights: bool = knob(
        False, "Start from the average (EMA) that a single-file checkpoint carries beside its weights."
    )
    train_distilled: bool = knob(
        False,
        "Train a model that was distilled to draw in a few steps (Turbo) all the same: it unlearns that. What is "
        "trained beside its base model can usually be drawn with beside it.",
    )
    accept_license: str | None = knob(
        None,
        "A licence that does not allow every use, which you accept, by the name that a job says when it refuses a base "
        "model under it.",
        resume="free",
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = knob(
        "auto", "What the base model's UNet predicts. auto: as the model says."
    )

    @property
    def architecture(self) -> str:
        """Of the base model, with ``auto`` resolved: by what lies at its path now, or by its name."""
        if self.base_architecture == "auto":
            return find_family(self.pretrained_model_name_or_path)
        return self.base_architecture

    @property
    def facts(self) -> Facts:
        """Of the base model: its family's, and its size's where that is known."""
        return find_facts(self.architecture, self.pretrained_model_name_or_path)

    @property
    def licence_note(self) -> str | None:
        """What a plan says of a licence that was accepted."""
        if self.accept_license is None:
            return None
        return f"accept_license={self.accept_license}: the base model's licence does not allow every use"

    @rule("pretrained_model_name_or_path")
    def _base_can_be_found(self) -> Iterator[str]:
        name = self.pretrained_model_name_or_path
        if not _may_be_model(name):
            near = near_name(name.lower(), list(SHIPPED))
            hint = f"did you mean {near}?" if near else _WHAT_TO_WRITE
            yield f"pretrained_model_name_or_path: {short(name)} {_NO_MODEL}; {hint}"
        elif not SHIPPED.get(name, Path()).is_dir():
            yield (
                f"pretrained_model_name_or_path: {name} is not in the image; name it as the launcher's base_model, "
                "which sends it with the job"
            )

    @rule("pretrained_model_name_or_path", "base_architecture", "pretrained_parts_name_or_path", "train_distilled")
    def _base_is_not_distilled(self) -> Iterator[str]:
        facts = self.facts
        for field in ("pretrained_model_name_or_path", "pretrained_parts_name_or_path"):
            if (name := getattr(self, field)) and not self.train_distilled:
                yield from distilled_problems(field, name, facts)

    @rule("pretrained_model_name_or_path", "base_architecture", "pretrained_parts_name_or_path")
    def _base_is_of_its_kind(self) -> Iterator[str]:
        facts = self.facts
        for field in ("pretrained_model_name_or_path", "pretrained_parts_name_or_path"):
            yield from other_kind_problems(field, getattr(self, field) or "", facts)

    @rule("pretrained_model_name_or_path", "base_architecture", "pretrained_parts_name_or_path", "accept_license")
    def _licence_is_accepted(self) -> Iterator[str]:
        facts = self.facts
        for field in ("pretrained_model_name_or_path", "pretrained_parts_name_or_path"):
            yield from licence_problems(field, getattr(self, field) or "", facts, self.accept_license)

    @rule("pretrained_model_name_or_path", "base_architecture", "pretrained_parts_name_or_path")
    def _all_parts_are_named(self) -> Iterator[str]:
        facts, name = self.facts, self.pretrained_model_name_or_path
        if self.pretrained_parts_name_or_path and facts.has_single_file:
            yield (
                f"pretrained_parts_name_or_path: files of {facts.title} hold all parts; leave it out, or set "
                "base_architecture to what the model is"
            )
        if not self.pretrained_parts_name_or_path and not facts.has_single_file and name.lower().endswith(_FILES):
            yield (
                f"pretrained_model_name_or_path: {short(name)} is a file, which of {facts.title} holds the "
                f"{facts.denoiser} alone; set pretrained_parts_name_or_path to the model that its other parts come "
                f"from, such as {next(iter(facts.licences))}"
            )

    @rule("pretrained_vae_name_or_path", "pretrained_parts_name_or_path")
    def _parts_can_be_found(self) -> Iterator[str]:
        for field in ("pretrained_vae_name_or_path", "pretrained_parts_name_or_path"):
            name = getattr(self, field)
            if name and not _may_be_model(name):
                yield f"{field}: {short(name)} {_NO_MODEL}; {_WHAT_TO_WRITE}"

    @rule("hf_token_secret")
    def _token_is_not_written_down(self) -> Iterator[str]:
        if self.hf_token_secret is not None and self.hf_token_secret.startswith("hf_"):
            yield (
                "hf_token_secret takes the name of a secret, and this looks like a token, which job descriptions would "
                "show; revoke it, store a new one in AWS Secrets Manager and set the secret's name"
            )


def distilled_problems(option: str, name: str, facts: Facts) -> Iterator[str]:
    """Says that a model was distilled, where its index does, or else its name.

    Args:
        option: that has the name.
        facts: of its family.
    """
    said = says_distilled(name)
    if said if said is not None else facts.distilled and facts.distilled.search(_last(name)):
        yield f"{option}: {is_distilled(short(name), facts)}"


def is_distilled(model: str, facts: Facts) -> str:
    """Why a model that was distilled is refused."""
    return (
        f"{model} is distilled to draw in a few steps, which training undoes; train {facts.title} itself, whose "
        "adapters can be drawn with beside it, or set train_distilled=true"
    )


def other_kind_problems(option: str, name: str, facts: Facts) -> Iterator[str]:
    """Says that a model is of another kind than its family, where its name does.

    Args:
        option: that has the name.
        facts: of its family.
    """
    if facts.others and facts.others.search(_last(name)):
        yield (
            f"{option}: {short(name)} is of another kind than {facts.title}, with a pipeline of its own; name a model "
            f"that {facts.pipeline} draws with, such as {next(iter(facts.licences))}"
        )


def licence_problems(option: str, name: str, facts: Facts, accepted: str | None) -> Iterator[str]:
    """Says that a model is under a licence that has to be accepted, where its name does.

    Args:
        option: that has the name.
        facts: of its family.
        accepted: the licence that is.
    """
    for licence, names in facts.gates.items():
        if names.search(_last(name)) and accepted != licence:
            yield (
                f"{option}: {short(name)} is under the licence {licence}, which does not allow every use; read it, and "
                f"set accept_license={licence} if it allows yours"
            )


def _last(name: str) -> str:
    """The part of a model's name that its makers gave it."""
    return "/".join(name.rstrip("/").split("/")[-2:])


def _may_be_model(name: str) -> bool:
    """Whether a model can lie where ``name`` says: what only the network or the container knows, it may."""
    if name in SHIPPED or "://" in name or name.startswith(("/", ".", "~")):
        return True
    if _HUB_ID.fullmatch(name) and not re.search(r"\.\.|--|(\.git|[.-])(/|$)", name):
        return True
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False
