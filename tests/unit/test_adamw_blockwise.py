"""`BlockwiseAdamW` on the CPU: its arithmetic, its rules, and the Triton kernel run by Triton's interpreter."""

from __future__ import annotations

import gc
import io
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dreambooth_sm.training import adamw_blockwise, adamw_reference
from dreambooth_sm.training.adamw_blockwise import BlockwiseAdamW
from dreambooth_sm.training.adamw_reference import (
    hash32,
    join_bfloat16,
    join_float16,
    round_bfloat16,
    round_float16,
    split_bfloat16,
    split_float16,
)
from dreambooth_sm.training.moments import BLOCK_FORMATS, PowerCode
from tests.helpers.interpreter import printed_in_the_interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = DTYPES[1:]
CODES = [(f"{bits}-bit {name}", getattr(BLOCK_FORMATS[bits], name)) for bits in BLOCK_FORMATS for name in ("m", "v")]


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits_of(a.detach()), bits_of(b.detach()))


def snapshot(optimizer: BlockwiseAdamW) -> list[Tensor]:
    """Weights and state, copied."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [t.detach().clone() for p in params for t in (p, *optimizer.state[p].values())]


def update(optimizer: BlockwiseAdamW, grads: list[Tensor]) -> None:
    """One step with given gradients, through a real backward pass."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.prepare_step()
    loss = sum(((p * g.to(p.dtype)).sum().float() for p, g in zip(params, grads, strict=True)), torch.zeros(()))
    optimizer.scale(loss).backward()
    optimizer.step()
    optimizer.zero_grad()


def noise(shape: tuple[int, ...], spread: float, seed: int) -> Iterator[Tensor]:
    """Endless gradients: a mean and noise whose sizes differ from element to element by a log-normal factor."""
    random = torch.Generator().manual_seed(seed)
    size = torch.exp(spread * torch.randn(shape, generator=random))
    mean = 0.3 * torch.randn(shape, generator=random)
    while True:
        yield (mean + torch.randn(shape, generator=random)) * size


