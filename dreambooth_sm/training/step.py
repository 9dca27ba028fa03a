"""One optimizer step: backward passes and the update, run eagerly or replayed as a CUDA graph.

Two kinds, with one face: :class:`FastStep` for our optimizer (16-bit weights, update inside the backward pass, the
whole step captured), and :class:`ReferenceStep` for torch's and bitsandbytes' AdamW under autocast.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dreambooth_sm.plan import Plan
from dreambooth_sm.training.adamw_blockwise import BlockwiseAdamW
from dreambooth_sm.training.ema import Ema
from dreambooth_sm.training.losses import Loss

# Steps before the captures: they let libraries choose kernels and allocate workspaces. They train like any other. Each
# shape has at least one of them.
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Inputs:
    """What the loss of one batch is computed from; tensors on the device.

    Attributes:
        latents, noise: ``(rows, 4, h, w)`` float32.
        timesteps: int64 ``(rows,)``.
        prompts: int64 ``(rows,)``, rows of the prompt table.
        weights: ``(rows, 1, h, w)`` float32, of the elements in the loss; None in all batches of a job or in none.
        sizes: ``(rows, 6)`` float32, which SDXL is told of the pictures; None with others.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompts: Tensor
    weights: Tensor | None = None
    sizes: Tensor | None = None

    def copy_(self, other: Inputs) -> None:
        for mine, theirs in zip(self._tensors().values(), other._tensors().values(), strict=True):
            mine.copy_(theirs)

    def clone(self) -> Inputs:
        return Inputs(**{name: value.clone() for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}


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
            self._waiting.append(self._sum(parameter.grad))

    @staticmethod
    def _sum(tensor: Tensor) -> dist.Work:
        work = dist.all_reduce(tensor.div_(dist.get_world_size()), async_op=True)
        assert work is not None
        return work

    def finish(self) -> None:
        """After the backward pass: the rest, and waits until all have arrived."""
        grads = [p.grad for p in self._small if p.grad is not None]
        if grads:
            flat = torch.cat([grad.flatten() for grad in grads])
            self._sum(flat).wait()
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view(grad.shape))
        for work in self._waiting:
            work.wait()
        self._waiting.clear()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Step(ABC):
    """Makes optimizer steps.

    Attributes:
        optimizer: learning-rate schedulers act on it.
        ema: an average that each step updates; to be set before the first one.
        average: averages the gradients where several processes train together; likewise.
        shapes: how many shapes the latents of steps have; likewise.
    """

    _loss: LossFunction
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    average: GradientAverage | None = None
    shapes: int = 1

    @abstractmethod
    def __call__(self, parts: Sequence[Inputs]) -> Loss:
        """One step over the batches of ``parts`` (several with gradient accumulation); their mean loss, detached.

        The result is overwritten by the next call.
        """

    def _backward(self, parts: Sequence[Inputs], scale: Callable[[Tensor], Tensor]) -> list[Loss]:
        """The backward passes of a step; gradients are averaged over the processes at its end."""
        losses: list[Loss] = []
        for number, inputs in enumerate(parts, start=1):
            if self.average:
                self.average.active = number == len(parts)
            loss = self._loss(inputs)
            scale(loss.total / len(parts)).backward()
            losses.append(loss.detach())
        if self.average:
            self.average.finish()
        return losses

    @abstractmethod
    def skipped(self) -> bool:
        """Whether the last step met gradients that are not finite, and left weights as they were. Waits for it."""

    @property
    @abstractmethod
    def scales_loss(self) -> bool:
        """Whether a loss scaler may make steps be skipped."""

    def read(self, parameter: Tensor) -> Tensor:
        """The full-precision value of a parameter, float32."""
        return parameter.detach().float()

    def bits(self, parameter: Tensor) -> list[Tensor]:
        """What a parameter's full-precision value is stored as, as integers; views, no copies."""
        return [parameter.detach().view({2: torch.int16, 4: torch.int32}[parameter.element_size()])]

    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Sets a parameter to a full-precision value."""
        parameter.detach().copy_(value)

    def average_into(self, average: Tensor, parameter: Tensor, weight: Tensor) -> None:
        """Moves an average by the share ``weight`` towards the full-precision value of a parameter."""
        average.lerp_(self.read(parameter), weight)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def accepts(self, state: dict[str, Any]) -> bool:
        """Whether ``state`` has this step's format; another plan's may not."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None:
        """Lets go of the model."""
        if self.average:
            self.average.close()


class FastStep(Step):
    """Our optimizer; see :class:`~dreambooth_sm.training.adamw_blockwise.BlockwiseAdamW`."""

    def __init__(
        self, loss: LossFunction, parameters: list[torch.nn.Parameter], plan: Plan, options: dict[str, Any], seed: int
    ) -> None:
        self._loss, self._parameters, self._plan = loss, parameters, plan
        self.optimizer: BlockwiseAdamW = BlockwiseAdamW(
            parameters,
            **options,
            state_bits=plan.state_bits,  # type: ignore[arg-type]
            master="stochastic" if plan.weights == "stochastic" else "residual",
            update_in_backward=plan.update_in_backward,
            max_grad_norm=plan.max_grad_norm,
            seed=seed,
        )
        self._eager_steps = 0
        self._stream = torch.cuda.Stream() if plan.cuda_graph else None
        # By the shape of the latents: what its graph reads; the graph and what it writes.
        self._inputs: dict[torch.Size, list[Inputs]] = {}
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Loss]] = {}

    def __call__(self, parts: Sequence[Inputs]) -> Loss:
        self.optimizer.prepare_step()
        if self.ema:
            self.ema.prepare_step()
        if self._stream is None:
            return self._run(parts)
        # Warm-up, capture and replay share one stream: autograd's accumulation nodes remember theirs.
        self._stream.wait_stream(torch.cuda.current_stream())
        shape = parts[0].latents.shape
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
        torch.cuda.current_stream().wait_stream(self._stream)
        if self.ema and self.ema.on_cpu:
            self.ema.update()
        return result

    def _run(self, parts: Sequence[Inputs]) -> Loss:
        losses = self._backward(parts, self.optimizer.scale)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema and not (self._plan.cuda_graph and self.ema.on_cpu):
            self.ema.update()
        return Loss.mean(losses)

    def _capture(self) -> None:
        """Captures a graph for each shape, all in one memory pool: only one of them runs at a time. The largest comes
        first, so that the others fit into its memory."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the warm-up left; the graphs have a pool of their own
        pool = torch.cuda.graph_pool_handle()
        for shape in sorted(self._inputs, key=torch.Size.numel, reverse=True):
            graph = torch.cuda.CUDAGraph()
            self.optimizer.prepare_capture()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                result = self._run(self._inputs[shape])
            self._graphs[shape] = graph, result

    def skipped(self) -> bool:
        return bool(self.optimizer.found_nonfinite.item())

    @property
    def scales_loss(self) -> bool:
        return self._plan.precision == "fp16"

    def read(self, parameter: Tensor) -> Tensor:
        return self.optimizer.fp32_weight(parameter)

    def bits(self, parameter: Tensor) -> list[Tensor]:
        residual = self.optimizer.state[parameter].get("residual")
        return super().bits(parameter) + ([] if residual is None else [residual])

    def write(self, parameter: Tensor, value: Tensor) -> None:
        self.optimizer.set_fp32_weight(parameter, value)

    def average_into(self, average: Tensor, parameter: Tensor, weight: Tensor) -> None:
        self.optimizer.average_into(average, parameter, weight)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state; the residuals are left to the full-precision weights, which :meth:`read` gives."""
        state = self.optimizer.state_dict()
        for tensors in state["state"].values():
            tensors.pop("residual", None)
        return state

    def accepts(self, state: dict[str, Any]) -> bool:
        return bool(state.get("blockwise", {}).get("state_bits") == self._plan.state_bits)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave; the weights have to be written before."""
        own = self.optimizer.state_dict()
        for index, tensors in own["state"].items():
            if "residual" in tensors:
                state["state"][index]["residual"] = tensors["residual"]
        state["blockwise"]["master"] = own["blockwise"]["master"]
        self.optimizer.load_state_dict(state)

    def close(self) -> None:
        super().close()
        self.optimizer.close()
        self._graphs, self._inputs = {}, {}


class ReferenceStep(Step):
    """torch's AdamW on fp32 weights, or bitsandbytes' with 8-bit state, under autocast with torch's loss scaler."""

    def __init__(
        self, loss: LossFunction, parameters: list[torch.nn.Parameter], plan: Plan, options: dict[str, Any]
    ) -> None:
        self._loss, self._parameters, self._plan = loss, parameters, plan
        if plan.optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            self.optimizer = AdamW8bit(parameters, **options)
        else:
            self.optimizer = torch.optim.AdamW(parameters, fused=plan.device == "cuda", **options)
        self._scaler = torch.amp.GradScaler(plan.device, enabled=plan.precision == "fp16")
        self._skipped = False

    def __call__(self, parts: Sequence[Inputs]) -> Loss:
        losses = self._backward(parts, self._scaler.scale)
        self._scaler.unscale_(self.optimizer)
        if self._plan.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._plan.max_grad_norm)
        before = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._skipped = self._scaler.get_scale() < before
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.prepare_step()
            self.ema.update()
        return Loss.mean(losses)

    def skipped(self) -> bool:
        return self._skipped

    @property
    def scales_loss(self) -> bool:
        return self._scaler.is_enabled()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def accepts(self, state: dict[str, Any]) -> bool:
        return "optimizer" in state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        super().close()
        self.optimizer.zero_grad(set_to_none=True)


def make_step(
    loss: LossFunction, parameters: list[torch.nn.Parameter], plan: Plan, options: dict[str, Any], seed: int
) -> Step:
    """The step that the plan asks for.

    Args:
        parameters: on the device, in the precision that the plan keeps weights in.
        options: ``lr``, ``betas``, ``eps`` and ``weight_decay``.
    """
    if plan.optimizer == "blockwise":
        return FastStep(loss, parameters, plan, options, seed)
    return ReferenceStep(loss, parameters, plan, options)


def attention_context(
    plan: Plan, unet: Any, warn: Callable[[str], None]
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Sets the attention kernels that the plan names, and makes contexts for the forward pass.

    xformers changes the UNet for good. Where it can't run (not installed, or built for another torch), SDPA serves
    and ``warn`` gets a line.
    """
    if plan.attention == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warn(f"attention=xformers can't run here ({reason}); SDPA serves instead")
    if plan.attention == "flash_attention":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        return lambda: sdpa_kernel(backends, set_priority=True)
    return contextlib.nullcontext
