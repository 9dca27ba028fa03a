"""Every Triton kernel compiles for every card, to machine code and within its shared memory, and jobs find those that
were compiled before; no card is needed for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dreambooth_sm.planning.cards import CARDS
from dreambooth_sm.training.kernel_builds import ARCHITECTURES, compiling_for, launch_all, link_stand_in
from dreambooth_sm.training.kernels import LEAST, folder_of, take_builds
from tests.helpers.patience import PATIENCE

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.slow

# Kilobytes of shared memory that a program may have.
SHARED = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
# Those that kernels are compiled for in all ways: the oldest, and the one that figures are measured on.
WHOLE = ((7, 5), (9, 0))
# What the image has is made for this one; its kernels are compiled once for all tests.
BUILT = (9, 0)
KERNELS = {
    *("_scale", "_dequantise", "_update_one", "_update_many", "_average", "_moments", "_statistics", "_apply", "_sums"),
    *("_group_means", "_input_grad", "_affine_grads", "_added_grads"),
    *("_scaled", "_scaled_grad", "_turned", "_turned_grad", "_gated", "_gated_grad"),
    *("_modulated", "_modulated_grad", "_gated_sum"),
    *("_norm", "_norm_grad", "_gate", "_gate_grad"),
}


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_kernels_compile(
    capability: tuple[int, int], built: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder_of(BUILT, built[0]) if capability == BUILT else tmp_path))
    with compiling_for(capability) as compiled:
        launch_all(ARCHITECTURES[capability], as_trained=capability not in WHOLE)
    assert {kernel.metadata.name for kernel in compiled} == KERNELS
    architecture = 10 * capability[0] + capability[1]
    for kernel in compiled:
        assert kernel.asm["cubin"]
        assert kernel.metadata.target.arch == architecture
        assert capability == BUILT or f"sm_{architecture}" in kernel.asm["ptx"]  # builds keep machine code alone
        assert kernel.metadata.shared <= 1024 * SHARED[capability]


def test_there_are_kernels_for_the_cards_of_all_instances() -> None:
    assert {card.capability for card in CARDS.values() if card.capability >= LEAST} <= {*ARCHITECTURES}


BUILD = f"""
import sys
from importlib.util import find_spec
from pathlib import Path
from dreambooth_sm.training.kernel_builds import build, build_launchers

print(build(Path(sys.argv[1]), {BUILT}))
build_launchers(Path(sys.argv[1]), {BUILT})
"""
# A job's launches at a model's true sizes; prints the kernels that Triton had to compile.
JOB = """
import json, sys
from pathlib import Path
import dreambooth_sm.quiet
import torch, triton
from dreambooth_sm.training import adamw_blockwise_triton, group_norm_triton, modulation_triton, quantised_triton
from dreambooth_sm.training import geglu_triton, layer_norm_triton, rms_norm_triton
from dreambooth_sm.training.kernel_builds import compiling_for
from dreambooth_sm.training.kernels import take_builds
from dreambooth_sm.training.moments import BLOCK_FORMATS, DeviceScalars, Moments

compiled = []
def listen(src, metadata, metadata_group, times, cache_hit):
    if not cache_hit:
        compiled.append(metadata["name"])