def accumulated_updates(
    dtype: torch.dtype,
    *,
    steps: int,
    spread: float,
    magnitude: float = 1e-4,
    elements: int = 16384,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What `steps` updates at lr 5e-6 add to a weight, with this optimizer and with torch's AdamW in fp32."""
    start = (torch.randn(elements, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype)
    weight = nn.Parameter(start.clone())
    exact = nn.Parameter(start.float().clone())
    settings = {"lr": 5e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
    optimizer = BlockwiseAdamW([weight], **settings, **options)
    reference = torch.optim.AdamW([exact], **settings)
    for _, g in zip(range(steps), noise((elements,), spread, seed=2), strict=False):
        gradient = g * magnitude
        exact.grad = gradient.clone()
        reference.step()
        optimizer.prepare_step()
        weight.grad = (gradient * optimizer.loss_scale).to(dtype)
        optimizer.step()
    return optimizer.fp32_weight(weight) - start.float(), exact.detach() - start.float()


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()


def slope(a: Tensor, b: Tensor) -> float:
    """By what factor `a` is `b`, in the least-squares sense."""
    return ((a.double() @ b.double()) / (b.double() @ b.double())).item()


# -- codes ---------------------------------------------------------------------------------------------------------


def encode(code: PowerCode, x: Tensor, scale: Tensor, random16: Tensor | None = None) -> Tensor:
    """Codes of one block of non-negative values, rounded."""
    if random16 is None:
        random16 = torch.randint(0, 65536, x.shape, generator=torch.Generator().manual_seed(0))
    return code.encode(x[None], scale.view(1, 1), random16[None]).round()[0]


def decode(code: PowerCode, c: Tensor, scale: Tensor) -> Tensor:
    return code.decode(c) * scale / code.levels**code.power


magnitudes = st.lists(st.floats(0.0, 1.0, width=32), min_size=1, max_size=40)


@pytest.mark.parametrize("code", [c for _, c in CODES], ids=[n for n, _ in CODES])
@given(values=magnitudes, exponent=st.integers(-60, 20))
@settings(max_examples=60, deadline=None)
def test_code_is_a_neighbour_of_the_value(code: PowerCode, values: list[float], exponent: int) -> None:
    x = torch.tensor([*values, 1.0]) * 2.0**exponent
    scale = x.max()
    c = encode(code, x, scale)
    root = code.levels * (x.double() / scale.double()) ** (1 / code.power)
    allowed = 1.0 if code.stochastic else 0.5
    assert ((c - root).abs() <= allowed + 1e-3)[root >= code.smallest].all()
    assert (c[root < code.smallest] == code.smallest).all()
    assert c[-1] == code.levels
    assert (c >= code.smallest).all()
    assert (c <= code.levels).all()
    # What decoding gives is the value again, up to half a step (or a whole one).
    gap = ((root + 1) ** code.power - root**code.power) * scale / code.levels**code.power
    error = (decode(code, c, scale) - x).abs()
    assert (error <= gap * 1.01)[root >= code.smallest].all()


@pytest.mark.parametrize("code", [c for _, c in CODES], ids=[n for n, _ in CODES])
@given(values=magnitudes)
@settings(max_examples=60, deadline=None)
def test_code_is_monotone(code: PowerCode, values: list[float]) -> None:
    x = torch.tensor(sorted([*values, 1.0]))
    c = encode(code, x, torch.ones(()), torch.full(x.shape, 31000))
    assert (c.diff() >= 0).all()


@pytest.mark.parametrize("code", [c for _, c in CODES], ids=[n for n, _ in CODES])
def test_every_code_survives(code: PowerCode) -> None:
    c = torch.arange(max(1, code.smallest), code.levels + 1).float()
    scale = torch.tensor(0.37)
    again = encode(code, decode(code, c, scale), scale)
    # Two neighbours among 65,535 are closer than float32 can tell every time.
    assert ((again - c).abs() <= (1 if code.levels > 32767 else 0)).all()


@pytest.mark.parametrize("code", [c for _, c in CODES], ids=[n for n, _ in CODES])
def test_largest_of_a_block_never_wraps_around(code: PowerCode) -> None:
    """Whatever the scale's rounding errors: one code too many would be stored as zero."""
    random = torch.Generator().manual_seed(0)
    scale = torch.exp(20 * torch.rand(200_000, 1, generator=random) - 10)
    c = code.encode(scale, scale, torch.randint(0, 65536, scale.shape, generator=random)).round()
    assert c.max() == code.levels
    assert c.min() >= code.levels - (1 if code.levels > 32767 else 0)


@pytest.mark.parametrize("bits", BLOCK_FORMATS)
def test_zero_and_sign(bits: int) -> None:
    fmt = BLOCK_FORMATS[bits]
    assert encode(fmt.m, torch.tensor([0.0, 1.0]), torch.ones(()))[0] == 0
    for signed in (True, False):
        top = fmt.m.levels if signed else fmt.v.levels
        c = torch.arange(-top if signed else 0, top + 1).float()
        c = torch.nn.functional.pad(c, (0, -len(c) % fmt.size)).view(-1, fmt.size)
        assert torch.equal(fmt.unpack(fmt.pack(c, signed=signed), signed=signed), c)


@pytest.mark.parametrize("code", [c for _, c in CODES if c.stochastic], ids=[n for n, c in CODES if c.stochastic])
def test_stochastic_codes_are_unbiased(code: PowerCode) -> None:
    """All 65,536 random numbers, so the mean is exact up to their granularity."""
    random16 = torch.arange(65536)
    for root in (1.003, 1.5, 2.25, code.levels / 2 + 0.01, code.levels - 0.4):
        value = (root / code.levels) ** code.power
        x = torch.full((65536,), value)
        mean = decode(code, encode(code, x, torch.ones(()), random16), torch.ones(())).double().mean()
        assert mean.item() == pytest.approx(x[0].item(), rel=3e-4)


def dynamic_map(signed: bool) -> Tensor:
    """The 8-bit dynamic tree map of Dettmers et al. 2022: a decimal exponent in unary, then a linear fraction."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1 if signed else 2 ** (i + 1) + 1, dtype=torch.float64)
        means = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)
        values += means.tolist()
        values += (-means).tolist() if signed else []
    return torch.tensor(sorted(values)).float()


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_eight_bits_are_as_accurate_as_the_dynamic_map(spread: float) -> None:
    """Error of the update m / sqrt(v) of one quantisation, both codes rounding to nearest."""
    fmt = BLOCK_FORMATS[8]
    random = torch.Generator().manual_seed(3)
    size = torch.exp(spread * torch.randn(400, fmt.size, generator=random))
    m = 0.2 * torch.randn(size.shape, generator=random) * size
    v = (1 + 0.1 * torch.randn(size.shape, generator=random)).square() * size.square()
    m_top, v_top = m.abs().amax(1, keepdim=True), v.amax(1, keepdim=True)
    exact = m / v.sqrt()

    def error(m_stored: Tensor, v_stored: Tensor) -> float:
        return ((m_stored / (v_stored.sqrt() + 1e-8) - exact).norm() / exact.norm()).item()

    def through_map(x: Tensor, table: Tensor) -> Tensor:
        return table[torch.searchsorted((table[1:] + table[:-1]) / 2, x.contiguous())]

    middle = torch.full(m.shape, 32768)
    ours = error(
        fmt.m.decode(torch.copysign(fmt.m.encode(m.abs(), m_top, middle).round(), m)) * m_top / 127**3,
        fmt.v.decode(fmt.v.encode(v, v_top, middle)) * v_top / 255**4,
    )
    theirs = error(
        through_map(m / m_top, dynamic_map(True)) * m_top, through_map(v / v_top, dynamic_map(False)) * v_top
    )
    assert ours < theirs


# -- 16-bit weights ------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-(2.0**127), max_value=2.0**127), min_size=1))
@settings(deadline=None)
def test_bfloat16_and_rest_are_the_fp32_weight(values: list[float]) -> None:
    x = torch.tensor(values)
    high, low = split_bfloat16(x)
    assert same_bits(join_bfloat16(high, low), x)
    nearest = x.to(torch.bfloat16)
    # Ties may go either way.
    assert ((high.float() - x).abs() <= (nearest.float() - x).abs()).all()


@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-65000, max_value=65000), min_size=1))
@settings(deadline=None)
def test_float16_and_rest_are_the_fp32_weight(values: list[float]) -> None:
    x = torch.tensor(values)
    high, low = split_float16(x)
    joined = join_float16(high, low)
    large = x.abs() >= 2.0**-14
    assert same_bits(joined[large], x[large])
    assert ((joined - x).abs() <= 2.0**-38).all()
    assert ((high.float() - x).abs() <= (x.to(torch.float16).float() - x).abs()).all()


def awkward_values(dtype: torch.dtype) -> Tensor:
    """Between two neighbours of `dtype`: in mid-binade, at powers of two from both sides, subnormal, negative."""
    base = torch.tensor([0.02, 1.0, 0.0625, 2.0**-14, 2.0**-15, 3e-7, 2.0**-24, 60000.0])
    base = torch.cat([base, -base]).to(dtype).float()
    info = torch.finfo(dtype)
    step = torch.maximum(base.abs() * info.eps / 2, torch.tensor(info.smallest_normal * info.eps))
    fractions = torch.tensor([-0.7, -0.25, -0.01, 0.01, 0.4, 0.9])
    return (base[:, None] + step[:, None] * fractions / 2).flatten()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.bfloat16, round_bfloat16), (torch.float16, round_float16)],
    ids=["bfloat16", "float16"],
)
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype, rounding: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Mean over 2^18 hashed random numbers within 5 standard errors: a false alarm once in 2e6 values."""
    draws = 2**18
    for position, value in enumerate(awkward_values(dtype).tolist()):
        x = torch.full((draws,), value)
        random = hash32(torch.arange(draws) ^ hash32(torch.tensor(position)))
        rounded = rounding(x, random).double()
        assert len(rounded.unique()) <= 2
        deviation = rounded.std().item()
        granularity = 2.0**-13 * (rounded.max() - rounded.min()).item() if dtype == torch.float16 else 0.0
        limit = 5 * deviation / draws**0.5 + granularity + 1e-12
        assert abs(rounded.mean().item() - x[0].double().item()) <= limit, value


@pytest.mark.parametrize("master", ["residual", "stochastic"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_lr_zero_leaves_every_weight_as_it_is(dtype: torch.dtype, master: Any) -> None:
    """All 65,536 patterns but NaN, infinity, and -0, which may become 0."""
    every = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    every = every[every.isfinite() & ~((every == 0) & every.signbit())]
    weight = nn.Parameter(every.clone())
    optimizer = BlockwiseAdamW([weight], lr=0.0, weight_decay=0.1, master=master)
    for g in range(2):
        optimizer.prepare_step()
        weight.grad = torch.full_like(weight, 0.5 - g)
        optimizer.step()
    assert same_bits(weight, every)


# -- against AdamW -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("magnitude", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_follows_fp32_adamw(dtype: torch.dtype, magnitude: float, spread: float) -> None:
    ours, exact = accumulated_updates(dtype, steps=30, spread=spread, magnitude=magnitude, initial_loss_scale=256.0)
    assert cosine(ours, exact) >= 0.999
    assert slope(ours, exact) == pytest.approx(1.0, abs=0.01)


@pytest.mark.slow
def test_stays_unbiased_over_a_whole_job() -> None:
    """The second moment must neither freeze nor drift, which a few updates do not show."""
    ours, exact = accumulated_updates(torch.float32, steps=500, spread=1.0, elements=4096)
    assert cosine(ours, exact) >= 0.997
    assert slope(ours, exact) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_master_follows_on_average(dtype: torch.dtype) -> None:
    ours, exact = accumulated_updates(
        dtype, steps=30, spread=0.0, elements=65536, master="stochastic", initial_loss_scale=256.0
    )
    assert slope(ours, exact) == pytest.approx(1.0, abs=0.03)
    # Rounding noise of up to half a step an update, against a sum of 30 updates of 5e-6.
    assert cosine(ours, exact) >= (0.35 if dtype == torch.bfloat16 else 0.75)


@pytest.mark.parametrize(("steps", "spread", "least"), [(30, 0.5, 0.93), (30, 1.0, 0.82), (300, 1.0, 0.88)])
def test_four_bits(steps: int, spread: float, least: float) -> None:
    ours, exact = accumulated_updates(torch.float32, steps=steps, spread=spread, elements=8192, state_bits=4)
    assert cosine(ours, exact) >= least
    assert slope(ours, exact) == pytest.approx(1.05, abs=0.1)


def test_moments_too_small_for_their_block_do_not_blow_the_update_up() -> None:
    """An element whose gradient is 1e-6 of its neighbour's moves by about lr at most, not by lr * m / eps."""
    weight = nn.Parameter(torch.zeros(256))
    gradient = torch.full((256,), 1e-6)
    gradient[0] = 1.0
    for bits in BLOCK_FORMATS:
        optimizer = BlockwiseAdamW([weight], lr=1e-3, weight_decay=0.0, state_bits=bits)
        for _ in range(20):
            before = weight.detach().clone()
            optimizer.prepare_step()
            weight.grad = gradient
            optimizer.step()
            assert (weight - before).abs().max() <= 1.5e-3


@pytest.mark.parametrize("master", ["residual", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_precision_weights_can_be_read_written_and_averaged(dtype: torch.dtype, master: Any) -> None:
    weight = nn.Parameter(torch.zeros(6, 5, 3, 3, dtype=dtype).to(memory_format=torch.channels_last))
    optimizer = BlockwiseAdamW([weight], master=master)
    value = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    optimizer.set_fp32_weight(weight, value)
    read = optimizer.fp32_weight(weight)
    exact = dtype == torch.float32 or master == "residual"
    assert torch.allclose(read, value, rtol=2e-7 if exact else 8e-3, atol=2**-36 if exact else 1e-7)
    assert torch.allclose(weight.float(), value, rtol=8e-3, atol=1e-7)
    average = torch.ones_like(read)
    optimizer.average_into(average, weight, torch.tensor(0.25))
    assert torch.allclose(average, 0.75 + 0.25 * read, atol=1e-6)


def test_weight_decay_is_decoupled() -> None:
    weight = nn.Parameter(torch.full((1000,), 0.5))
    optimizer = BlockwiseAdamW([weight], lr=0.1, weight_decay=0.2)
    optimizer.prepare_step()
    weight.grad = torch.zeros(1000)
    optimizer.step()
    assert torch.allclose(weight, torch.full((1000,), 0.5 * (1 - 0.1 * 0.2)))


def test_bias_correction_can_be_off() -> None:
    weights = [nn.Parameter(torch.zeros(256)) for _ in range(2)]
    for weight, on in zip(weights, (True, False), strict=True):
        optimizer = BlockwiseAdamW([weight], lr=1.0, weight_decay=0.0, bias_correction=on)
        optimizer.prepare_step()
        weight.grad = torch.ones(256)
        optimizer.step()
    assert torch.allclose(weights[0], torch.tensor(-1.0))
    assert torch.allclose(weights[1], torch.tensor(-0.1 / 0.001**0.5))


# -- rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("master", ["residual", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_in_backward_is_the_same_update(dtype: torch.dtype, master: Any) -> None:
    results = []
    for in_backward in (False, True):
        params = [nn.Parameter(p) for p in start_values(dtype)]
        optimizer = BlockwiseAdamW(
            params, lr=1e-3, master=master, update_in_backward=in_backward, initial_loss_scale=8.0
        )
        streams = [noise(tuple(p.shape), 1.0, seed=i) for i, p in enumerate(params)]
        for _ in range(3):
            update(optimizer, [next(s) for s in streams])
        assert all(p.grad is None for p in params)
        results.append(snapshot(optimizer))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


SHAPES: tuple[tuple[int, ...], ...] = ((7,), (640,), (5, 300), (4, 2, 3, 30))


def start_values(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    random = torch.Generator().manual_seed(5)
    return [(torch.randn(s, generator=random) * 0.02).to(dtype) for s in shapes]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_step_with_a_nonfinite_gradient_changes_nothing(value: float) -> None:
    params = [nn.Parameter(p) for p in start_values(torch.bfloat16)]
    optimizer = BlockwiseAdamW(params, lr=1e-3)
    update(optimizer, [torch.ones_like(p) for p in params])
    before = snapshot(optimizer)
    grads = [torch.ones_like(p) for p in params]
    grads[2][1, 17] = value
    update(optimizer, grads)
    assert optimizer.found_nonfinite == 1
    assert all(same_bits(a, b) for a, b in zip(before, snapshot(optimizer), strict=True))
    update(optimizer, [torch.ones_like(p) for p in params])
    assert optimizer.found_nonfinite == 0
    assert optimizer.nonfinite_steps == 1
    assert not any(same_bits(a, p) for a, p in zip(before[::6], params, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("bits", BLOCK_FORMATS)
def test_nonfinite_gradient_in_backward_keeps_its_block(value: float, bits: Any) -> None:
    """1e30 is finite, but its square is not."""
    size = BLOCK_FORMATS[bits].size
    weight = nn.Parameter(torch.ones(5 * size - 3))
    optimizer = BlockwiseAdamW([weight], lr=1e-3, state_bits=bits, update_in_backward=True)
    gradients = noise(tuple(weight.shape), 1.0, seed=0)
    update(optimizer, [next(gradients)])
    before = snapshot(optimizer)
    gradient = next(gradients) * 2
    gradient[size + 1] = value
    gradient[5 * size - 4] = value
    update(optimizer, [gradient])
    assert optimizer.found_nonfinite == 1
    kept = torch.tensor([False, True, False, False, True])
    for old, new in zip(before, snapshot(optimizer), strict=True):
        old, new = (torch.nn.functional.pad(t, (0, -len(t) % 5)).view(5, -1) for t in (old, new))
        assert torch.equal((old == new).all(1), kept)
    optimizer.close()


def test_loss_scale() -> None:
    weight = nn.Parameter(torch.ones(300, dtype=torch.float16))
    optimizer = BlockwiseAdamW(
        [weight], initial_loss_scale=8.0, min_loss_scale=2.0, max_loss_scale=16.0, growth_interval=3
    )
    good, bad = torch.ones(300), torch.full((300,), float("inf"))
    seen = []
    for gradient in (good, good, bad, good, good, good, good, good, good, good, good, good, bad, bad, bad, bad):
        update(optimizer, [gradient])
        seen.append(optimizer.loss_scale.item())
    assert seen == [8, 8, 4, 4, 4, 8, 8, 8, 16, 16, 16, 16, 8, 4, 2, 2]
    assert optimizer.nonfinite_steps == 5


def test_loss_scale_cancels() -> None:
    """Powers of two, so the update is the same bit for bit."""
    results = []
    for factor in (1.0, 1024.0):
        weight = nn.Parameter(torch.ones(300, dtype=torch.float16))
        optimizer = BlockwiseAdamW([weight], lr=1e-3, initial_loss_scale=factor, update_in_backward=True)
        for gradient in itertools.islice(noise((300,), 0.5, seed=0), 4):
            update(optimizer, [gradient])
        results.append(weight.detach().clone())
        optimizer.close()
    assert same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_loss_scale_without_fp16(dtype: torch.dtype) -> None:
    optimizer = BlockwiseAdamW([nn.Parameter(torch.ones(3, dtype=dtype))])
    loss = torch.tensor(2.0)
    assert optimizer.loss_scale == 1
    assert optimizer.scale(loss) is loss


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_clipping_is_that_of_torch(factor: float) -> None:
    """Two optimizers, one fed gradients that `clip_grad_norm_` has clipped."""
    ours = [nn.Parameter(p) for p in start_values(torch.float32)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    clipping = BlockwiseAdamW(ours, lr=1e-3, max_grad_norm=1.0)
    plain = BlockwiseAdamW(theirs, lr=1e-3)
    streams = [noise(tuple(p.shape), 1.0, seed=i) for i, p in enumerate(ours)]
    for step in range(3):
        for a, b, stream in zip(ours, theirs, streams, strict=True):
            a.grad = next(stream) * factor * (step + 1)
            b.grad = a.grad.clone()
        norm = nn.utils.clip_grad_norm_(theirs, 1.0)
        for optimizer in (clipping, plain):
            optimizer.prepare_step()
            optimizer.step()
        assert clipping.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    for a, b, start in zip(ours, theirs, start_values(torch.float32), strict=True):
        assert cosine((a - start).flatten(), (b - start).flatten()) > 0.99999


def test_scaled_norm_does_not_overflow() -> None:
    weight = nn.Parameter(torch.zeros(100_000, dtype=torch.float16))
    optimizer = BlockwiseAdamW([weight], max_grad_norm=1.0, initial_loss_scale=1024.0)
    optimizer.prepare_step()
    weight.grad = torch.full_like(weight, 1024.0)
    optimizer.step()
    assert optimizer.found_nonfinite == 0
    assert optimizer.grad_norm.item() == pytest.approx(100_000**0.5, rel=1e-4)


def test_walks_memory_in_the_parameters_own_order() -> None:
    """A channels_last weight is updated like a flat one with the same memory, whatever the gradient's layout."""
    values = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.02
    image = nn.Parameter(values.to(memory_format=torch.channels_last))
    flat = nn.Parameter(values.permute(0, 2, 3, 1).flatten().clone())
    optimizers = [BlockwiseAdamW([p], lr=1e-3) for p in (image, flat)]
    for step, g in enumerate(itertools.islice(noise((6, 5, 3, 3), 1.0, seed=1), 4)):
        image.grad = g if step % 2 else g.to(memory_format=torch.channels_last)
        flat.grad = g.permute(0, 2, 3, 1).flatten().clone()
        for optimizer in optimizers:
            optimizer.prepare_step()
            optimizer.step()
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert same_bits(image.permute(0, 2, 3, 1).flatten(), flat)
    assert optimizers[0].fp32_weight(image).stride() == image.stride()


def test_groups_have_their_own_settings() -> None:
    params = [nn.Parameter(torch.ones(300)) for _ in range(3)]
    optimizer = BlockwiseAdamW(
        [{"params": params[:1]}, {"params": params[1:2], "lr": 0.0}, {"params": params[2:], "weight_decay": 0.5}],
        lr=1e-2,
        weight_decay=0.0,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    update(optimizer, [torch.ones(300)] * 3)
    scheduler.step()
    assert torch.allclose(params[0], torch.tensor(0.99))
    assert torch.equal(params[1], torch.ones(300))
    assert torch.allclose(params[2], torch.tensor(1 - 0.01 - 0.005))
    before = snapshot(optimizer)[0]
    update(optimizer, [torch.ones(300)] * 3)
    assert torch.equal(params[0], before)


def test_parameters_without_gradient_stay() -> None:
    params = [nn.Parameter(torch.ones(300)) for _ in range(2)]
    optimizer = BlockwiseAdamW(params, lr=1e-2)
    optimizer.prepare_step()
    optimizer.step()
    optimizer.prepare_step()
    params[0].grad = torch.ones(300)
    optimizer.step()
    assert torch.equal(params[1], torch.ones(300))
    assert not torch.equal(params[0], torch.ones(300))


@pytest.mark.parametrize("bits", BLOCK_FORMATS)
@pytest.mark.parametrize("master", ["residual", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resume_is_bitwise(dtype: torch.dtype, master: Any, bits: Any) -> None:
    def build(values: list[Tensor], seed: int) -> BlockwiseAdamW:
        params = [nn.Parameter(v.clone()) for v in values]
        return BlockwiseAdamW(
            [{"params": params[:2], "lr": 1e-3}, {"params": params[2:]}],
            lr=1e-4,
            master=master,
            state_bits=bits,
            initial_loss_scale=8.0,
            growth_interval=3,
            seed=seed,
        )

    straight = build(start_values(dtype), seed=7)
    params = [p for group in straight.param_groups for p in group["params"]]
    streams = [noise(tuple(p.shape), 1.0, seed=i) for i, p in enumerate(params)]
    batches = [[next(s) for s in streams] for _ in range(5)]
    for batch in batches[:2]:
        update(straight, batch)
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in params], "optimizer": straight.state_dict()}, file)
    for batch in batches[2:]:
        update(straight, batch)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = build(saved["weights"], seed=0)
    resumed.load_state_dict(saved["optimizer"])
    for batch in batches[2:]:
        update(resumed, batch)
    assert all(same_bits(a, b) for a, b in zip(snapshot(straight), snapshot(resumed), strict=True))
    assert straight.loss_scale == resumed.loss_scale


def test_seed_decides_the_rounding() -> None:
    def run(seed: int) -> Tensor:
        weight = nn.Parameter(torch.full((4096,), 0.1, dtype=torch.bfloat16))
        optimizer = BlockwiseAdamW([weight], lr=1e-5, master="stochastic", seed=seed)
        for _ in range(2):
            update(optimizer, [torch.ones(4096)])
        return weight.detach()

    assert same_bits(run(1), run(1))
    assert not same_bits(run(1), run(2))


def test_close_lets_the_model_go() -> None:
    model = nn.Linear(30, 30)
    optimizer = BlockwiseAdamW(model.parameters(), update_in_backward=True)
    optimizer.prepare_step()
    model(torch.ones(1, 30)).sum().backward()
    assert model.weight.grad is None
    optimizer.step()
    optimizer.close()
    model(torch.ones(1, 30)).sum().backward()
    assert model.weight.grad is not None
    alive = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [r() for r in alive] == [None, None]


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_bits": 2}, "16, 8 or 4"),
        ({"master": "fp32"}, "master"),
        ({"max_grad_norm": 1.0, "update_in_backward": True}, "all gradients at once"),
        ({"max_grad_norm": 0.0}, "above 0"),
        ({"lr": -1.0}, "negative"),
        ({"weight_decay": -1.0}, "negative"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"eps": 0.0}, "eps"),
        ({"growth_interval": 0}, "growth_interval"),
        ({"initial_loss_scale": 0.5}, "loss scales"),
        ({"backend": "cuda"}, "backend"),
        ({"backend": "triton"}, "cannot run here"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        BlockwiseAdamW([nn.Parameter(torch.ones(3))], **options)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(3, dtype=torch.float64), "float64"),
        (torch.ones(4, 4)[:, ::2], "dense"),
        (torch.ones(4, 1).expand(4, 4), "dense"),
        (torch.ones(0), "empty"),
    ],
)
def test_wrong_parameters(tensor: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockwiseAdamW([nn.Parameter(tensor)])


def test_frozen_parameter_in_backward() -> None:
    with pytest.raises(ValueError, match="require a gradient"):
        BlockwiseAdamW([torch.ones(3)], update_in_backward=True)


def test_wrong_order_of_calls() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = BlockwiseAdamW([weight], update_in_backward=True)
    with pytest.raises(RuntimeError, match="prepare_step"):
        weight.sum().backward()
    with pytest.raises(RuntimeError, match="prepare_step"):
        optimizer.step()
    optimizer.prepare_step()
    weight.sum().backward()
    with pytest.raises(RuntimeError, match="one backward pass"):
        weight.sum().backward()
    with pytest.raises(RuntimeError, match="at construction"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    optimizer.close()


def test_moved_memory() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = BlockwiseAdamW([weight])
    optimizer.prepare_step()
    weight.grad = torch.ones(3)
    weight.data = weight.data.clone()
    with pytest.raises(RuntimeError, match="moved"):
        optimizer.step()


def test_foreign_state() -> None:
    def build(size: int = 300, **options: Any) -> BlockwiseAdamW:
        return BlockwiseAdamW([nn.Parameter(torch.ones(size, dtype=torch.bfloat16))], **options)

    optimizer = build()
    with pytest.raises(ValueError, match="not a state"):
        optimizer.load_state_dict(torch.optim.AdamW([nn.Parameter(torch.ones(3))]).state_dict())
    for other in (build(state_bits=4), build(master="stochastic"), build(size=600)):
        with pytest.raises(ValueError, match="saved"):
            optimizer.load_state_dict(other.state_dict())
    with pytest.raises(KeyError):
        optimizer.fp32_weight(torch.ones(3))


# -- the kernel ----------------------------------------------------------------------------------------------------


def compare_kernel_with_reference() -> None:
    """Run by `test_kernel_in_the_interpreter`, in a process where kernels run on the CPU."""
    # Few elements, which the interpreter takes a millisecond each for; each parameter ends within a block.
    shapes = ((7,), (260,), (5, 120), (2, 2, 3, 25))
    adamw_blockwise.SMALL_PARAMETER = 290  # so that the largest go alone and the others in a bundle
    adamw_reference.REFERENCE_CHUNK = 2  # less than the largest has of any size of block
    kinds = [
        (dtype, master, bits)
        for dtype, master, bits in itertools.product(DTYPES, ("residual", "stochastic"), BLOCK_FORMATS)
        if dtype != torch.float32 or master != "stochastic"
    ]
    for number, (dtype, master, bits) in enumerate(kinds):
        in_backward = (number + number // len(BLOCK_FORMATS)) % 2 == 0  # with each type, master and format in turn
        optimizers = []
        for backend in ("torch", "triton"):
            params = [nn.Parameter(p) for p in start_values(dtype, shapes)]
            optimizers.append(
                BlockwiseAdamW(
                    [{"params": params[:2]}, {"params": params[2:], "lr": 5e-6, "weight_decay": 0.1}],
                    lr=1e-3,
                    state_bits=bits,
                    master=master,  # type: ignore[arg-type]
                    update_in_backward=in_backward,
                    max_grad_norm=None if in_backward else 1.0,
                    initial_loss_scale=8.0,
                    backend=backend,  # type: ignore[arg-type]
                )
            )
        streams = [noise(shape, 2.0, seed=i) for i, shape in enumerate(shapes)]
        for step in range(3):
            grads = [next(s) for s in streams]
            if step == 1:
                grads[2][2, 5] = float("nan")
                grads[1][3] = float("inf")
            for optimizer in optimizers:
                update(optimizer, grads)
            assert optimizers[0].found_nonfinite == optimizers[1].found_nonfinite == float(step == 1)
        ours, theirs = (snapshot(o) for o in optimizers)
        # The libraries' log2 and exp2 may differ in the last bit, on some processors more often; all else is the same.
        different = sum(int((bits_of(a) != bits_of(b)).sum()) for a, b in zip(ours, theirs, strict=True))
        total = sum(t.numel() for t in ours)
        assert different <= total * 1e-2, (dtype, master, bits, in_backward, different, total)
        print(dtype, master, bits, in_backward, f"{different} of {total} differ")
        if bits == 8:
            averages = [[torch.ones_like(o.fp32_weight(p)) for p in o.state] for o in optimizers]
            for optimizer, average in zip(optimizers, averages, strict=True):
                for param, mean in zip(optimizer.state, average, strict=True):
                    optimizer.average_into(mean, param, torch.tensor(0.25))
            for a, b in zip(*averages, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
            print(dtype, master, "averaged")


@pytest.mark.slow
def test_kernel_in_the_interpreter() -> None:
    printed = printed_in_the_interpreter(__file__)
    assert printed.count("differ") == 5 * len(BLOCK_FORMATS)
    assert printed.count("averaged") == 5


if __name__ == "__main__":
    compare_kernel_with_reference()
