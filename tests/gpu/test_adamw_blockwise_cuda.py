"""`BlockwiseAdamW` on a CUDA device: the compiled kernels, CUDA graphs, and no waiting for the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreambooth_sm.training import adamw_blockwise
from dreambooth_sm.training.adamw_blockwise import BlockwiseAdamW
from dreambooth_sm.training.moments import BLOCK_FORMATS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _some_parameters_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw_blockwise, "SMALL_PARAMETER", 100_000)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Two that share a launch, one that does not divide into blocks, one of several programs a multiprocessor.
SHAPES = [(7,), (640,), (501, 333), (1280, 640, 3, 3)]


def random_like(params: list[Tensor], seed: int, magnitude: float) -> list[Tensor]:
    """Gradients whose size differs from element to element by a log-normal factor."""
    random = torch.Generator("cuda").manual_seed(seed)

    def draw(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=random, device="cuda")

    return [(draw(p) * torch.exp(draw(p)) * magnitude).to(p.dtype) for p in params]


def make_params(dtype: torch.dtype, channels_last: bool = False) -> list[nn.Parameter]:
    random = torch.Generator("cuda").manual_seed(0)
    tensors = [(torch.randn(s, generator=random, device="cuda") * 0.02).to(dtype) for s in SHAPES]
    if channels_last:
        tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    return [nn.Parameter(t) for t in tensors]


def step(optimizer: BlockwiseAdamW, params: list[nn.Parameter], grads: list[Tensor]) -> None:
    optimizer.prepare_step()
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
    optimizer.zero_grad()


def codes(stored: Tensor, bits: int) -> Tensor:
    fmt = BLOCK_FORMATS[bits]
    return fmt.unpack(stored, signed=False)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bits", BLOCK_FORMATS)
@pytest.mark.parametrize("master", ["residual", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_computes_the_reference(dtype: torch.dtype, master: Any, bits: Any, channels_last: bool) -> None:
    """From the same state, one step: square roots and reciprocals are approximate, the rest is the same."""
    sets = [make_params(dtype, channels_last) for _ in range(2)]
    kernel, reference = (
        BlockwiseAdamW(
            [{"params": params[:2]}, {"params": params[2:], "lr": 5e-6, "weight_decay": 0.1}],
            lr=1e-3,
            master=master,
            state_bits=bits,
            backend=backend,
            initial_loss_scale=1.0,
        )
        for params, backend in zip(sets, ("triton", "torch"), strict=True)
    )
    for seed in range(3):
        step(reference, sets[1], random_like(sets[1], seed, 1e-4))
    kernel.load_state_dict(copy.deepcopy(reference.state_dict()))
    with torch.no_grad():
        for a, b in zip(*sets, strict=True):
            a.copy_(b)
    before = [p.detach().clone() for p in sets[0]]
    grads = random_like(sets[0], 3, 1e-4)
    step(kernel, sets[0], grads)
    step(reference, sets[1], grads)
    for a, b, old in zip(*sets, before, strict=True):
        ours, theirs = kernel.fp32_weight(a), reference.fp32_weight(b)
        moved = theirs - old.float()
        if dtype == torch.float32 or master == "residual":
            assert (ours - theirs).abs().max() <= 1e-5 * moved.abs().max() + 2.0**-23 * ours.abs().max()
        else:
            assert (a != b).float().mean() <= 1e-3
        for name in ("m_scale", "v_scale"):
            assert torch.allclose(kernel.state[a][name], reference.state[b][name], rtol=1e-5)
        for name in ("m", "v"):
            difference = codes(kernel.state[a][name], bits) - codes(reference.state[b][name], bits)
            wrap = 2**bits
            difference = torch.minimum(difference % wrap, -difference % wrap)
            assert difference.max() <= 1
            assert (difference != 0).float().mean() <= 2e-3


@pytest.mark.parametrize("bits", BLOCK_FORMATS)
def test_nonfinite_gradients(bits: Any) -> None:
    params = make_params(torch.bfloat16)
    optimizer = BlockwiseAdamW(params, lr=1e-3, state_bits=bits)
    step(optimizer, params, random_like(params, 0, 1e-4))
    before = [t.detach().clone() for p in params for t in (p, *optimizer.state[p].values())]
    for value in (float("nan"), float("inf")):
        grads = random_like(params, 1, 1e-4)
        grads[1][5] = value
        step(optimizer, params, grads)
        assert optimizer.found_nonfinite == 1
        after = [t for p in params for t in (p, *optimizer.state[p].values())]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), 1e30])
def test_nonfinite_block_in_backward(value: float) -> None:
    params = make_params(torch.float32)
    optimizer = BlockwiseAdamW(params, lr=1e-3, update_in_backward=True)
    bad = {1: 300, 3: 70_000}
    for round_ in range(2):
        grads = random_like(params, round_, 1e-4)
        before = [p.detach().clone() for p in params]
        if round_:
            for i, at in bad.items():
                grads[i].view(-1)[at] = value
        optimizer.prepare_step()
        torch.autograd.backward(params, grads)
        optimizer.step()
        assert all(p.grad is None for p in params)
    assert optimizer.found_nonfinite == 1
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        changed = (p != old).flatten()
        if i in bad:
            first = bad[i] // 256 * 256
            assert not changed[first : first + 256].any()
            changed = torch.cat([changed[:first], changed[first + 256 :]])
        assert changed.float().mean() > 0.99
    optimizer.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_follows_fp32_adamw(dtype: torch.dtype) -> None:
    params = make_params(dtype)
    exact = [nn.Parameter(p.detach().float().clone()) for p in params]
    start = [p.detach().clone() for p in exact]
    optimizer = BlockwiseAdamW(params, lr=5e-6, initial_loss_scale=256.0)
    reference = torch.optim.AdamW(exact, lr=5e-6)
    for seed in range(30):
        grads = random_like(exact, seed, 1e-4)
        for p, g in zip(exact, grads, strict=True):
            p.grad = g
        reference.step()
        step(optimizer, params, [(g * optimizer.loss_scale).to(dtype) for g in grads])
    ours = torch.cat([(optimizer.fp32_weight(p) - s).flatten() for p, s in zip(params, start, strict=True)])
    theirs = torch.cat([(p.detach() - s).flatten() for p, s in zip(exact, start, strict=True)])
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) >= 0.999


def build_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 160, 3, padding=1), nn.GroupNorm(8, 160), nn.SiLU(), nn.Conv2d(160, 160, 3, padding=1),
        nn.SiLU(), nn.Conv2d(160, 4, 3, padding=1),
    )  # fmt: skip
    return model.to("cuda", dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("master", ["residual", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graph_replays_what_eager_steps_do(dtype: torch.dtype, master: Any, in_backward: bool) -> None:
    """Learning rate and, with fp16, loss scale change between the replays; one step has a non-finite loss."""
    torch.backends.cudnn.deterministic = True
    data = torch.randn(8, 2, 4, 16, 16, device="cuda").to(dtype)
    data[5] = float("nan")

    def run(graph: bool) -> list[Tensor]:
        model = build_model(dtype)
        optimizer = BlockwiseAdamW(
            model.parameters(),
            master=master,
            update_in_backward=in_backward,
            max_grad_norm=None if in_backward else 0.1,
            initial_loss_scale=64.0,
            growth_interval=3,
        )
        x = data[0].clone()

        def body() -> None:
            optimizer.scale((model(x).float() - x.float()).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()

        captured = None
        for i, batch in enumerate(data):
            x.copy_(batch)
            optimizer.param_groups[0]["lr"] = 1e-3 / (i + 1)
            optimizer.prepare_step()
            if not graph or i == 0:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    body()
                torch.cuda.current_stream().wait_stream(side)
                continue
            if captured is None:
                captured = torch.cuda.CUDAGraph()
                with torch.cuda.graph(captured):
                    body()
            captured.replay()
        assert optimizer.nonfinite_steps == 1
        result = [p.detach().clone() for p in model.parameters()] + [optimizer.loss_scale]
        optimizer.close()
        return result

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


@pytest.mark.parametrize("in_backward", [False, True])
def test_nothing_waits_for_the_device(in_backward: bool) -> None:
    model = build_model(torch.float16)
    optimizer = BlockwiseAdamW(
        model.parameters(), update_in_backward=in_backward, max_grad_norm=None if in_backward else 1.0
    )
    x = torch.randn(2, 4, 16, 16, device="cuda", dtype=torch.float16)

    def one() -> None:
        optimizer.prepare_step()
        optimizer.scale(model(x).float().square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    one()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    optimizer.close()


def test_scalars_of_queued_steps_do_not_mix() -> None:
    """The host runs many steps ahead of a busy device; each step must still see its own learning rate."""
    weight = nn.Parameter(torch.zeros(256, device="cuda"))
    optimizer = BlockwiseAdamW([weight], weight_decay=0.0, betas=(0.0, 0.0), bias_correction=False)
    busy = torch.randn(4096, 4096, device="cuda")
    for i in range(60):
        busy = busy @ busy / 64.0
        optimizer.param_groups[0]["lr"] = float(2**-i) if i < 20 else 0.0
        optimizer.prepare_step()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.allclose(weight, torch.tensor(-(2.0 - 2.0**-19), device="cuda"), rtol=1e-5)


def test_prepare_step_refuses_to_be_captured() -> None:
    optimizer = BlockwiseAdamW([nn.Parameter(torch.zeros(3, device="cuda"))])
    with (
        pytest.raises(RuntimeError, match="not inside"),
        torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="relaxed"),
    ):
        optimizer.prepare_step()


def test_small_parameters_with_missing_and_mixed_gradients() -> None:
    """The shared launch leaves out parameters without a gradient and takes any floating-point gradients."""
    params = make_params(torch.bfloat16)
    optimizer = BlockwiseAdamW(params, lr=1e-2)
    assert sum(len(b.slots) for b in optimizer._bundles) == 2
    before = [p.detach().clone() for p in params]
    optimizer.prepare_step()
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])


def test_resume_is_bitwise() -> None:
    runs = []
    for interrupt in (False, True):
        params = make_params(torch.bfloat16)
        optimizer = BlockwiseAdamW(params, lr=1e-3, state_bits=4)
        for seed in range(4):
            if interrupt and seed == 2:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = BlockwiseAdamW(params, lr=1.0, state_bits=4, seed=9)
                optimizer.load_state_dict(saved)
            step(optimizer, params, random_like(params, seed, 1e-4))
        runs.append([t.detach().clone() for p in params for t in (p, *optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_old_cards_use_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    weight = nn.Parameter(torch.zeros(3, device="cuda"))
    assert BlockwiseAdamW([weight])._kernels is None
    with pytest.raises(ValueError, match=r"below 7\.5"):
        BlockwiseAdamW([weight], backend="triton")
