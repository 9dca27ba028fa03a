"""The average of the weights against a float64 reference."""

from __future__ import annotations

import io

import pytest
import torch

from dreambooth_sm.training.ema import Ema


def make_parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 4), (5,), ())]


def walk(parameters: list[torch.nn.Parameter], steps: int, seed: int = 1) -> list[list[torch.Tensor]]:
    """Values of the parameters after each of some random steps."""
    generator = torch.Generator().manual_seed(seed)
    values = [p.detach().double() for p in parameters]
    path: list[list[torch.Tensor]] = []
    for _ in range(steps):
        values = [v + 0.1 * torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in values]
        path.append(values)
    return path


def take(ema: Ema, values: list[torch.Tensor]) -> None:
    """An optimizer step to ``values``, averaged."""
    with torch.no_grad():
        for parameter, value in zip(ema.parameters, values, strict=True):
            parameter.copy_(value)
    ema.prepare_step()
    ema.update()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_fifty_updates_against_float64(decay: float) -> None:
    parameters = make_parameters()
    expected = [p.detach().double() for p in parameters]
    ema = Ema(parameters, decay)
    for number, values in enumerate(walk(parameters, 50), start=1):
        take(ema, values)
        share = min(decay, (1 + number) / (10 + number))
        expected = [share * mean + (1 - share) * value for mean, value in zip(expected, values, strict=True)]
    for average, reference in zip(ema.average, expected, strict=True):
        torch.testing.assert_close(average.double(), reference, rtol=1e-5, atol=1e-6)


def test_the_decay_warms_up_to_the_one_asked_for() -> None:
    """Moving a weight from 0 to 1 in one step shows 1 - decay; the lineage's decay never came past 0.5."""
    seen: list[float] = []
    for updates in (0, 10, 100, 5000):
        parameter = torch.nn.Parameter(torch.zeros(()))
        ema = Ema([parameter], 0.99)
        for _ in range(updates):
            take(ema, [torch.zeros(())])
        take(ema, [torch.ones(())])
        seen.append(1 - ema.average[0].item())
    assert seen == pytest.approx([2 / 11, 12 / 21, 102 / 111, 0.99], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_are_averaged_in_fp32(dtype: torch.dtype) -> None:
    parameters = make_parameters(dtype)
    ema = Ema(parameters, 0.999)
    assert {average.dtype for average in ema.average} == {torch.float32}
    expected = [p.detach().double() for p in parameters]
    for number, values in enumerate(walk(parameters, 50), start=1):
        take(ema, values)
        share = min(0.999, (1 + number) / (10 + number))
        expected = [share * m + (1 - share) * p.detach().double() for m, p in zip(expected, parameters, strict=True)]
    for average, reference in zip(ema.average, expected, strict=True):
        torch.testing.assert_close(average.double(), reference, rtol=1e-5, atol=1e-6)
        assert not torch.equal(average, average.to(dtype).float())


def test_the_average_is_not_the_weights_own_memory() -> None:
    parameters = make_parameters()
    ema = Ema(parameters, 0.9)
    before = [average.clone() for average in ema.average]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1.0)
    assert all(torch.equal(average, kept) for average, kept in zip(ema.average, before, strict=True))


def test_averaging_leaves_weights_and_gradients_alone() -> None:
    parameters = make_parameters()
    path = walk(parameters, 3)
    ema = Ema(parameters, 0.9)
    for values in path:
        take(ema, values)
    for parameter, value in zip(parameters, path[-1], strict=True):
        assert torch.equal(parameter, value.float())
        assert parameter.requires_grad
    assert not any(average.requires_grad for average in ema.average)


def test_the_state_goes_through_a_file() -> None:
    parameters = make_parameters()
    path = walk(parameters, 20)
    whole, first = Ema(parameters, 0.99), Ema(make_parameters(), 0.99)
    for values in path:
        take(whole, values)
    for values in path[:8]:
        take(first, values)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = Ema(make_parameters(torch.float32), 0.99)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for values in path[8:]:
        take(second, values)
    assert second.updates == whole.updates == 20
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(second.average, whole.average, strict=True))


def test_a_state_of_other_parameters_is_refused() -> None:
    ema = Ema(make_parameters(), 0.9)
    with pytest.raises((ValueError, RuntimeError)):
        ema.load_state_dict({"updates": 1, "average": ema.average[:2]})
