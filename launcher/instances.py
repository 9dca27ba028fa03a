"""The instance types that a job can run on: their cards, disks and prices."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from dreambooth_sm.errors import UserError
from dreambooth_sm.planning.cards import CARDS, Card

# On-demand prices of training, in dollars an hour. Where a price is missing, so is the estimate of the cost.
PRICES = "us-west-2, November 2026"


@dataclass(frozen=True)
class Instance:
    """An instance type of SageMaker training.

    Attributes:
        name: such as ``ml.g5.xlarge``.
        card: its card, and how many of them; the CPU where there is none.
        usd_per_hour: see :data:`PRICES`; None where it is not known.
        has_own_disk: NVMe disks of a fixed size, encrypted by themselves; otherwise a volume of the size asked for.
    """

    name: str
    card: Card
    count: int = 1
    usd_per_hour: float | None = None
    has_own_disk: bool = True


def _family(family: str, card: str, sizes: dict[str, tuple[int, float | None]]) -> list[Instance]:
    return [
        Instance(f"ml.{family}.{size}", CARDS[card], count, price, has_own_disk=family != "p3")
        for size, (count, price) in sizes.items()
    ]


INSTANCES = {
    instance.name: instance
    for instance in [
        *_family(
            "g4dn",
            "T4",
            {
                "xlarge": (1, 0.736),
                "2xlarge": (1, 0.94),
                "4xlarge": (1, None),
                "8xlarge": (1, None),
                "12xlarge": (4, None),
                "16xlarge": (1, None),
            },
        ),
        *_family(
            "g5",
            "A10G",
            {
                "xlarge": (1, 1.408),
                "2xlarge": (1, 1.515),
                "4xlarge": (1, 2.03),
                "8xlarge": (1, None),
                "12xlarge": (4, 7.09),
                "16xlarge": (1, None),
                "24xlarge": (4, None),
                "48xlarge": (8, 20.36),
            },
        ),
        *_family(
            "g6",
            "L4",
            {
                "xlarge": (1, 1.127),
                "2xlarge": (1, 1.222),
                "4xlarge": (1, 1.654),
                "8xlarge": (1, None),
                "12xlarge": (4, 5.752),
                "16xlarge": (1, None),
                "24xlarge": (4, None),
                "48xlarge": (8, None),
            },
        ),
        *_family(
            "g6e",
            "L40S",
            {
                "xlarge": (1, 2.61),
                "2xlarge": (1, 2.80),
                "4xlarge": (1, None),
                "8xlarge": (1, None),
                "12xlarge": (4, 13.12),
                "16xlarge": (1, None),
                "24xlarge": (4, None),
                "48xlarge": (8, None),
            },
        ),
        *_family("p3", "V100", {"2xlarge": (1, None), "8xlarge": (4, None), "16xlarge": (8, None)}),
        *_family("p4d", "A100-40", {"24xlarge": (8, 25.25)}),
        *_family("p4de", "A100-80", {"24xlarge": (8, None)}),
        *_family("p5", "H100", {"4xlarge": (1, None), "48xlarge": (8, 63.30)}),
        *_family("p5e", "H200", {"48xlarge": (8, None)}),
        *_family("p5en", "H200", {"48xlarge": (8, None)}),
        *_family("p6-b200", "B200", {"48xlarge": (8, None)}),
    ]
}
# General-purpose families without a GPU; those with a `d` have disks of their own.
_CPU_TYPE = re.compile(r"ml\.[cmrt]\d+[a-z]*(-flex)?\.\d*x?large|ml\.t3\.medium")


def find_instance(name: str) -> Instance:
    """An instance type by its name.

    Raises:
        UserError: for a name that is not an instance type with NVIDIA cards or CPUs alone.
    """
    if instance := INSTANCES.get(name):
        return instance
    if _CPU_TYPE.fullmatch(name):
        return Instance(name, CARDS["CPU"], has_own_disk="d" in name.split(".")[1])
    near = difflib.get_close_matches(name, INSTANCES, n=3, cutoff=0.6)
    hint = f"set {' or '.join(near)}" if near else "set a type with an NVIDIA card, such as ml.g5.xlarge"
    raise UserError(f"instance_type={name!r}: no instance type that this job can run on; {hint}")
