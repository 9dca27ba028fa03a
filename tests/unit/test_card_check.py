"""Which card a job uses, and what is said where it can't: whatever CUDA the installed torch was built with."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreambooth_sm import preflight
from dreambooth_sm.distributed import World
from dreambooth_sm.driver import CudaBuild, Host
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.planning.cards import CPU, Card
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.sagemaker import Contract

# What the index gives on Linux, with and without a GPU.
CUDA_13 = CudaBuild("13.0", ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"])
V100 = Card("Tesla V100", 15.8, (7, 0))
HERE, ON_GPU = Contract(Path("/opt/ml")), Contract(Path("/opt/ml"), instance_type="ml.g4dn.xlarge")
ALONE = World()


def check(
    monkeypatch: pytest.MonkeyPatch, contract: Contract, card: Card, host: Host | None = None, use_cpu: bool = False
) -> Plan:
    monkeypatch.setattr(preflight, "detect_card", lambda: card)
    monkeypatch.setattr(preflight, "find_cuda_build", lambda: CUDA_13)
    monkeypatch.setattr(preflight, "find_host", lambda: host)
    h = Hyperparameters(instance_prompt="photo of zwx toy", class_prompt="photo of a toy", use_cpu=use_cpu)
    return preflight.plan_for_card(h, contract, ALONE)


def test_a_machine_without_a_gpu_trains_on_its_cpu_with_a_cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    made = check(monkeypatch, HERE, CPU)
    assert made.device == "cpu"
    assert not any("on the CPU:" in note for note in made.notes)


def test_a_card_without_kernels_is_refused_unless_the_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"compute capability 7\.0"):
        check(monkeypatch, HERE, V100)
    assert check(monkeypatch, HERE, V100, use_cpu=True).device == "cpu"


def test_a_gpu_instance_whose_card_is_not_seen_ends_the_job_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"ml\.g4dn\.xlarge, and torch sees no GPU: .*needs driver 580"):
        check(monkeypatch, ON_GPU, CPU, Host("535.183.01", "Tesla T4", (7, 5)))
    assert check(monkeypatch, ON_GPU, CPU, use_cpu=True).device == "cpu"


@pytest.mark.parametrize(("visible", "told"), [(None, True), ("0", True), ("", False), ("-1", False)])
def test_elsewhere_a_card_that_the_driver_is_too_old_for_is_named_in_the_plan(
    visible: str | None, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    made = check(monkeypatch, HERE, CPU, Host("535.183.01", "Tesla T4", (7, 5)))
    assert made.device == "cpu"
    assert any("needs driver 580" in note for note in made.notes) == told
