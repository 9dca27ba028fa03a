"""The plan: what the training loop does on a card. The plan decides, the loop obeys."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from dreambooth_sm.planning.ladder import BaseWeights, Optimizer, Weights

Precision = Literal["fp32", "fp16", "bf16"]
EmaPlace = Literal["no", "device", "cpu"]
AttentionKernels = Literal["default", "xformers", "flash_attention"]


@dataclass(frozen=True)
class Plan:
    """The settings that the training loop runs with on this card.

    Attributes:
        tier: name of the rung; ``cpu`` or ``reference`` beside the ladder.
        device: ``cuda`` or ``cpu``.
        precision: of the forward and backward pass.
        weights: how the trained weights are kept (:class:`~dreambooth_sm.planning.ladder.Rung`); ``fp32`` runs under
            autocast unless the precision is fp32.
        optimizer: ``blockwise`` (ours), ``adamw`` (torch's, fp32 state: the reference), ``adamw8bit``
            (bitsandbytes'), or one of :data:`~dreambooth_sm.planning.optimizers.ON_MASTERS`.
        state_bits: bits of each of Adam's two moments, or of other optimizers' values: 32, 16, 8 or 4.
        update_in_backward: each parameter is updated as soon as its gradient is there.
        gradient_checkpointing: activations are recomputed in the backward pass.
        attention: ``default`` (SDPA), ``xformers`` or ``flash_attention``.
        channels_last: memory format of the UNet.
        cuda_graph: the step is captured once and replayed, but for updates that can't be captured.
        compile: transformer and residual blocks go through torch.compile.
        train_text_encoder: the text encoder is trained beside the UNet.
        ema: where the average of the trained weights lives; ``no`` for none.
        cache_latents: pictures are encoded once, before training.
        sample_batch_size: class images generated at a time.
        max_grad_norm: gradients are clipped to this global norm; None: not at all.
        base_weights: how the weights of a base model that stays as it is are kept: ``plain``, in the precision
            that is computed in; ``int8`` or ``nf4``, in 8 or 4 bits (:mod:`dreambooth_sm.training.quantised`).
        text_weights: the same of text encoders that are language models, which only read the prompts.
        predicted_peak_gb: highest allocation that is expected, in GB (1e9 bytes); 0 on a CPU.
        notes: one line for every choice that a reader may wonder about.
    """

    tier: str
    device: Literal["cuda", "cpu"]
    precision: Precision
    weights: Weights
    optimizer: Optimizer
    state_bits: int
    update_in_backward: bool
    gradient_checkpointing: bool
    attention: AttentionKernels
    channels_last: bool
    cuda_graph: bool
    compile: bool
    train_text_encoder: bool
    ema: EmaPlace
    cache_latents: bool
    sample_batch_size: int
    max_grad_norm: float | None
    base_weights: BaseWeights = "plain"
    text_weights: BaseWeights = "plain"
    predicted_peak_gb: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def use_ema(self) -> bool:
        return self.ema != "no"

    def settings(self) -> dict[str, object]:
        """Every choice but the notes."""
        settings = dataclasses.asdict(self)
        del settings["notes"]
        return settings

    def lines(self) -> list[str]:
        """The plan for the log: one line of settings, then the notes."""
        return [" ".join(f"{k}={v}" for k, v in self.settings().items()), *self.notes]
