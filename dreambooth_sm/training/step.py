"""One optimizer step: backward passes and the update, run eagerly or replayed as a CUDA graph, for any updater."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dreambooth_sm.training.attention import Attention
from dreambooth_sm.training.ema import Ema
from dreambooth_sm.training.losses import Loss
from dreambooth_sm.training.updater import Updater

# Steps before the captures: they let libraries choose kernels and allocate workspaces. They train like any other. Each
# shape has at least one of them.
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Inputs:
    """Inputs that the loss of one batch is computed from; tensors on the device.

    Attributes:
        latents, noise: ``(rows, 4, h, w)`` float32.
        timesteps: int64 ``(rows,)``.
        prompts: int64 ``(rows,)``, rows of the prompt table.
        weights: ``(rows, 1, h, w)`` float32, of the elements in the loss; None in all batches of a job or in none.
        extras: float32, what the denoiser is told of the pictures, by name; the same names in all batches.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompts: Tensor
    weights: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def copy_(self, other: Inputs) -> None:
        for mine, theirs in zip(self._tensors().values(), other._tensors().values(), strict=True):
            mine.copy_(theirs)
        for name, extra in self.extras.items():
            extra.copy_(other.extras[name])

    def clone(self) -> Inputs:
        own: dict[str, Any] = {name: value.clone() for name, value in self._tensors().items()}
        return replace(self, **own, extras={name: value.clone() for name, value in self.extras.items()})

    def of(self, rows: slice) -> Inputs:
        """Some rows, which share the memory of these."""
        own: dict[str, Any] = {name: value[rows] for name, value in self._tensors().items()}
        return replace(self, **own, extras={name: value[rows] for name, value in self.extras.items()})

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


LossFunction = Callable[[Inputs], Loss]


class GradientAverage:
    """Averages gradients over the processes, each as soon as the last backward pass of a step has made it.

    Large gradients travel while the rest of the backward pass runs; small ones go together at the end.
    """

    # Elements from which on a gradient travels by itself.
    LARGE = 1 << 18

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.active = False
        self._waiting: list[dist.Work] = []
        self._small = [p for p in parameters if p.numel() < self.LARGE]
        self._hooks = [p.register_post_accumulate_grad_hook(self._send) for p in parameters if p.numel() >= self.LARGE]

    def _send(self, parameter: Tensor) -> None:
        if self.active and parameter.grad is not None:
            self._waiting.append(self._mean(parameter.grad))

    @staticmethod
    def _mean(tensor: Tensor) -> dist.Work:
        if tensor.is_cuda:  # NCCL divides on the way
            work = dist.all_reduce(tensor, dist.ReduceOp.AVG, async_op=True)
        else:
            work = dist.all_reduce(tensor.div_(dist.get_world_size()), async_op=True)
        assert work is not None
        return work

    def finish(self) -> None:
        """After the backward pass: the rest, and waits until all have arrived."""
        grads = [p.grad for p in self._small if p.grad is not None]
        if grads:
            flat = torch.cat([grad.flatten() for grad in grads])
            self._mean(flat).wait()
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view(grad.shape))
        for work in self._waiting:
            work.wait()
        self._waiting.clear()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Step:
    """Makes optimizer steps, eagerly.

    Args:
        attention: makes contexts for a step. They reach over the backward pass, which may compute attention again.

    Attributes:
        ema: an average that each step updates; to be set before the first one.
        average: averages the gradients where several processes train together; likewise.
        shapes: how many shapes the latents of steps have; likewise.
    """

    def __init__(self, loss: LossFunction, updater: Updater, attention: Attention = contextlib.nullcontext) -> None:
        self.updater = updater
        self.ema: Ema | None = None
        self.average: GradientAverage | None = None
        self.shapes = 1
        self._loss, self._attention = loss, attention

    def __call__(self, parts: Sequence[Inputs]) -> Loss:
        """One step over the batches of ``parts`` (several with gradient accumulation); their mean loss, detached.

        The result is overwritten by the next call.
        """
        self._prepare()
        result = self._run(parts)
        if self.ema:
            self.ema.update()
        return result

    def _prepare(self) -> None:
        self.updater.prepare_step()
        if self.ema:
            self.ema.prepare_step()

    def _run(self, parts: Sequence[Inputs]) -> Loss:
        result = self._backward(parts)
        self._update()
        return result

    def _backward(self, parts: Sequence[Inputs]) -> Loss:
        """The backward passes; gradients are averaged over the processes."""
        losses: list[Loss] = []
        for number, inputs in enumerate(parts, start=1):
            if self.average:
                self.average.active = number == len(parts)
            with self._attention():
                loss = self._loss(inputs)
                self.updater.scale(loss.total / len(parts)).backward()
            losses.append(loss.detach())
        if self.average:
            self.average.finish()
        return Loss.mean(losses)

    def _update(self) -> None:
        self.updater.update()

    def restart(self, loss: LossFunction, shapes: int) -> None:
        """Makes the steps of another training; updater and average begin again as well.

        Args:
            loss: the same as before where graphs are to serve again.
            shapes: how many shapes the latents of its steps have.
        """
        self._loss, self.shapes = loss, shapes

    def forget(self) -> None:
        """Lets go of what was captured."""

    def close(self) -> None:
        """Lets go of the model."""
        if self.average:
            self.average.close()
        self.updater.close()


