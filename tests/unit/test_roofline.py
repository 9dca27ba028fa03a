"""The roofline: what is counted of a step, what is fitted, and what cards that were not measured are computed by."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import roofline as counted
from benchmarks.roofline import Work, fitted, grouped
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.planning.cards import CARDS
from dreambooth_sm.planning.figures import FigureError, figure, figures_below
from dreambooth_sm.planning.roofline import Reached, seconds, slowdown

OTHERS = [name for name in CARDS if name != "CPU"]
KINDS = [
    (family, whole)
    for family, known in FAMILIES.items()
    for whole in (True, False)
    if not whole or "full" in known.facts.methods
]


def ratio(key: str, card: str, base: str) -> float:
    return figure("cards", f"{base}.{key}") / figure("cards", f"{card}.{key}")


def test_an_operation_takes_as_long_as_the_longer_of_its_arithmetic_and_its_bytes() -> None:
    # On an H200: 989 TFLOP and 4.8 TB a second.
    work = {"launches": 1000.0, "0.tflop": 0.0, "0.gb": 48.0, "512.tflop": 98.9, "512.gb": 1.0}
    assert seconds(work, "H200", Reached(0.5, 1.0, 1e-6)) == pytest.approx(0.01 + 0.2 + 0.001)


@pytest.mark.parametrize(("family", "whole"), KINDS)
def test_no_card_is_further_from_the_h200_than_its_data_sheet_says(family: str, whole: bool) -> None:
    for card in OTHERS:
        sheet = [ratio(key, card, "H200") for key in ("tflops", "tb_per_s")]
        found = slowdown(card, family, whole=whole, base="H200")
        # A launch takes as long on each.
        assert min(*sheet, 1.0) - 1e-9 <= found <= max(*sheet, 1.0) + 1e-9
    assert slowdown("H200", family, whole=whole, base="H200") == 1
    assert slowdown("T4", family, whole=whole, base="H200") > slowdown("A10G", family, whole=whole, base="H200") > 1
    assert slowdown("B200", family, whole=whole, base="H200") < 1


def test_what_is_computed_for_measured_steps_is_near_what_was_measured() -> None:
    reached = Reached(**figures_below("roofline", "reached."))
    errors: dict[str, list[float]] = {"H200": [], "H100": []}
    for family, trained, recomputes, card, name in counted.MEASURED_STEPS:
        if recomputes or (card == "H200" and trained == "whole"):
            continue
        try:
            measured = figure(family, f"{name}.gpu_busy_ms") / 1e3
        except FigureError:
            measured = 1 / figure(family, f"{name}.steps_per_s")
        computed = seconds(figures_below("roofline", f"{family}.{trained}."), card, reached)
        errors[card].append(computed / measured - 1)
    assert len(errors["H200"]) >= 4
    # docs/performance.md says how near; full training was measured with older kernels.
    assert max(map(abs, errors["H200"])) < 0.2
    assert max(map(abs, errors["H100"])) < 0.25


def test_what_was_fitted_is_found_again() -> None:
    true = counted.Fit(Reached(0.5, counted.BANDWIDTH, 2e-6), {"unet": 1.3, "transformer": 0.4})
    samples = []
    for family, launches, gb, tflop in itertools.product(("sd", "flux1"), (1000.0, 9000.0), (30.0, 300.0), (5.0, 60.0)):
        work = {"launches": launches, "0.tflop": 0.0, "0.gb": gb, "512.tflop": tflop, "512.gb": 1.0}
        samples.append((family, work, "H200", true.seconds(family, work, "H200")))
    found = fitted(samples)
    assert found.reached.arithmetic == pytest.approx(true.reached.arithmetic, rel=0.02)
    assert found.reached.launch_s == pytest.approx(true.reached.launch_s, rel=0.02)
    assert found.moved == pytest.approx(true.moved, rel=0.02)


def counted_of(module: nn.Module, *shape: int) -> list[Work]:
    counting = counted.Counting()
    with counting:
        module(counted.meta(*shape).requires_grad_()).float().sum().backward()
    return [each for each in counting.work if each.flops]


def test_products_are_counted_forward_and_backward() -> None:
    with torch.device("meta"):
        layer = nn.Linear(64, 32, bias=False).to(counted.DTYPE)
    work = counted_of(layer, 16, 64)
    # Forward, and for the gradients of input and weight: 2 m n k each; all three move the same three matrices.
    assert [each.flops for each in work] == [2 * 16 * 64 * 32] * 3
    assert {each.bytes for each in work} == {2 * (16 * 64 + 64 * 32 + 16 * 32)}
    layer.requires_grad_(False)
    assert len(counted_of(layer, 16, 64)) == 2
    # Beside a frozen layer, one of rank 16: two products forward, four for gradients.
    adapted = counted_of(counted.Adapted(layer), 16, 64)
    assert len(adapted) == 2 + 6
    assert sum(each.flops for each in adapted) == 2 * 2 * 16 * 64 * 32 + 3 * 2 * 16 * 16 * (64 + 32)


def test_attention_is_one_operation_each_way() -> None:
    work: list[Work] = []
    q, k = (counted.meta(2, 8, length, 40).requires_grad_() for length in (100, 77))
    attend: Any = counted._attention(work)
    attend(q, k, k.detach().clone().requires_grad_(), is_causal=False).float().sum().backward()
    forward, backward = work
    assert forward.flops == 2 * (2 * 2 * 8 * 100 * 77 * 40)
    assert backward.flops == 2.5 * forward.flops
    assert forward.bytes == 2 * 2 * 8 * 40 * (100 + 77 + 77 + 100)


def test_groups_hold_all_that_was_counted() -> None:
    work = [Work(0, 10e9), Work(31e9, 1e9), Work(32e9, 1e9), Work(9000e9, 2e9)]
    found = grouped(work)
    assert found == {
        "launches": 4,
        "0.tflop": 0.031,
        "0.gb": 11,
        "32.tflop": 0.032,
        "32.gb": 1,
        "1024.tflop": 9,
        "1024.gb": 2,
    }


@pytest.mark.slow
def test_a_step_of_stable_diffusion_is_what_is_kept() -> None:
    kept = figures_below("roofline", "sd.whole.")
    found = grouped(counted.count("sd", "whole", recomputes=False))
    assert found | {"0.gb": 0} == pytest.approx(kept | {"0.gb": 0}, rel=0.01)
    assert sum(value for name, value in kept.items() if name.endswith("tflop")) == pytest.approx(4.8, rel=0.1)
