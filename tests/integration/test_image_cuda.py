"""The image on a real CUDA build of torch, run without a GPU: `make test-cuda-image`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest

from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_OK
from tests.helpers.containers import STRICT, TAG, build, docker, mounts, python_in, running
from tests.helpers.jobs import Ended, JobTree, end, read_weights

BASE = os.environ.get("CUDA_BASE_IMAGE", "")
OLD_DRIVER = "#!/bin/sh\necho '535.183.01, Tesla T4, 7.5'\n"

pytestmark = pytest.mark.skipif(not BASE, reason="`make test-cuda-image` makes its base image")


@pytest.fixture(scope="module")
def image() -> str:
    tag = f"{TAG}-cuda"
    done = build(f"BASE_IMAGE={BASE}", "WITH_BITSANDBYTES=1", tag=tag)
    assert done.returncode == 0, done.stderr[-4000:]
    return tag


@pytest.fixture
def run(image: str, lay_out_job: Callable[..., JobTree]) -> Callable[..., tuple[JobTree, Ended]]:
    """Runs a small job, on an instance of this type and with an ``nvidia-smi`` that answers as on the host."""

    def run(instance_type: str = "", nvidia_smi: str = "", **hyperparameters: str) -> tuple[JobTree, Ended]:
        job = lay_out_job(class_prompt="None", **hyperparameters)
        resources = {"hosts": ["algo-1"], "current_instance_type": instance_type}
        job.write("input/config/resourceconfig.json", json.dumps(resources))
        job.write("nvidia-smi", nvidia_smi)
        options = mounts(job.base)
        if nvidia_smi:
            (job.base / "nvidia-smi").chmod(0o755)
            options.append(f"--volume={job.base}/nvidia-smi:/usr/bin/nvidia-smi:ro")
        with running(*STRICT, *options, image, "train") as container:
            return job, end(container.process)

    return run


def test_the_bases_torch_stays_and_has_cuda(image: str) -> None:
    code = "import torch; print(torch.__version__, torch.version.cuda)"
    assert python_in(image, code) == python_in(BASE, code)
    assert "None" not in python_in(image, code)


def test_what_we_add_to_the_base_is_small(image: str) -> None:
    sizes = [int(docker("image", "inspect", "--format={{.Size}}", name).stdout) for name in (BASE, image)]
    assert sizes[1] - sizes[0] < 1.1e9, "packages with bitsandbytes, the compiler and our code"


def test_the_kernels_of_all_cards_are_there(image: str) -> None:
    code = """
from dreambooth_sm.training.kernel_builds import ARCHITECTURES
from dreambooth_sm.training.kernels import BUILDS, folder_of
print(min(len(list(folder_of(each, BUILDS).glob("*/*.cubin"))) for each in ARCHITECTURES))
"""
    assert int(python_in(image, code)) > 30


def test_bitsandbytes_has_kernels_for_this_cuda(image: str) -> None:
    code = """
import ctypes, pathlib, bitsandbytes, torch
major = torch.version.cuda.partition(".")[0]
(*_, newest) = sorted(pathlib.Path(bitsandbytes.__file__).parent.glob(f"libbitsandbytes_cuda{major}?.so"))
print(bool(ctypes.CDLL(str(newest)).cadam_8bit_blockwise_grad_fp32))
"""
    assert python_in(image, code) == "True"


def test_a_whole_job_ends_well_on_the_cpu(run: Callable[..., tuple[JobTree, Ended]]) -> None:
    job, ended = run()
    assert ended.code == EXIT_OK, ended.log
    assert all(tensor.isfinite().all() for tensor in read_weights(job.model, "unet").values())
    assert "kernels-community" not in ended.log, "what bitsandbytes says of its CPU kernels"


@pytest.mark.parametrize(
    ("nvidia_smi", "words"),
    [
        ("", "no NVIDIA driver is to be seen in this container; start it with --gpus all"),
        (OLD_DRIVER, "a Tesla T4 with driver 535.183.01, and the image's CUDA 13.0 needs driver 580 or newer; rebuild"),
    ],
)
def test_a_gpu_instance_is_told_what_its_driver_lacks(
    nvidia_smi: str, words: str, run: Callable[..., tuple[JobTree, Ended]]
) -> None:
    job, ended = run("ml.g4dn.xlarge", nvidia_smi)
    assert ended.code == EXIT_BAD_INPUT, ended.log
    assert "the instance is a ml.g4dn.xlarge, and torch sees no GPU: " in (job.failure or "")
    assert words in (job.failure or "")


def test_elsewhere_the_job_goes_to_the_cpu_and_says_why(run: Callable[..., tuple[JobTree, Ended]]) -> None:
    _, ended = run(nvidia_smi=OLD_DRIVER)
    assert ended.code == EXIT_OK, ended.log
    assert "plan: on the CPU: the host has a Tesla T4 with driver 535.183.01" in ended.log
