"""Compiles the Triton kernels for cards that are not there, so that jobs don't.

    python -m dreambooth_sm.training.kernel_builds FOLDER

The image holds what this makes, an architecture a folder, each in the layout of Triton's cache. A job puts those of its
card into its own cache; what it finds nothing for, such as another type of values, it compiles as without them.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import dreambooth_sm.quiet  # noqa: F401 - what jobs set for Triton is part of what it looks kernels up by
from dreambooth_sm.training.kernels import folder_of, launchers_of, obstacle
from dreambooth_sm.training.moments import BLOCK_FORMATS, BlockFormat, DeviceScalars, Moments
from dreambooth_sm.training.quantised import LEVELS, quantise

# Compute capability, and the type that plans for such cards compute in.
ARCHITECTURES = {
    (7, 5): torch.float16,  # T4
    (8, 0): torch.bfloat16,  # A100
    (8, 6): torch.bfloat16,  # A10G
    (8, 9): torch.bfloat16,  # L4, L40S
    (9, 0): torch.bfloat16,  # H100, H200
    (10, 0): torch.bfloat16,  # B200
    (12, 0): torch.bfloat16,  # RTX Pro 6000
}
# Stable Diffusion is drawn in the first, and VAEs that overflow in it in the second.
_DRAWN = (torch.float16, torch.float32)


class StandIn:
    """Stands in for the driver of a card, whose number is its architecture's."""

    def __init__(self, major: int, minor: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return int(self._target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[list[Any]]:
    """Kernels that are launched inside are compiled for an architecture in place of that, and listed."""
    import triton
    from triton.runtime import driver

    found: list[Any] = []
    run = triton.JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        found.append(run(kernel, *arguments, warmup=True, **options))
        return found[-1]

    before = driver._active
    driver._active, triton.JITFunction.run = StandIn(*capability), compile_only
    try:
        yield found
    finally:
        driver._active, triton.JITFunction.run = before, run


def launch_all(dtype: torch.dtype, *, as_trained: bool = False) -> None:
    """Launches each kernel in all the ways that Triton tells apart: types, options, and numbers divisible by 16.

    Args:
        dtype: of weights and activations in training.
        as_trained: leaves out other types, which are drawn in, and all moments of the optimizer but those of 8 bits
            with residuals.
    """
    launch_quantised(dtype)
    launch_group_norm(dtype)
    launch_transformers_of_unets(dtype)
    for drawn in () if as_trained else {*_DRAWN} - {dtype}:
        launch_group_norm(drawn, backward=False)
        launch_transformers_of_unets(drawn, backward=False)
    launch_rms_norm(dtype)
    launch_modulation(dtype)
    for fmt in [BLOCK_FORMATS[8]] if as_trained else BLOCK_FORMATS.values():
        for residual in (True,) if as_trained else (True, False):
            launch_optimizer(dtype, fmt, residual=residual)


def launch_quantised(dtype: torch.dtype) -> None:
    from dreambooth_sm.training import quantised_triton as kernels

    kernels.scaled(*quantise(torch.ones(64, 128), "int8", dtype))
    kernels.dequantised(*quantise(torch.ones(64, 128), "nf4", dtype), torch.tensor(LEVELS, dtype=dtype))


def launch_group_norm(dtype: torch.dtype, *, backward: bool = True) -> None:
    from dreambooth_sm.training import group_norm_triton as kernels

    image = torch.ones(2, 64, 8, 8, dtype=dtype).to(memory_format=torch.channels_last)
    weight, bias, shift = torch.ones(64, dtype=dtype), torch.ones(64, dtype=dtype), torch.ones(2, 64, dtype=dtype)
    _, mean, rstd = kernels.forward(image, weight, bias, shift, bias, 32, 1e-5, True)
    for of_added in (True, False) if backward else ():
        kernels.backward(image, image, mean, rstd, weight, bias, shift, bias, True, True, of_added)


def launch_transformers_of_unets(dtype: torch.dtype, *, backward: bool = True) -> None:
    """Of Stable Diffusion's widths, each of which has room of its own."""
    from dreambooth_sm.training import geglu_triton, layer_norm_triton

    for width in (320, 640, 1280):
        x, weight = torch.ones(1, 2, width, dtype=dtype), torch.ones(width, dtype=dtype)
        layer_norm_triton.norm(x, weight, weight, 1e-5)
        if backward:
            layer_norm_triton.norm_grad(x, x, weight, 1e-5)
    projected = torch.ones(1, 2, 2560, dtype=dtype)
    geglu_triton.gate(projected)
    if backward:
        geglu_triton.gate_grad(projected[..., :1280].contiguous(), projected)


def launch_rms_norm(dtype: torch.dtype) -> None:
    """Of transformers of these widths and numbers of heads, which share kernels: a kernel has room for 4096 numbers."""
    from dreambooth_sm.training import rms_norm_triton as kernels

    x, weight = torch.ones(1, 2, 3840, dtype=dtype), torch.ones(3840, dtype=dtype)
    for factor in (None, torch.ones(1, 3840, dtype=dtype)):
        for added in (None, x):
            kernels.scaled(x, weight, 1e-5, factor, added)
        kernels.scaled_grad(x, x, weight, 1e-5, factor)
    heads, turns = x.unflatten(-1, (30, 128)), torch.ones(1, 2, 64, 2)
    kernels.turned(heads, weight[:128], 1e-5, turns, heads)
    kernels.turned_grad(heads, heads, weight[:128], 1e-5, turns, heads)
    kernels.gated(x, x, x)
    kernels.gated_grad(x, x, x, x, x)


def launch_modulation(dtype: torch.dtype) -> None:
    """As `launch_rms_norm`."""
    from dreambooth_sm.training import modulation_triton as kernels

    x, row = torch.ones(1, 2, 3072, dtype=dtype), torch.ones(1, 3072, dtype=dtype)
    kernels.modulated(x, row, row, 1e-6)
    for other in (None, x):
        kernels.modulated_grad(x, other, x, row, 1e-6)
        kernels.gated_sum(other, row, x)


def launch_optimizer(dtype: torch.dtype, fmt: BlockFormat, *, residual: bool) -> None:
    from dreambooth_sm.training import adamw_blockwise_triton as kernels

    cpu = torch.device("cpu")
    scalars = DeviceScalars(torch.zeros(2, 8), torch.zeros(2), torch.zeros(()))
    parameter, blocks = torch.ones(4096, dtype=dtype), fmt.blocks(4096)
    moments = Moments.zeros(blocks, fmt, residual, cpu)
    kernels.update(parameter, parameter, moments, scalars, index=0, group=0, fmt=fmt)
    table = kernels.bundle_table([(parameter.data_ptr(), 4096, 0, 0, 0)], fmt, cpu)
    kernels.update_bundle(table, dtype, parameter, moments, scalars, fmt=fmt)
    kernels.average(torch.ones(4096), parameter, moments.residual, torch.ones(()))


def build(folder: Path, capability: tuple[int, int]) -> int:
    """Compiles all kernels for one architecture into its folder.

    Returns:
        how many.
    """
    return len({kernel.hash for kernel in _compiled(folder, capability)})


def _compiled(folder: Path, capability: tuple[int, int]) -> list[Any]:
    """All kernels of an architecture; those that are in its folder are read."""
    from triton import knobs

    knobs.cache.dir = str(folder_of(capability, folder))
    knobs.compilation.store_binary_only = True  # the rest is for people
    with compiling_for(capability) as found:
        launch_all(ARCHITECTURES[capability])
    return found


def build_launchers(folder: Path, capability: tuple[int, int]) -> None:
    """Compiles what Triton until 3.6 calls each kernel and the driver with: C, the same for all architectures.

    Later versions look what they compile for the driver up by where its library lies, which no image knows.

    Args:
        capability: of an architecture whose kernels are built.
    """
    from triton import knobs
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return
    kernels = _compiled(folder, capability)
    knobs.cache.dir = str(launchers_of(folder))
    with tempfile.TemporaryDirectory() as libraries:
        link_stand_in(Path(libraries), Path(driver.include_dirs[0]))
        knobs.nvidia.libcuda_path = libraries
        with suppress(ImportError):  # a machine without a driver can compile it, and not load it
            driver.CudaUtils()
        for kernel in kernels:
            with suppress(ImportError):
                driver.CudaLauncher(kernel.src, kernel.metadata)


def link_stand_in(libraries: Path, headers: Path) -> None:
    """Makes a ``libcuda.so.1`` to link with: it has all functions of the driver, which do nothing."""
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", (headers / "cuda.h").read_text(encoding="utf-8"))))
    source = "".join(f"int {name}(void) {{ return 999; }}\n" for name in names)
    command = [os.environ.get("CC", "gcc"), "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-"]
    subprocess.run([*command, "-o", str(libraries / "libcuda.so.1")], input=source, text=True, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if reason := obstacle():
        print(f"{reason}: {folder} stays empty")
        return
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        counts = list(pool.map(partial(build, folder), ARCHITECTURES))
        pool.submit(build_launchers, folder, next(iter(ARCHITECTURES))).result()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{sum(counts)} kernels for {len(counts)} architectures, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
