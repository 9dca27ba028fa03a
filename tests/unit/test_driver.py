"""What is said where the image's CUDA does not serve the host's driver or card."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_sm.driver import OLDEST_DRIVER, CudaBuild, Host, find_host, find_mismatch

# What the builds of torch 2.10 for these versions list.
CUDA_12 = CudaBuild("12.8", ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
CUDA_13 = CudaBuild("13.0", ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_110", "sm_120", "compute_120"])
T4, L4, V100 = ("Tesla T4", (7, 5)), ("NVIDIA L4", (8, 9)), ("Tesla V100-SXM2-16GB", (7, 0))


@pytest.mark.parametrize(
    ("driver", "card", "build", "words"),
    [
        (
            "470.256.02",
            T4,
            CUDA_12,
            ["Tesla T4", "driver 470.256.02", "CUDA 12.8 needs driver 525", "base with CUDA 11"],
        ),
        ("570.172.08", L4, CUDA_13, ["NVIDIA L4", "CUDA 13.0 needs driver 580", "base with CUDA 12"]),
        ("418.40", T4, CUDA_12, ["newer driver"]),
        ("580.65.06", V100, CUDA_13, ["compute capability 7.0", "sm_75", "another instance type"]),
        ("580.65.06", T4, CudaBuild(None), ["without CUDA", "base with CUDA 13"]),
    ],
)
def test_a_mismatch_is_named_with_what_would_work(
    driver: str, card: tuple[str, tuple[int, int]], build: CudaBuild, words: list[str]
) -> None:
    reason = find_mismatch(Host(driver, *card), build)
    assert reason is not None
    assert "\n" not in reason
    for word in words:
        assert word in reason


@pytest.mark.parametrize(
    ("driver", "card", "build"),
    [
        ("525.60.13", V100, CUDA_12),
        ("535.183.01", T4, CUDA_12),
        ("550.163.01", L4, CUDA_12),  # sm_86 runs on it
        ("580.65.06", L4, CUDA_13),
        ("590.10", ("the next card", (13, 0)), CUDA_13),  # compiles the PTX
    ],
)
def test_what_fits_is_passed(driver: str, card: tuple[str, tuple[int, int]], build: CudaBuild) -> None:
    assert find_mismatch(Host(driver, *card), build) is None


def test_a_container_without_the_driver_is_told_of_the_gpus_option() -> None:
    assert "--gpus all" in (find_mismatch(None, CUDA_12) or "")


@given(driver=st.integers(400, 700), cuda=st.sampled_from(sorted(OLDEST_DRIVER)))
def test_the_cuda_that_is_advised_fits_the_driver(driver: int, cuda: int) -> None:
    reason = find_mismatch(Host(f"{driver}.1", *T4), CudaBuild(f"{cuda}.1", ["sm_75"]))
    assert (reason is None) == (driver >= OLDEST_DRIVER[cuda])
    for other, oldest in OLDEST_DRIVER.items():
        if reason and f"base with CUDA {other}" in reason:
            assert driver >= oldest


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo '535.183.01, Tesla T4, 7.5'", Host("535.183.01", *T4)),
        ("echo 'NVIDIA-SMI has failed'; exit 9", None),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'", None),
    ],
)
def test_the_host_is_asked_of_nvidia_smi(
    answer: str, expected: Host | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert find_host() == expected


def test_a_machine_without_the_driver_has_no_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_host() is None
