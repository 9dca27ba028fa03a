"""The DreamBooth loss against independent computations: numpy in float64 and loops, and diffusers' scheduler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from dreambooth_sm.objectives import Diffusion
from dreambooth_sm.training.losses import Loss, dreambooth_loss

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
PREDICTION_TYPES = ["epsilon", "v_prediction"]


def draw(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two tensors of latents' shape, and time steps that differ widely."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(rows, 4, 5, 3, generator=generator) for _ in range(2))
    timesteps = torch.randperm(1000, generator=generator)[:rows]
    return first, second, timesteps


def snr_weight(prediction_type: str, timestep: int, gamma: float) -> float:
    """min(SNR, gamma) over SNR (epsilon) or SNR + 1 (v), from the betas."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    signal = float(np.prod(1 - betas[: timestep + 1]))
    snr = signal / (1 - signal)
    return min(snr, gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)


def by_hand(
    prediction: torch.Tensor, target: torch.Tensor, weights: list[float], prior_loss_weight: float | None
) -> tuple[float, float, float | None]:
    """Equation 2 of the paper, one number at a time."""
    rows: list[float] = []
    for one, other, weight in zip(prediction.double().numpy(), target.double().numpy(), weights, strict=True):
        squares = [(float(a) - float(b)) ** 2 for a, b in zip(one.flat, other.flat, strict=True)]
        rows.append(weight * sum(squares) / len(squares))
    if prior_loss_weight is None:
        mean = sum(rows) / len(rows)
        return mean, mean, None
    batch = len(rows) // 2
    instance, prior = sum(rows[:batch]) / batch, sum(rows[batch:]) / batch
    return instance + prior_loss_weight * prior, instance, prior


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("gamma", [None, 5.0, 0.5])
@pytest.mark.parametrize("prior_loss_weight", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_the_loss_is_the_papers(
    batch: int, prior_loss_weight: float | None, gamma: float | None, prediction_type: str
) -> None:
    rows = batch if prior_loss_weight is None else 2 * batch
    prediction, target, timesteps = draw(rows, seed=batch)
    weights = [1.0 if gamma is None else snr_weight(prediction_type, int(t), gamma) for t in timesteps]
    expected = by_hand(prediction, target, weights, prior_loss_weight)
    objective = Diffusion(prediction_type, SCHEDULER.alphas_cumprod, gamma)
    ours = dreambooth_loss(
        prediction,
        target,
        prior_loss_weight=prior_loss_weight,
        row_weights=objective.row_weights(timesteps),
    )
    assert (ours.prior is None) == (expected[2] is None)
    for part, value in zip(ours, expected, strict=True):
        assert part is None or part.item() == pytest.approx(value, rel=1e-4)
    assert all(part is None or part.shape == () for part in ours)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_each_row_is_weighed_by_its_own_time_step_alone(batch: int) -> None:
    """The defect of diffusers' script: weights of all 2B rows multiply the B instance rows.

    At B = 1 they broadcast without an error, and the class row's time step weighs the subject's loss.
    """
    prediction, target, _ = draw(2 * batch)
    weights = torch.linspace(0.1, 1.0, 2 * batch)
    loss = dreambooth_loss(prediction, target, prior_loss_weight=1.0, row_weights=weights)
    for row in range(2 * batch):
        changed = weights.clone()
        changed[row] += 1.0
        other = dreambooth_loss(prediction, target, prior_loss_weight=1.0, row_weights=changed)
        own = (prediction[row] - target[row]).square().mean() / batch
        expected = (own, torch.tensor(0.0)) if row < batch else (torch.tensor(0.0), own)
        assert other.prior is not None
        assert loss.prior is not None
        torch.testing.assert_close(other.instance - loss.instance, expected[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(other.prior - loss.prior, expected[1], rtol=1e-4, atol=1e-6)


def test_the_loss_is_summed_in_fp32() -> None:
    prediction = torch.full((2, 4, 64, 64), 300.0, dtype=torch.float16, requires_grad=True)
    loss = dreambooth_loss(prediction, torch.zeros_like(prediction), prior_loss_weight=0.5)
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == 1.5 * 90_000  # more than fp16 can hold
    loss.total.backward()
    assert torch.isfinite(prediction.grad).all()


def test_the_gradient_of_each_half() -> None:
    prediction, target, _ = draw(4)
    prediction.requires_grad_()
    dreambooth_loss(prediction, target, prior_loss_weight=0.25).total.backward()
    by_rule = 2 * (prediction.detach() - target) / (2 * target[0].numel())
    by_rule[2:] *= 0.25
    torch.testing.assert_close(prediction.grad, by_rule)


@pytest.mark.parametrize("rescale", [False, True])
def test_noise_and_targets_are_those_of_diffusers_scheduler(rescale: bool) -> None:
    scheduler = DDPMScheduler.from_config(SCHEDULER.config, rescale_betas_zero_snr=rescale)
    latents, noise, timesteps = draw(12)
    timesteps[:2] = torch.tensor([0, 999])
    epsilon, v = (Diffusion(kind, scheduler.alphas_cumprod) for kind in PREDICTION_TYPES)
    torch.testing.assert_close(
        epsilon.noised(latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps)
    )
    assert epsilon.target(latents, noise, timesteps) is noise
    torch.testing.assert_close(v.target(latents, noise, timesteps), scheduler.get_velocity(latents, noise, timesteps))


def test_a_perfect_v_prediction_gives_back_the_latents() -> None:
    latents, noise, timesteps = draw(6)
    objective = Diffusion("v_prediction", SCHEDULER.alphas_cumprod)
    signal = SCHEDULER.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    v = objective.target(latents, noise, timesteps)
    recovered = signal.sqrt() * objective.noised(latents, noise, timesteps) - (1 - signal).sqrt() * v
    torch.testing.assert_close(recovered, latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights_of_every_time_step(prediction_type: str) -> None:
    weights = Diffusion(prediction_type, SCHEDULER.alphas_cumprod, 5.0).row_weights(torch.arange(1000))
    assert weights is not None
    expected = [snr_weight(prediction_type, timestep, 5.0) for timestep in range(0, 1000, 37)]
    assert weights[::37].tolist() == pytest.approx(expected, rel=1e-3)
    assert (weights > 0).all()
    assert (weights <= 1).all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_last_time_without_a_trace_of_the_picture(prediction_type: str) -> None:
    """Schedules with zero terminal SNR (Lin et al. 2024): nothing is divided by nothing."""
    scheduler = DDPMScheduler.from_config(SCHEDULER.config, rescale_betas_zero_snr=True)
    objective = Diffusion(prediction_type, scheduler.alphas_cumprod, 5.0)
    last = torch.tensor([999, 999])
    assert scheduler.alphas_cumprod[-1] == 0
    weights = objective.row_weights(last)
    assert weights is not None
    assert weights.tolist() == ([1.0, 1.0] if prediction_type == "epsilon" else [0.0, 0.0])
    latents, noise, _ = draw(2)
    seen, said = objective.noised(latents, noise, last), objective.target(latents, noise, last)
    found, found_noise = objective.invert(seen, said, last)
    assert found.isfinite().all()
    torch.testing.assert_close(objective.noised(found, found_noise, last), seen, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(objective.target(found, found_noise, last), said, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rescale", [False, True])
def test_debiased_weights_are_finite_and_the_same_for_noise_and_v(rescale: bool) -> None:
    """An error of the noise is one of v times the root of the signal: both forms weigh it alike."""
    betas = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=rescale).alphas_cumprod
    times = torch.arange(1000)
    noise, v = (Diffusion(kind, betas, debiased=True).row_weights(times) for kind in ("epsilon", "v_prediction"))
    assert noise is not None
    assert v is not None
    for weights in (noise, v):
        assert weights.isfinite().all()
        assert (weights >= 0).all()
    seen = betas / (1 - betas) > 1e-3
    torch.testing.assert_close((v / betas)[seen], noise[seen])
    torch.testing.assert_close(noise[seen], ((1 - betas) / betas).sqrt()[seen])


def test_huber_is_the_square_near_zero_and_the_size_far_from_it() -> None:
    target = torch.zeros(1, 1, 1, 1)

    def loss(error: float, delta: float | None) -> float:
        prediction = torch.full_like(target, error)
        return dreambooth_loss(prediction, target, prior_loss_weight=None, huber_delta=delta).total.item()

    assert loss(1e-3, 0.1) == pytest.approx(1e-6, rel=1e-3)
    assert loss(100.0, 0.1) == pytest.approx(2 * 0.1 * (100 - 0.1), rel=1e-3)
    assert loss(-100.0, 0.1) == loss(100.0, 0.1)
    assert loss(3.0, None) == pytest.approx(9.0)


def test_an_unknown_prediction_type() -> None:
    with pytest.raises(ValueError, match="'sample'"):
        Diffusion("sample", SCHEDULER.alphas_cumprod)


@pytest.mark.parametrize("prior", [True, False])
def test_the_mean_of_an_accumulated_step(prior: bool) -> None:
    parts = [
        Loss(torch.tensor(n + 0.0), torch.tensor(n + 1.0), torch.tensor(n * 2.0) if prior else None) for n in (1, 4)
    ]
    assert Loss.mean(parts) == Loss(torch.tensor(2.5), torch.tensor(3.5), torch.tensor(5.0) if prior else None)


def test_detached_losses_keep_no_graph() -> None:
    prediction, target, _ = draw(2)
    loss = dreambooth_loss(prediction.requires_grad_(), target, prior_loss_weight=1.0)
    assert loss.total.requires_grad
    assert not any(part is not None and part.requires_grad for part in loss.detach())
