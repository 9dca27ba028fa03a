"""Whether the CUDA of this torch can work with the host's driver and card, and what would where it can't."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

# The oldest driver of each CUDA, by major versions: a driver serves all minor versions of its own CUDA, and older ones.
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


@dataclass(frozen=True)
class Host:
    """The machine, as the NVIDIA driver describes it.

    Attributes:
        driver: its version, such as ``535.183.01``.
        card: name of the first card.
        capability: its CUDA compute capability, such as (7, 5).
    """

    driver: str
    card: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class CudaBuild:
    """The CUDA of a torch.

    Attributes:
        cuda: version, such as ``12.8``; None for a build without.
        kernels: what it was compiled for, as torch lists it where it sees a card: ``sm_86`` for machine code,
            ``compute_90`` for PTX.
    """

    cuda: str | None
    kernels: Sequence[str] = ()

    def serves(self, capability: tuple[int, int]) -> bool:
        """Whether a card runs these kernels: machine code of its own major version, or PTX, up to its own version."""
        for kind, major, minor in (_parse(kernel) for kernel in self.kernels):
            if (major, minor) <= capability and (kind == "compute" or major == capability[0]):
                return True
        return False


def find_host() -> Host | None:
    """The driver and the first card of this machine; None without."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name,compute_cap", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        driver, card, capability = (word.strip() for word in answer.strip().split(","))
        major, minor = capability.split(".")
        return Host(driver, card, (int(major), int(minor)))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def find_cuda_build() -> CudaBuild:
    """The torch that is installed."""
    import torch

    return CudaBuild(torch.version.cuda, torch.cuda.get_arch_list())


def find_mismatch(host: Host | None, build: CudaBuild) -> str | None:
    """Says in a line why this torch can't use the host's card and what would help; None where nothing is in the way."""
    if host is None:
        return (
            "no NVIDIA driver is to be seen in this container; start it with --gpus all, on a host with the driver and "
            "the NVIDIA Container Toolkit"
        )
    here = f"the host has a {host.card} with driver {host.driver}"
    newest = max((cuda for cuda, oldest in OLDEST_DRIVER.items() if _major(host.driver) >= oldest), default=None)
    fitting = f"rebuild the image on a base with CUDA {newest}" if newest else "choose a host with a newer driver"
    if build.cuda is None:
        return f"{here}, and the image's torch is a build without CUDA; {fitting} (build_and_push.sh --base-image)"
    needed = OLDEST_DRIVER.get(_major(build.cuda))
    if needed and _major(host.driver) < needed:
        return (
            f"{here}, and the image's CUDA {build.cuda} needs driver {needed} or newer; {fitting} "
            "(build_and_push.sh --base-image), or choose an instance type with a newer driver"
        )
    return find_missing_kernels(host.card, host.capability, build)


def find_missing_kernels(card: str, capability: tuple[int, int], build: CudaBuild) -> str | None:
    """Says in a line why this torch has nothing to run on a card; None where it has, or where it is not known."""
    if build.cuda is None or not build.kernels or build.serves(capability):
        return None
    version = ".".join(map(str, capability))
    return (
        f"the {card} has compute capability {version}, and the image's torch with CUDA {build.cuda} was compiled for "
        f"{', '.join(build.kernels)}; choose another instance type, or rebuild the image on a base whose torch has it "
        "(build_and_push.sh --base-image)"
    )


def _parse(kernel: str) -> tuple[str, int, int]:
    """``sm_86``, ``sm_90a`` and ``compute_120`` in parts."""
    found = re.match(r"(sm|compute)_(\d+)(\d)", kernel)
    return (found[1], int(found[2]), int(found[3])) if found else ("", 0, 0)


def _major(version: str) -> int:
    return int(version.partition(".")[0])