triton.knobs.compilation.listener = listen
take_builds((9, 0), Path(sys.argv[1]))
bf16 = {"dtype": torch.bfloat16}
with compiling_for((9, 0)) as launched:
    for channels, side, silu in ((320, 64, True), (1920, 16, True), (2560, 9, True), (640, 32, False)):
        for shift in (None, torch.ones(2, channels, **bf16)):
            image = torch.ones(2, channels, side, side, **bf16).to(memory_format=torch.channels_last)
            weight, bias = torch.ones(2, channels, **bf16)
            offset = None if shift is None else bias
            _, mean, rstd = group_norm_triton.forward(image, weight, bias, shift, offset, 32, 1e-5, silu)
            for affine in (True, False):
                added = shift is not None
                group_norm_triton.backward(image, image, mean, rstd, weight, bias, shift, offset, silu, affine, added)
    for drawn in ({"dtype": torch.float16}, {"dtype": torch.float32}):
        image = torch.ones(8, 320, 64, 64, **drawn).to(memory_format=torch.channels_last)
        group_norm_triton.forward(image, *torch.ones(2, 320, **drawn), None, None, 32, 1e-6, True)
    for width, words in ((320, 4096), (640, 1024), (1280, 77), (1280, 81)):
        for kind in (torch.bfloat16, torch.float16):
            x, weight = torch.ones(2, words, width, dtype=kind), torch.ones(width, dtype=kind)
            both = torch.ones(2, words, 8 * width, dtype=kind)
            layer_norm_triton.norm(x, weight, weight, 1e-5)
            geglu_triton.gate(both)
            if kind == torch.bfloat16:
                layer_norm_triton.norm_grad(x, x, weight, 1e-5)
                geglu_triton.gate_grad(both[..., : 4 * width].contiguous(), both)
    for words in (512, 1056):
        x, weight, factor = torch.ones(2, words, 3840, **bf16), torch.ones(3840, **bf16), torch.ones(2, 3840, **bf16)
        rms_norm_triton.scaled(x, weight, 1e-5, factor, None)
        rms_norm_triton.scaled(x, weight, 1e-5, None, x)
        rms_norm_triton.scaled_grad(x, x, weight, 1e-5, factor)
        heads, turns = x.unflatten(-1, (30, 128)), torch.ones(2, words, 64, 2)
        rms_norm_triton.turned(heads, weight[:128], 1e-5, turns, heads)
        rms_norm_triton.turned_grad(heads, heads, weight[:128], 1e-5, turns, heads)
        gate = torch.ones(2, words, 10240, **bf16)
        rms_norm_triton.gated(gate, gate, gate)
        rms_norm_triton.gated_grad(gate, gate, gate, gate, gate)
    # Of klein models: both sequences' heads in one, and projections that are cut.
    for heads, inner in ((24, 9216), (32, 12288)):
        x, row = torch.ones(2, 512, heads * 128, **bf16), torch.ones(2, heads * 128, **bf16)
        both, turns = torch.ones(2, 4608, heads, 128, **bf16), torch.ones(1, 4608, 64, 2).expand(2, -1, -1, -1)
        part, own = x.unflatten(-1, (heads, 128)), turns[:, :512]
        rms_norm_triton.turned(part, row[0, :128], 1e-6, own, both[:, :512])
        rms_norm_triton.turned_grad(both[:, :512], part, row[0, :128], 1e-6, own, part)
        projected = torch.ones(2, 512, 3 * heads * 128 + 2 * inner, **bf16)
        cut = projected[..., :heads * 128].unflatten(-1, (heads, 128))
        rms_norm_triton.turned(cut, row[0, :128], 1e-6, own, part)
        rms_norm_triton.turned_grad(part, cut, row[0, :128], 1e-6, own, cut)
        gate, hidden = projected[..., 3 * heads * 128:].chunk(2, -1)
        rms_norm_triton.gated(gate, hidden, hidden)
        rms_norm_triton.gated_grad(hidden, gate, hidden, gate, hidden)
        modulation_triton.modulated(x, row, row, 1e-6)
        for other in (None, x):
            modulation_triton.modulated_grad(x, other, x, row, 1e-6)
            modulation_triton.gated_sum(other, row, x)
    quantised_triton.scaled(torch.ones(1280, 320, dtype=torch.int8), torch.ones(1280, 1, **bf16))
    codes = torch.ones(1280, 160, dtype=torch.uint8)
    quantised_triton.dequantised(codes, torch.ones(6400, 1, **bf16), torch.ones(16, **bf16))
    scalars = DeviceScalars(torch.zeros(2, 8), torch.zeros(2), torch.zeros(()))
    for fmt in BLOCK_FORMATS.values():
        for count in (320 * 320, 320 * 4 * 9):
            moments = Moments.zeros(fmt.blocks(count), fmt, True, torch.device("cpu"))
            weight = torch.ones(count, **bf16)
            adamw_blockwise_triton.update(weight, weight, moments, scalars, index=3, group=1, fmt=fmt)
            table = adamw_blockwise_triton.bundle_table([(weight.data_ptr(), count, 0, 1, 3)], fmt, moments.m.device)
            adamw_blockwise_triton.update_bundle(table, torch.bfloat16, weight, moments, scalars, fmt=fmt)
            adamw_blockwise_triton.average(torch.ones(count), weight, moments.residual, torch.ones(()))
# What Triton would have a C compiler make, if it had one.
from triton.backends.nvidia import driver
if hasattr(driver, "make_launcher"):
    driver.CudaUtils()
    for kernel in launched:
        driver.CudaLauncher(kernel.src, kernel.metadata)
print(json.dumps([compiled, len(launched)]))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """What the image has for one architecture, and how many kernels."""
    folder = tmp_path_factory.mktemp("builds")
    count = _printed(BUILD, folder / "builds", TRITON_CACHE_DIR=str(folder / "unused"))
    return folder / "builds", int(count)


def test_jobs_find_what_was_compiled_before(built: tuple[Path, int], tmp_path: Path) -> None:
    (builds, count), cache = built, tmp_path / "cache"
    kernels = {path.name for path in (builds / "sm_90").iterdir()}
    assert len(kernels) == count
    driver = tmp_path / "driver"
    driver.mkdir()
    link_stand_in(driver, Path(find_spec("triton").origin).parent / "backends/nvidia/include")
    # The job has no C compiler.
    places = {"LD_LIBRARY_PATH": str(driver), "TRITON_LIBCUDA_PATH": str(driver), "CC": "/bin/false"}
    compiled, launched = json.loads(_printed(JOB, builds, TRITON_CACHE_DIR=str(cache), **places))
    assert compiled == []
    assert launched > 50
    assert kernels <= {path.name for path in cache.iterdir()}


def _printed(script: str, builds: Path, **environment: str) -> str:
    command = [sys.executable, "-c", script, str(builds)]
    run = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_without_compiled_kernels_jobs_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    take_builds((9, 0), tmp_path / "nowhere")
    assert not (tmp_path / "cache").exists()
