"""What fits a card and keeps it busy."""

from __future__ import annotations

from typing import ClassVar, Literal

from dreambooth_sm.knobs.declare import knob
from dreambooth_sm.knobs.optimizer import OptimizerKnobs
from dreambooth_sm.knobs.ranges import Auto, Few


class MemoryKnobs(OptimizerKnobs):
    """Precision, kernels, and what is kept or computed again."""

    group: ClassVar[str] = "Memory and speed"

    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = knob("auto", "Precision of the forward and backward pass.")
    attention: Literal["auto", "default", "xformers", "flash_attention"] = knob(
        "auto",
        "Attention kernels; default is torch's SDPA.",
        resume="free",
    )
    gradient_checkpointing: bool | Auto = knob(
        "auto",
        "Recompute activations in the backward pass instead of keeping them.",
        resume="free",
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
    use_lora: bool = knob(False, "Accepted for the seed's notebooks; only False works.", resume="free")
