"""Knobs for what an adapter looks like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from annotated_types import Ge, Le

from dreambooth_sm.knobs.declare import Tunable, knob, rule
from dreambooth_sm.knobs.optimizer import OptimizerKnobs
from dreambooth_sm.knobs.output import OutputKnobs
from dreambooth_sm.knobs.ranges import Fraction, NonNegativeFloat, PositiveFloat

LORA, PIVOTAL = "lora", "pivotal"
# Those that train adapters.
_METHODS = (LORA, PIVOTAL)
_RANK = 16
_EXPORTS = {
    "full": ("diffusers", "single_file", "both"),
    **dict.fromkeys(_METHODS, ("adapter", "merged", "both")),
}


class LoraKnobs(OptimizerKnobs, OutputKnobs):
    """The matrices that an adapter is made of, and the layers that they lie beside."""

    group = "LoRA"

    lora_variant: Literal["lora", "dora", "loha", "lokr", "oft"] = knob(
        "lora",
        "What an adapter computes. lora: a product of two matrices (Hu et al. 2021); dora: the same, and the length of "
        "each output (Liu et al. 2024); loha, lokr: a Hadamard, a Kronecker product (Yeh et al. 2023); oft: rotations "
        "(Qiu et al. 2023).",
        methods=_METHODS,
    )
    lora_rank: Annotated[int, Ge(1), Le(512)] = knob(
        _RANK,
        "Rank of an adapter; with lora_variant=oft, the size of a rotation.",
        tunable=Tunable(4, 64, logarithmic=True),
        methods=_METHODS,
    )
    lora_alpha: PositiveFloat | None = knob(
        None, "An adapter's output is multiplied by lora_alpha / lora_rank; None: by 1.", methods=_METHODS
    )
    lora_rank_stabilised: bool = knob(
        False,
        "Multiply by lora_alpha / sqrt(lora_rank) instead, so that high ranks learn as much (Kalajdzievski 2023).",
        methods=_METHODS,
    )
    lora_targets: Literal["attention", "linear", "all"] = knob(
        "linear",
        "The layers that have adapters: of the attention; linear: of the feed-forward layers and the projections "
        "around them as well; all: the convolutions of the UNet as well.",
        methods=_METHODS,
    )
    lora_init: Literal["kaiming", "gaussian", "orthogonal"] = knob(
        "kaiming", "How an adapter's first matrix begins; the second one begins at zero.", methods=_METHODS
    )

    lora_plus_ratio: Annotated[float, Ge(1), Le(64)] = knob(
        1.0,
        "Train the matrices that begin at zero this many times as fast as learning_rate (LoRA+, Hayou et al. 2024).",
        methods=_METHODS,
    )

    lora_dropout: Fraction = knob(
        0.0,
        "Share of the values between an adapter's two matrices that are left out in training, other ones in each step.",
        methods=_METHODS,
    )
    lora_min_rank: Annotated[int, Ge(1), Le(512)] | None = knob(
        None,
        "Ranks that the noisiest rows are trained with, and the others with the more, up to lora_rank, the less noise "
        "they have (T-LoRA, arXiv 2507.05964); None: all are trained with all.",
        methods=_METHODS,
    )
    distance_penalty: NonNegativeFloat = knob(
        0.0,
        "Add this many times the squared distance of the model's weights from the base model's to the loss "
        "(arXiv 2505.19519).",
        methods=_METHODS,
    )

    @rule(
        "lora_variant",
        "lora_alpha",
        "lora_rank_stabilised",
        "lora_init",
        "lora_plus_ratio",
        "distance_penalty",
        "lora_dropout",
        "lora_min_rank",
    )
    def _variant_has_what_is_set(self) -> Iterator[str]:
        products = ("lora", "dora")
        owners = {
            "lora_rank_stabilised": products,
            "lora_init": products,
            "lora_plus_ratio": products,
            "lora_alpha": (*products, "loha", "lokr"),
            "distance_penalty": ("lora",),
            "lora_dropout": ("lora",),
            "lora_min_rank": ("lora",),
        }
        for name, variants in owners.items():
            if getattr(self, name) != type(self).model_fields[name].default and self.lora_variant not in variants:
                yield (
                    f"{name} is for lora_variant={' or '.join(variants)}, and this job's is {self.lora_variant}; leave "
                    f"{name} out"
                )

    @rule("lora_plus_ratio", "optimizer")
    def _one_rate_is_found(self) -> Iterator[str]:
        if self.optimizer == "prodigy" and self.lora_plus_ratio != 1:
            yield (
                f"lora_plus_ratio={self.lora_plus_ratio:g}: optimizer=prodigy finds one learning rate for all; leave "
                "it out, or take another optimizer"
            )

    @rule("lora_rank", "lora_min_rank")
    def _ranks_are_in_order(self) -> Iterator[str]:
        if self.lora_min_rank is not None and self.lora_min_rank > self.lora_rank:
            yield (
                f"lora_min_rank={self.lora_min_rank} is more than lora_rank={self.lora_rank}; set lora_min_rank to "
                f"{self.lora_rank} or less"
            )

    @rule("method", "model_name")
    def _adapters_files_are_apart(self) -> Iterator[str]:
        if self.method in _METHODS and self.model_name == "pytorch_lora_weights":
            yield (
                "model_name=pytorch_lora_weights is the name of the adapter's file for diffusers; model_name is of "
                "the file for WebUI and ComfyUI; set another model_name"
            )

    @rule("method", "export")
    def _export_is_one_of_the_methods(self) -> Iterator[str]:
        exports = _EXPORTS.get(self.method, (self.export,))
        if self.export not in exports:
            yield f"export={self.export} is not for method={self.method}; set export to {' or '.join(exports)}"
