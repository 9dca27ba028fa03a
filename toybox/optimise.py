"""Training for a given time; the whole step, optimizer and weight average included, is one CUDA graph on a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Steps before the capture, so that libraries choose kernels and allocate workspaces. They train like any other.
_WARM_UP_STEPS = 3
_SECONDS_A_LINE = 15


@dataclass(frozen=True)
class Outcome:
    """The outcome of a training.

    Attributes:
        loss: mean over about the last twentieth of the steps.
    """

    steps: int
    rows_a_second: float
    loss: float

    def figures(self) -> dict[str, float]:
        return {"steps": self.steps, "pictures_per_s": round(self.rows_a_second), "loss": round(self.loss, 4)}


def train_for(
    seconds: float,
    modules: Sequence[nn.Module],
    loss: Callable[[], Tensor],
    *,
    name: str,
    rows: int,
    rate: float,
    weight_decay: float = 0.01,
) -> Outcome:
    """Trains ``modules`` in place with AdamW until the time is over, for one step at least.

    On a GPU forward and backward passes see bfloat16 copies of the weights, and the optimizer float32 ones. What is
    left in the modules, in float32 and eval mode, is an average over about the last twentieth of the steps.

    Args:
        modules: in float32, all on one device; weights that want no gradients stay as they are.
        loss: draws a batch and returns its loss, a float32 scalar. It is captured: on a GPU it must neither wait for
            the device nor depend on anything but tensors and the default generator.
        name: for the lines about the progress.
        rows: of a batch.
        rate: the highest learning rate; it rises over the first 2 % of the time, then falls as a cosine.
    """
    started = shown = time.monotonic()
    parameters = [parameter for module in modules for parameter in module.parameters()]
    weights: list[Tensor] = [parameter for parameter in parameters if parameter.requires_grad]
    device = weights[0].device
    on_gpu = device.type == "cuda"
    for module in modules:
        module.train()
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    masters = [weight.detach().clone() for weight in weights]
    averages = [master.clone() for master in masters]
    slots = [torch.zeros_like(master) for master in masters]
    for master, slot in zip(masters, slots, strict=True):
        master.grad = slot
    if on_gpu:
        for parameter in parameters:  # alone: angles of rotary positions would be rounded
            parameter.data = parameter.data.bfloat16()
    learning_rate, averaging, average_loss = (torch.ones((), device=device) for _ in range(3))
    learning_rate.fill_(_rate(rate, 0))
    optimizer = torch.optim.AdamW(
        masters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True, capturable=on_gpu
    )

    def step() -> None:
        value = loss()
        gradients = torch.autograd.grad(value, weights)
        with torch.no_grad():
            torch._foreach_copy_(slots, gradients)
            torch.nn.utils.clip_grad_norm_(masters, 1.0, foreach=on_gpu)
            optimizer.step()
            torch._foreach_copy_(weights, masters)
            difference = torch._foreach_sub(masters, averages)
            torch._foreach_mul_(difference, averaging)
            torch._foreach_add_(averages, difference)
            average_loss.lerp_(value.detach(), averaging)

    run = _graphed(step) if on_gpu else step
    steps = 0
    while True:
        if not on_gpu or steps % 10 == 0:
            if on_gpu:
                torch.cuda.synchronize()
            now = time.monotonic()
            share = (now - started) / seconds if seconds > 0 else 1.0
            if steps and share >= 1:
                break
            learning_rate.fill_(_rate(rate, share))
            averaging.fill_(min(1.0, 20 / max(1, steps)))
            if now - shown > _SECONDS_A_LINE:
                shown = now
                speed = steps * rows / (now - started)
                print(
                    f"{name} seconds={now - started:.0f} steps={steps} pictures_per_s={speed:.0f} "
                    f"loss={average_loss.item():.4f}",
                    flush=True,
                )
        run()
        steps += 1
    outcome = Outcome(steps, steps * rows / (time.monotonic() - started), average_loss.item())
    for module in modules:
        module.float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        module.requires_grad_(False).eval()
    torch._foreach_copy_(weights, averages)
    print(f"{name} done steps={steps} pictures_per_s={outcome.rows_a_second:.0f} loss={outcome.loss:.4f}", flush=True)
    return outcome


def random_rows(count: int, batch: int, device: torch.device) -> Tensor:
    """Draws the numbers of ``batch`` rows of ``count``, int64."""
    return torch.randint(count, (batch,), device=device)


def _rate(highest: float, share: float) -> float:
    """The learning rate after a share of the time."""
    return highest * min(1.0, 0.02 + share / 0.02) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, share)))


def _graphed(step: Callable[[], None]) -> Callable[[], None]:
    """``step`` without the CPU's part in it: captured once, replayed by each call."""
    # Warm-up and capture share one stream: autograd's nodes remember theirs.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay
