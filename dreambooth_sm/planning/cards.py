"""The cards that jobs train on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dreambooth_sm.errors import UserError
from dreambooth_sm.planning.figures import figure

# What the CUDA context of one process takes beside the allocator.
CONTEXT_GB = figure("shared", "context_gb")


@dataclass(frozen=True)
class Card:
    """The device a job runs on.

    Attributes:
        name: as the driver gives it; ``CPU`` for none.
        memory_gib: memory that the driver reports, in GiB (a T4 reports 14.6 of its 16).
        capability: CUDA compute capability, such as (7, 5); (0, 0) for a CPU.
        count: cards of this kind that the job trains on.
    """

    name: str
    memory_gib: float
    capability: tuple[int, int] = (0, 0)
    count: int = 1

    @property
    def is_cpu(self) -> bool:
        return self.capability == (0, 0)

    @property
    def has_bf16(self) -> bool:
        return self.capability >= (8, 0)

    @property
    def budget_gb(self) -> float:
        """GB (1e9 bytes) that training may plan with: the CUDA context and fragmentation take their share first."""
        return (self.memory_gib * 1.0737 - CONTEXT_GB) * 0.97


CPU = Card("CPU", 0.0)
# What the driver reports for the cards of SageMaker's instances.
CARDS = {
    "T4": Card("T4", 14.6, (7, 5)),
    "V100": Card("V100", 15.8, (7, 0)),
    "A10G": Card("A10G", 22.3, (8, 6)),
    "L4": Card("L4", 22.0, (8, 9)),
    "L40S": Card("L40S", 44.4, (8, 9)),
    "A100-40": Card("A100-40", 39.4, (8, 0)),
    "A100-80": Card("A100-80", 79.2, (8, 0)),
    "H100": Card("H100", 79.1, (9, 0)),
    "H200": Card("H200", 139.8, (9, 0)),
    "B200": Card("B200", 178.0, (10, 0)),
    "CPU": CPU,
}


def find_card(name: str) -> Card:
    """A card by the name that ``dreambooth-sm plan --gpu`` takes: one of :data:`CARDS`, or a size such as ``8GB``.

    Raises:
        UserError: for an unknown name.
    """
    if known := {key.lower(): card for key, card in CARDS.items()}.get(name.lower()):
        return known
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*GB", name, re.IGNORECASE):
        # The driver keeps some 3 % of a card for itself.
        return Card(f"{size[1]} GB card", float(size[1]) * 0.97, (8, 6))
    raise UserError(f"--gpu {name}: unknown card; set one of {', '.join(CARDS)}, or a size such as 8GB")


def detect_card() -> Card:
    """The CUDA devices of this process, or the CPU. A cap on the process' share of memory counts."""
    import torch

    if not torch.cuda.is_available():
        return CPU
    device = torch.cuda.get_device_properties(0)
    share = torch.cuda.get_per_process_memory_fraction()
    return Card(device.name, device.total_memory / 2**30 * share, (device.major, device.minor))
