"""A roofline of training steps: what each operation computes and moves, at true sizes, and how well that predicts.

    python -m benchmarks.roofline [FAMILY ...] [--write dreambooth_sm/planning/measured]

Counts the operations of the denoiser's forward and backward pass on tensors without content, so that no GPU and little
memory is needed. An operation takes as long as its arithmetic or its bytes do, whichever is longer, and a launch. How
much of the data sheets' arithmetic is reached, how long a launch takes, and how many of the counted bytes are moved is
fitted to the steps of adapters that were measured on the H200. How far each measured step is from that is printed,
those of full training beside them, whose figures are older than the kernels are. ``--write`` keeps the counts, in
groups of like intensity (operations a byte), and what was fitted: the launcher computes from them how much slower
another card is. All methods that leave the base model as it is count as LoRA on all linear layers does.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.common import emit
from benchmarks.figures import add_write_option, write_figures
from dreambooth_sm.planning import roofline
from dreambooth_sm.planning.figures import FigureError, figure
from tests.helpers.true_sizes import CONFIGS

DTYPE = torch.bfloat16
# Two pictures: one of the subject, one of the class.
ROWS = 2
RANK = 16
# What the optimizer of full training reads and writes of each parameter: gradient (twice, once for clipping), weight
# and residual, and two moments of 8 bits.
_OPTIMIZER_BYTES = 2 * 2 + 4 * 2 + 2 * 2
# Measured steps: the model's family, what is trained, whether activations are recomputed, card and figure.
MEASURED_STEPS = [
    ("sd", "whole", False, "H200", "full.unet.bf16"),
    ("sd", "whole", True, "H200", "full.lean.bf16"),
    ("sd", "beside", False, "H200", "lora.roomy.bf16"),
    ("sd", "beside", True, "H200", "lora.small.bf16"),
    ("sdxl", "beside", False, "H200", "lora.roomy.bf16"),
    ("sdxl", "beside", True, "H200", "lora.small.bf16"),
    ("sd3", "beside", False, "H200", "lora.roomy.bf16"),
    ("sd3", "beside", True, "H200", "lora.small.bf16"),
    ("flux2", "beside", False, "H200", "lora.roomy.bf16"),
    ("flux2", "beside", True, "H200", "lora.small.bf16"),
    ("flux1", "beside", True, "H200", "lora.small.bf16"),
    ("sdxl", "whole", False, "H100", "full.roomy.bf16"),
    ("sdxl", "whole", True, "H100", "full.small.bf16"),
]
# Families whose denoisers do not run without content, and those that count in their place.
STAND_INS = {"flux1": ("chroma", "krea2", "qwen_image", "z_image")}
# Of the H200's bandwidth: optimizers reach 66 to 83 % of the 4.2 TB/s that were measured (docs/performance.md).
BANDWIDTH = 0.7
# Between them lies what is fitted: the share of arithmetic, seconds of a launch within a graph, :class:`Fit`'s `moved`.
BOUNDS = ((0.3, 0.8), (0.5e-6, 3e-6), (0.1, 2.0), (0.1, 2.0))
# Groups of operations, by the least operations a byte of each.
INTENSITIES = (0, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Work:
    """What an operation does."""

    flops: float
    bytes: float


class Counting(TorchDispatchMode):
    """Counts the operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        if func.is_view or not made or func._schema.name in _FREE:
            return out
        read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        counted = flop_registry.get(func._overloadpacket)
        flops = counted(*args, **(kwargs or {}), out_val=out) if counted else 0
        self.work.append(Work(flops, _bytes(*read, *made)))
        return out