class CapturedStep(Step):
    """Captures the whole step as a CUDA graph, one for each shape of the latents, and replays it.

    The first steps run eagerly. An update that can't be captured follows each replay.
    """

    def __init__(self, loss: LossFunction, updater: Updater, attention: Attention = contextlib.nullcontext) -> None:
        super().__init__(loss, updater, attention)
        self._eager_steps = 0
        self._stream = torch.cuda.Stream()
        # By the shape of the latents: what its graph reads; the graph and what it writes.
        self._inputs: dict[torch.Size, list[Inputs]] = {}
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Loss]] = {}
        # Where the update is not in the graphs: the gradients that each of them writes.
        self._gradients: dict[torch.Size, list[Tensor | None]] = {}

    def __call__(self, parts: Sequence[Inputs]) -> Loss:
        self._prepare()
        # Warm-up, capture and replay share one stream: autograd's accumulation nodes remember theirs.
        self._stream.wait_stream(torch.cuda.current_stream())
        shape = parts[0].latents.shape
        if self._graphs and shape not in self._graphs:  # of another training than the one that was captured
            self.forget()
        with torch.cuda.stream(self._stream):
            if self._eager_steps < WARM_UP_STEPS or len(self._inputs) < self.shapes:
                self._eager_steps += 1
                if shape not in self._inputs:
                    self._inputs[shape] = [inputs.clone() for inputs in parts]
                result = self._run(parts)
            else:
                if not self._graphs:
                    self._capture()
                for mine, new in zip(self._inputs[shape], parts, strict=True):
                    mine.copy_(new)
                graph, result = self._graphs[shape]
                graph.replay()
                if not self.updater.capturable:
                    for parameter, gradient in zip(self.updater.parameters, self._gradients[shape], strict=True):
                        parameter.grad = gradient
                    self._update()
        torch.cuda.current_stream().wait_stream(self._stream)
        if self.ema and self.ema.on_cpu:
            self.ema.update()
        return result

    def _update(self) -> None:
        super()._update()
        if self.ema and not self.ema.on_cpu:
            self.ema.update()

    def _capture(self) -> None:
        """Captures a graph for each shape, all in one memory pool: only one of them runs at a time. The largest comes
        first, so that the others fit into its memory."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the warm-up left; the graphs have a pool of their own
        pool = torch.cuda.graph_pool_handle()
        for shape in sorted(self._inputs, key=torch.Size.numel, reverse=True):
            graph = torch.cuda.CUDAGraph()
            self.updater.prepare_capture()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                result = (self._run if self.updater.capturable else self._backward)(self._inputs[shape])
            self._graphs[shape] = graph, result
            self._gradients[shape] = [parameter.grad for parameter in self.updater.parameters]
            self.updater.drop_gradients()

    def restart(self, loss: LossFunction, shapes: int) -> None:
        if loss is not self._loss or not self._graphs:
            self.forget()
        super().restart(loss, shapes)

    def close(self) -> None:
        super().close()
        self.forget()

    def forget(self) -> None:
        self._graphs, self._inputs, self._gradients = {}, {}, {}
