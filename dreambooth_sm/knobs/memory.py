"""Knobs for what fits a card and keeps it busy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from dreambooth_sm.knobs.declare import knob, rule
from dreambooth_sm.knobs.optimizer import OptimizerKnobs
from dreambooth_sm.knobs.ranges import Auto, Few


class MemoryKnobs(OptimizerKnobs):
    """Precision, kernels, and what is kept or computed again."""

    group = "Memory and speed"

    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = knob("auto", "Precision of the forward and backward pass.")
    attention: Literal["auto", "default", "xformers", "flash_attention"] = knob(
        "auto",
        "Attention kernels; default is torch's SDPA. With auto, jobs of few steps on a Hopper card or later take "
        "flash_attention, which has nothing to compile.",
        resume="free",
    )
    gradient_checkpointing: bool | Auto = knob(
        "auto",
        "Recompute activations in the backward pass instead of keeping them.",
        resume="free",
    )
    base_weights: Literal["auto", "plain", "int8", "nf4"] = knob(
        "auto",
        "How the weights of a base model are kept that adapters are trained beside. plain: in the precision that "
        "is computed in; int8, nf4: in 8 or 4 bits a weight, for small cards (nf4: Dettmers et al. 2023). auto: plain "
        "where the card has room.",
    )
    not_cache_latents: bool | Auto = knob(
        "auto",
        "True: encode the pictures at each step; False: encode them once, before training.",
        resume="free",
    )
    torch_compile: bool | Auto = knob(
        "auto",
        "Compile the UNet's blocks: some minutes at the start for faster steps. auto: no, until jobs are long.",
        resume="free",
    )
    cuda_graph: bool | Auto = knob(
        "auto",
        "Capture the training step as a CUDA graph and replay it. auto: wherever the optimizer allows it.",
        resume="free",
    )
    num_processes: Few | Auto = knob(
        "auto",
        "Processes of each instance that train together. auto: one a GPU.",
        resume="free",
    )
    use_cpu: bool = knob(False, "Train on the CPU although there is a GPU.", resume="free")

    @rule("use_cpu", "mixed_precision")
    def _cpu_has_no_fp16(self) -> Iterator[str]:
        if self.use_cpu and self.mixed_precision == "fp16":
            yield "use_cpu=true can't train in fp16; set mixed_precision to no, bf16 or auto"

    @rule("use_cpu", "attention")
    def _cpu_has_its_own_attention(self) -> Iterator[str]:
        if self.use_cpu and self.attention in ("xformers", "flash_attention"):
            yield (
                f"use_cpu=true can't run attention={self.attention}, which needs a GPU; set attention to default or "
                "auto"
            )

    @rule("use_cpu", "optimizer")
    def _cpu_has_no_bitsandbytes(self) -> Iterator[str]:
        if self.use_cpu and self.optimizer == "adamw8bit":
            yield (
                "use_cpu=true can't run optimizer=adamw8bit (use_8bit_adam=true), which needs a GPU; set optimizer to "
                "auto, or use_8bit_adam to false"
            )