# Allocates, and moves nothing.
_FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::detach"}


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def _attention(work: list[Work]) -> Callable[..., torch.Tensor]:
    """Attention in one kernel forward and one backward, as cards do it; elsewhere its parts would count."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = torch.empty_like(q)
            context.save_for_backward(q, k, v)
            context.flops = 4 * q.numel() * k.shape[-2]
            work.append(Work(context.flops, _bytes(q, k, v, out)))
            return out

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
            inputs = context.saved_tensors
            work.append(Work(2.5 * context.flops, 2 * _bytes(*inputs, gradient)))
            return tuple(torch.empty_like(each) for each in inputs)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        out: torch.Tensor = Attention.apply(query, key, value)
        return out

    return attend


class Adapted(nn.Module):
    """A linear layer with a low-rank one beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.empty(RANK, layer.in_features, dtype=DTYPE, device="meta"))
        self.up = nn.Parameter(torch.empty(layer.out_features, RANK, dtype=DTYPE, device="meta"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name) if name in ("weight", "bias", "in_features") else super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        inner = (x.flatten(0, -2) @ self.down.T).to(out.dtype)
        return torch.addmm(out.flatten(0, -2), inner, self.up.T).view_as(out)


def meta(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _unet(side: int, extras: Callable[[], dict[str, Any]] = dict) -> Callable[[nn.Module], torch.Tensor]:
    def run(unet: Any) -> torch.Tensor:
        states = meta(ROWS, 77, unet.config.cross_attention_dim)
        return unet(meta(ROWS, 4, side, side), meta(ROWS), states, **extras()).sample

    return run


def _sd3(transformer: nn.Module) -> torch.Tensor:
    out = transformer(
        hidden_states=meta(ROWS, 16, 128, 128),
        encoder_hidden_states=meta(ROWS, 333, 4096),
        pooled_projections=meta(ROWS, 2048),
        timestep=meta(ROWS),
    )
    return out.sample


def _flux(channels: int, width: int, axes: int, **more: Callable[[], Any]) -> Callable[[nn.Module], torch.Tensor]:
    def run(transformer: nn.Module) -> torch.Tensor:
        out = transformer(
            hidden_states=meta(ROWS, 4096, channels),
            encoder_hidden_states=meta(ROWS, 512, width),
            timestep=meta(ROWS),
            img_ids=meta(4096, axes, dtype=torch.float32),
            txt_ids=meta(512, axes, dtype=torch.float32),
            **{name: make() for name, make in more.items()},
        )
        return out.sample

    return run


_XL = {"added_cond_kwargs": {"text_embeds": meta(ROWS, 1280), "time_ids": meta(ROWS, 6)}}
# Families whose denoisers run on tensors without content: their classes, what differs from their configurations, and a
# forward pass. The heads are the true models'; CONFIGS has what parameters depend on.
DENOISERS: dict[str, tuple[str, dict[str, Any], Callable[[nn.Module], torch.Tensor]]] = {
    "sd": ("UNet2DConditionModel", {"attention_head_dim": 8}, _unet(64)),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "attention_head_dim": (5, 10, 20),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        _unet(128, lambda: _XL),
    ),
    "sd3": ("SD3Transformer2DModel", {"sample_size": 128}, _sd3),
    "flux1": (
        "FluxTransformer2DModel",
        {},
        _flux(64, 4096, 3, pooled_projections=lambda: meta(ROWS, 768), guidance=lambda: meta(ROWS)),
    ),
    "flux2": ("Flux2Transformer2DModel", {}, _flux(128, 7680, 4)),
}


def count(family: str, trained: str, *, recomputes: bool) -> list[Work]:
    """The operations of a step of the denoiser, with one picture of the subject and one of the class.

    Args:
        trained: the ``whole`` denoiser, or layers ``beside`` it.
        recomputes: activations in the backward pass.
    """
    kind, more, run = DENOISERS[family]
    configs = CONFIGS[family]
    with torch.device("meta"):
        denoiser = getattr(diffusers, kind)(**{**(configs.get("unet") or configs["transformer"]), **more}).to(DTYPE)
    if trained == "beside":
        denoiser.requires_grad_(False)
        _adapt(denoiser)
    if recomputes:
        denoiser.enable_gradient_checkpointing()
    denoiser.train()
    counting = Counting()
    attention = patch.object(nn.functional, "scaled_dot_product_attention", _attention(counting.work))
    with counting, attention:
        run(denoiser).float().square().mean().backward()
    optimizer = sum(each.numel() for each in denoiser.parameters() if each.requires_grad) * _OPTIMIZER_BYTES
    return [*counting.work, Work(0.0, optimizer)]


def _adapt(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Adapted(child))
        else:
            _adapt(child)


def grouped(work: list[Work]) -> dict[str, float]:
    """Figures of a step: operations (TFLOP) and bytes (GB) of each group, and launches."""
    found: dict[str, float] = {"launches": len(work)}
    for each in work:
        group = max(least for least in INTENSITIES if each.flops >= least * each.bytes)
        for unit, amount in (("tflop", each.flops / 1e12), ("gb", each.bytes / 1e9)):
            found[f"{group}.{unit}"] = found.get(f"{group}.{unit}", 0.0) + amount
    return {name: round(amount, 4) for name, amount in found.items()}


@dataclass(frozen=True)
class Fit:
    """What was fitted.

    Attributes:
        reached: of data sheets.
        moved: by kinds of denoisers, the bytes that operations without arithmetic move, beside those that were counted:
            less where kernels do several of them at once, more where images are copied to another layout.
    """

    reached: roofline.Reached
    moved: Mapping[str, float]

    def work(self, family: str, figures: Mapping[str, float]) -> dict[str, float]:
        """A step's figures, with the bytes that are moved."""
        return {**figures, "0.gb": figures["0.gb"] * self.moved[kind_of(family)]}

    def seconds(self, family: str, figures: Mapping[str, float], card: str) -> float:
        return roofline.seconds(self.work(family, figures), card, self.reached)


def kind_of(family: str) -> str:
    return "unet" if DENOISERS[family][0].startswith("UNet") else "transformer"


def fitted(samples: list[tuple[str, dict[str, float], str, float]]) -> Fit:
    """The fit by which steps take as long as they were measured: the least squared error of logarithms, searched on
    ever finer grids, within :data:`BOUNDS`.

    Args:
        samples: family, figures of a step, card, and the seconds that were measured.
    """

    def fit(values: tuple[float, ...]) -> Fit:
        arithmetic, launch_s, unet, transformer = values
        return Fit(roofline.Reached(arithmetic, BANDWIDTH, launch_s), {"unet": unet, "transformer": transformer})

    def error(values: tuple[float, ...]) -> float:
        return sum(
            math.log(fit(values).seconds(family, figures, card) / found) ** 2
            for family, figures, card, found in samples
        )

    best: tuple[float, ...] = tuple(math.sqrt(least * most) for least, most in BOUNDS)
    width = 0.5
    while width > 1e-3:
        around = [
            [min(most, max(least, value * math.exp(width * shift))) for shift in (-1, 0, 1)]
            for value, (least, most) in zip(best, BOUNDS, strict=True)
        ]
        nearest = min(itertools.product(*around), key=error)
        width = width if error(nearest) < error(best) else width / 2
        best = nearest
    return fit(best)


def _measured(family: str, name: str) -> float:
    """Seconds of a step: of the GPU, where that was measured."""
    try:
        return figure(family, f"{name}.gpu_busy_ms") / 1e3
    except FigureError:
        return 1 / figure(family, f"{name}.steps_per_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[*DENOISERS, []])
    add_write_option(parser)
    options = parser.parse_args()
    families = options.families or [*DENOISERS]
    steps = [each for each in MEASURED_STEPS if each[0] in families]
    wanted = dict.fromkeys([*(each[:3] for each in steps), *((family, "beside", False) for family in families)])
    work = {each: grouped(count(each[0], each[1], recomputes=each[2])) for each in wanted}
    samples = [(each[0], work[each[:3]], each[3], _measured(each[0], each[4])) for each in steps]
    fit = fitted([sample for each, sample in zip(steps, samples, strict=True) if each[1] == "beside"])
    emit(**dataclasses.asdict(fit))
    for each, (family, figures, card, found) in zip(steps, samples, strict=True):
        computed = fit.seconds(family, figures, card)
        off = round(computed / found - 1, 3)
        emit(step=each, measured_ms=round(1e3 * found, 1), computed_ms=round(1e3 * computed, 1), off=off)
    if options.write:
        kept = {f"reached.{name}": value for name, value in dataclasses.asdict(fit.reached).items()}
        for (family, trained, recomputes), figures in work.items():
            for name in () if recomputes else (family, *STAND_INS.get(family, ())):
                moved = fit.work(family, figures).items()
                kept |= {f"{name}.{trained}.{key}": float(f"{value:.4g}") for key, value in moved}
        write_figures(options.write, "roofline", kept, by="python -m benchmarks.roofline: computed")


if __name__ == "__main__":
    main()
