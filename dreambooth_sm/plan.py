"""Which settings a card gets, and why. The plan decides, the training loop obeys.

Imports no torch: a plan can be made for a card that is not here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class Card:
    """The device a job runs on.

    Attributes:
        name: as the driver gives it; ``CPU`` for none.
        memory_gib: memory that a process can use, in GiB (a T4 reports 14.6 of its 16).
        capability: CUDA compute capability, such as (7, 5); (0, 0) for a CPU.
    """

    name: str
    memory_gib: float
    capability: tuple[int, int] = (0, 0)

    @property
    def is_cpu(self) -> bool:
        return self.capability == (0, 0)

    @property
    def has_bf16(self) -> bool:
        return self.capability >= (8, 0)


@dataclass(frozen=True)
class Plan:
    """What the training loop does on this card.

    Attributes:
        device: ``cuda`` or ``cpu``.
        precision: of the forward and backward pass; weights are kept in fp32.
        attention: ``default`` (SDPA), ``xformers`` or ``flash_attention``.
        gradient_checkpointing: activations are recomputed in the backward pass.
        use_8bit_adam: bitsandbytes' AdamW with 8-bit state instead of torch's AdamW.
        train_text_encoder: the text encoder is trained beside the UNet.
        use_ema: the average of the trained weights is kept, and saved.
        cache_latents: pictures are encoded once, before training.
        sample_batch_size: class images generated at a time.
        max_grad_norm: gradients are clipped to this global norm; None: not at all.
        notes: one line for every choice that a reader may wonder about.
    """

    device: Literal["cuda", "cpu"]
    precision: Precision
    attention: Literal["default", "xformers", "flash_attention"]
    gradient_checkpointing: bool
    use_8bit_adam: bool
    train_text_encoder: bool
    use_ema: bool
    cache_latents: bool
    sample_batch_size: int
    max_grad_norm: float | None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The plan for the log: one line of settings, then the notes."""
        settings = dataclasses.asdict(self)
        notes = settings.pop("notes")
        return [" ".join(f"{k}={v}" for k, v in settings.items()), *notes]


def detect_card() -> Card:
    """The first CUDA device, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return Card("CPU", memory_gib=0.0)
    device = torch.cuda.get_device_properties(0)
    return Card(device.name, device.total_memory / 2**30, (device.major, device.minor))


def make_plan(h: Hyperparameters, card: Card) -> Plan:
    """Chooses the settings for a card. Explicit hyperparameters win.

    Thresholds lie below what real cards report: an A10G shows 22 GiB, a T4 14.6.

    Raises:
        UserError: where an explicit value can't work on this card.
    """
    notes: list[str] = []
    problems: list[str] = []
    on_cpu = h.use_cpu or card.is_cpu
    memory = 0.0 if on_cpu else card.memory_gib
    precision: Precision = "fp32"
    attention: Literal["default", "xformers", "flash_attention"] = "default"
    if on_cpu:
        notes.append("use_cpu: training on the CPU" if h.use_cpu else "no CUDA device: training on the CPU")
        if h.mixed_precision == "bf16":
            precision = "bf16"
        elif h.mixed_precision == "fp16":
            notes.append("mixed_precision=fp16 needs a GPU: the CPU computes in fp32")
        if h.attention in ("xformers", "flash_attention"):
            notes.append(f"attention={h.attention} needs a GPU: SDPA serves")
        if h.use_8bit_adam is True:
            problems.append("use_8bit_adam=true needs a GPU; set it to false or auto")
    else:
        if h.mixed_precision == "auto":
            precision = "bf16" if card.has_bf16 else "fp16"
        elif h.mixed_precision != "no":
            precision = h.mixed_precision
        if precision == "bf16" and not card.has_bf16:
            problems.append(f"mixed_precision=bf16: {card.name} has no bf16; write fp16")
        if h.attention != "auto":
            attention = h.attention
    plan = Plan(
        device="cpu" if on_cpu else "cuda",
        precision=precision,
        attention=attention,
        gradient_checkpointing=_choose(h.gradient_checkpointing, not on_cpu and memory < 20),
        use_8bit_adam=_choose(h.use_8bit_adam, not on_cpu and memory < 20),
        train_text_encoder=_choose(h.train_text_encoder, memory >= 20),
        use_ema=_choose(h.use_ema, memory >= 20),
        cache_latents=h.not_cache_latents in (False, "auto"),
        sample_batch_size=h.sample_batch_size if h.sample_batch_size != "auto" else (1 if on_cpu else 4),
        max_grad_norm=1.0 if h.max_grad_norm == "auto" else h.max_grad_norm,
        notes=tuple(notes),
    )
    if problems:
        raise UserError(problems)
    return plan


def _choose(wish: bool | Literal["auto"], otherwise: bool) -> bool:
    return otherwise if wish == "auto" else wish
