"""AdamW with blockwise quantised moments, for weights of 32 or 16 bits.

The optimizer (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019) keeps its two moments in 8 bits
(Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022) or 4 bits (Li et al., "Memory Efficient
Optimizers with 4-bit States", 2023) and can update 16-bit weights as if an fp32 copy existed.

**Codes.** A block of consecutive elements shares one fp32 scale, its largest magnitude; an element is stored as an
integer `c` that stands for `scale * (c / levels) ** power`. Such a power map has no table, so a kernel needs no
look-up, and its steps shrink towards zero like those of the dynamic map of the 8-bit paper. Three details matter
more than the map itself:

- The second moment never gets the code 0: the dynamic map's zero turns a small moment into a division by eps.
- It is rounded stochastically (8 bits). It moves by 0.1 % a step, less than half the distance between two codes:
  rounding to nearest freezes it, and rounding up, the obvious cure for zeros, lets it drift to several times its
  value within some hundred steps. Stochastic rounding keeps its expectation.
- With 4 bits the same holds for the first moment, while the second is too coarse for noise: it is rounded to nearest.

**Weights of 16 bits.** An update of 2e-6 is less than half a step of a bfloat16 weight from 1e-3 on and of a float16
weight from 8e-3 on. Either the part that does not fit is kept (`master="residual"`, 16 more bits an element) or
the weight is rounded stochastically (`master="stochastic"`).

`adamw_reference` is the definition of all this in plain torch. It runs on every device and is what CPUs and cards
without Triton use; `adamw_blockwise_triton` is the same function as one kernel.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from dreambooth_sm.training.adamw_reference import (
    MASK32,
    hash32,
    join_bfloat16,
    join_float16,
    reference_update,
    split_bfloat16,
    split_float16,
)
from dreambooth_sm.training.kernels import kernels_for, obstacle
from dreambooth_sm.training.moments import BLOCK_FORMATS, DeviceScalars, Moments

# Parameters below this size share one launch at the end of the step: a launch of their own costs more than their
# memory traffic. In SD 1.5's UNet these are 446 of 686, with 0.5 % of the elements. On an H200 that takes a step from
# 6.9 to 4.5 ms; a size of 524,288 would save 0.1 ms more, and hold back 3 % of the gradients.
SMALL_PARAMETER = 131_072


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((x.stride(i), x.shape[i]) for i in range(x.dim()) if x.shape[i] != 1):
        if stride != expected:
            return False
        expected *= size
    return x.numel() > 0


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return all(i == j or n == 1 for i, j, n in zip(a.stride(), b.stride(), a.shape, strict=True))


def _in_memory_order(x: Tensor) -> Tensor:
    return x.as_strided((x.numel(),), (1,))


@dataclass
class _Slot:
    """A parameter and where it belongs."""

    param: Tensor
    index: int
    group: int
    moments: Moments
    first_block: int = 0  # in the moments of its bundle


@dataclass
class _Bundle:
    """Small parameters of one type, updated by one launch, with their moments one after the other."""

    slots: list[_Slot]
    moments: Moments
    table: Tensor
    # Gradients in the order of the moments, padded to blocks; made when the first gradients show their type.
    grads: Tensor | None = None


class BlockwiseAdamW(Optimizer):
    """AdamW with 16-, 8- or 4-bit moments for fp32, bf16 and fp16 weights, built for CUDA graphs.

    A step is `prepare_step()`, forward, `scale(loss).backward()`, `step()`. Everything but `prepare_step()` can be
    captured in a CUDA graph; call `prepare_step()` before each replay, on the stream of the replay:

        optimizer = BlockwiseAdamW(unet.parameters(), lr=2e-6, update_in_backward=True)
        for batch in batches:
            optimizer.prepare_step()
            optimizer.scale(loss(batch)).backward()
            optimizer.step()

    State, in bytes a parameter: 4 with 16 bits, 2 with 8, 1 with 4, 2 more with a residual, and 8 a block of 256 (4
    bits: 128) elements. With `update_in_backward` gradients of large parameters live only for a moment.

    Args:
        params: parameters or parameter groups; a group may set `lr`, `betas`, `eps` and `weight_decay`. All on one
            device, dense in memory (contiguous or channels_last, say), already where they will stay.
        lr: learning rate. `prepare_step()` reads it from `param_groups`, so schedulers work as usual.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; a step subtracts `lr * weight_decay * weight`.
        bias_correction: divide the moments by `1 - beta ** step`.
        state_bits: 8; 16 for state that is as good as fp32's; 4 for the smallest memory, at a visible loss of fidelity.
        master: what stands in for an fp32 copy of 16-bit weights. "residual": 16 further bits an element; with bf16
            the two are exactly an fp32 weight, with fp16 they are from 2^-14 on, and 2^-37 apart below.
            "stochastic": nothing is stored, weights are rounded at random without bias. No effect on fp32 weights.
        update_in_backward: update a parameter as soon as its gradient is complete and drop the gradient. A block
            of elements with a gradient that is not finite is then left as it is. A step then has one backward pass:
            gradients cannot accumulate over several. Without it, `step()` makes the update, leaves the gradients to
            `zero_grad()`, and skips the whole step on a non-finite gradient.
        max_grad_norm: clip gradients to this global norm; None for no clipping. Not with `update_in_backward`.
        dynamic_loss_scale: scale the loss to keep fp16 gradients in range: halved after a step with a gradient that
            is not finite, doubled after `growth_interval` steps without. None: if any parameter is fp16. Skipped
            steps count as steps in the bias correction, which makes the next ones somewhat smaller.
        initial_loss_scale, min_loss_scale, max_loss_scale: its start and bounds.
        growth_interval: in steps.
        seed: of the stochastic rounding. Same seed, data and state: same result, bit for bit.
        backend: "triton" (CUDA of compute capability 7.5 or higher), "torch" (any device; the same function, slower)
            or "auto".

    Attributes:
        loss_scale: () float32 on the device; 1 if there is no loss scaling.
        found_nonfinite: () float32 on the device, 1 if the last step met a gradient that is not finite. Valid
            from `step()` to the next `prepare_step()`.
        nonfinite_steps: () float32 on the device, how many steps did.
        grad_norm: () float32 on the device, global norm before clipping; without `update_in_backward` only.

    Raises:
        ValueError: a number is out of range, a parameter of another type, layout or device, clipping together with
            `update_in_backward`, or a backend that cannot run here.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bias_correction: bool = True,
        state_bits: Literal[16, 8, 4] = 8,
        master: Literal["residual", "stochastic"] = "residual",
        update_in_backward: bool = False,
        max_grad_norm: float | None = None,
        dynamic_loss_scale: bool | None = None,
        initial_loss_scale: float = 65536.0,
        min_loss_scale: float = 1.0,
        max_loss_scale: float = 2.0**24,
        growth_interval: int = 2000,
        seed: int = 0,
        backend: Literal["auto", "triton", "torch"] = "auto",
    ) -> None:
        if state_bits not in BLOCK_FORMATS:
            raise ValueError(f"state_bits must be 16, 8 or 4, not {state_bits!r}")
        if master not in ("residual", "stochastic"):
            raise ValueError(f'master must be "residual" or "stochastic", not {master!r}')
        if max_grad_norm is not None and update_in_backward:
            raise ValueError(
                "max_grad_norm needs all gradients at once; with update_in_backward they are never all there"
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, not {max_grad_norm}")
        if not 0 < min_loss_scale <= initial_loss_scale <= max_loss_scale:
            raise ValueError("loss scales must obey 0 < min_loss_scale <= initial_loss_scale <= max_loss_scale")
        if growth_interval < 1:
            raise ValueError(f"growth_interval must be at least 1, not {growth_interval}")
        self._slots: list[_Slot] = []
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

        first = self.param_groups[0]["params"][0]
        self._device: torch.device = first.device
        self._format = BLOCK_FORMATS[state_bits]
        self._master = master
        self._in_backward = update_in_backward
        self._max_grad_norm = max_grad_norm
        self._bias_correction = bias_correction
        self._seed = seed
        self._loss_scale_bounds = (min_loss_scale, max_loss_scale)
        self._initial_loss_scale = initial_loss_scale
        self._growth_interval = growth_interval
        self._steps = 0
        self._prepared = False
        self._updated: set[int] = set()  # in backward, since the step was prepared
        self._kernels = _load_kernels(backend, self._device)

        params_in_order = [(p, g) for g, group in enumerate(self.param_groups) for p in group["params"]]
        self._dynamic = (
            any(p.dtype == torch.float16 for p, _ in params_in_order)
            if dynamic_loss_scale is None
            else dynamic_loss_scale
        )
        self.loss_scale = torch.tensor(initial_loss_scale if self._dynamic else 1.0, device=self._device)
        self.found_nonfinite = torch.zeros((), device=self._device)
        self.nonfinite_steps = torch.zeros((), device=self._device)
        self.grad_norm = torch.zeros((), device=self._device)
        self._clean_steps = torch.zeros((), device=self._device)
        self._scalars = DeviceScalars(
            hyper=torch.zeros(1 + len(self.param_groups), 8, device=self._device),
            control=torch.zeros(2, device=self._device),
            nonfinite=self.found_nonfinite,
        )
        self._scalars.control[0] = self.loss_scale.reciprocal()

        self._bundles: list[_Bundle] = []
        self._allocate(params_in_order)
        self._addresses = [slot.param.data_ptr() for slot in self._slots]
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        if update_in_backward:
            self._register_hooks()

    # -- construction ------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not possible after construction: state is allocated there once, at addresses that graphs keep.

        Raises:
            ValueError: a hyperparameter of the group is out of range, or a parameter cannot be optimized.
            RuntimeError: called after construction.
        """
        if self._slots:
            raise RuntimeError("BlockwiseAdamW takes all its parameter groups at construction")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        beta1, beta2 = group["betas"]
        if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
            raise ValueError(f"betas must be in [0, 1), not {group['betas']}")
        if not float(group["lr"]) >= 0.0 or not group["weight_decay"] >= 0.0:
            raise ValueError("lr and weight_decay must not be negative")
        if not group["eps"] > 0.0:
            raise ValueError(f"eps must be above 0, not {group['eps']}")
        device = self.param_groups[0]["params"][0].device
        for param in group["params"]:
            if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"parameters must be float32, bfloat16 or float16, not {param.dtype}")
            if param.device != device:
                raise ValueError(f"parameters must be on one device, not on {device} and {param.device}")
            if not _is_dense(param):
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} and strides {param.stride()} "
                    "is empty or not dense in memory"
                )
            if param.numel() >= 2**31:
                raise ValueError(f"a parameter of shape {tuple(param.shape)} has 2^31 elements or more")

    def _allocate(self, params: list[tuple[Tensor, int]]) -> None:
        bundled: dict[torch.dtype, list[_Slot]] = {}
        fmt = self._format
        for index, (param, group) in enumerate(params):
            small = self._kernels is not None and param.numel() < SMALL_PARAMETER
            moments = Moments.zeros(
                0 if small else fmt.blocks(param.numel()), fmt, self._has_residual(param), self._device
            )
            slot = _Slot(param, index, group, moments)
            self._slots.append(slot)
            if small:
                bundled.setdefault(param.dtype, []).append(slot)
        for slots in bundled.values():
            starts = [0]
            for slot in slots:
                starts.append(starts[-1] + fmt.blocks(slot.param.numel()))
            moments = Moments.zeros(starts[-1], fmt, self._has_residual(slots[0].param), self._device)
            for slot, start, end in zip(slots, starts, starts[1:], strict=False):
                slot.first_block = start
                slot.moments = moments.part(start, end, fmt)
            self._bundles.append(_Bundle(slots, moments, self._table(slots)))
        for slot in self._slots:
            self.state[slot.param] = {k: v for k, v in vars(slot.moments).items() if v is not None}

    def _has_residual(self, param: Tensor) -> bool:
        return self._master == "residual" and param.dtype != torch.float32

    def _table(self, slots: list[_Slot]) -> Tensor:
        assert self._kernels is not None
        rows = [(slot.param.data_ptr(), slot.param.numel(), slot.first_block, slot.group, slot.index) for slot in slots]
        return self._kernels.bundle_table(rows, self._format, self._device)

    def _register_hooks(self) -> None:
        # A hook that held the optimizer, which holds the parameter that holds the hook, would keep all three.
        this = weakref.ref(self)
        bundled = {slot.index for bundle in self._bundles for slot in bundle.slots}
        for slot in self._slots:
            if slot.index in bundled:
                continue
            if not slot.param.requires_grad:
                raise ValueError("update_in_backward needs parameters that require a gradient")

            def update(param: Tensor, index: int = slot.index) -> None:
                optimizer = this()
                if optimizer is not None:
                    optimizer._update_in_hook(index)

            self._hooks.append(slot.param.register_post_accumulate_grad_hook(update))

    # -- a step ------------------------------------------------------------------------------------------------

    def prepare_step(self) -> None:
        """Begin a step: write its numbers to the device. Once a step, before backward, never inside a capture.

        One copy from pinned memory that does not wait for the device. The learning rates are read here.

        Raises:
            RuntimeError: the current stream is capturing a graph.
        """
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("call prepare_step() before the capture and before each replay, not inside")
        self._steps += 1
        rows = [[0.0] * 8]
        for group in self.param_groups:
            lr = float(group["lr"])
            beta1, beta2 = group["betas"]
            correction1 = 1.0 - beta1**self._steps if self._bias_correction else 1.0
            correction2 = 1.0 - beta2**self._steps if self._bias_correction else 1.0
            rows.append(
                [
                    lr / correction1,
                    1.0 / math.sqrt(correction2),
                    group["weight_decay"] * correction1,
                    group["eps"],
                    beta1,
                    beta2,
                    1.0 - beta1,
                    1.0 - beta2,
                ]
            )
        host = torch.tensor(rows, dtype=torch.float32)
        key = hash32(torch.tensor((self._seed * 0x9E3779B9 + self._steps) & MASK32))
        host.view(torch.int32)[0, 0] = key.to(torch.int32)
        if self._device.type == "cuda":
            # New pinned memory each time: an earlier copy may still be under way. The allocator recycles it.
            host = host.pin_memory()
        self._scalars.hyper.copy_(host, non_blocking=True)
        self.found_nonfinite.zero_()
        self._prepared = True
        self._updated.clear()

    def prepare_capture(self) -> None:
        """Begin to capture a graph: what is recorded is not a step, and the numbers on the device stay as they are."""
        self._prepared = True
        self._updated.clear()

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` times the loss scale, in float32; `loss` itself without loss scaling."""
        return loss * self.loss_scale if self._dynamic else loss

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Finish a step: update what backward did not, then the loss scale.

        Args:
            closure: computes the loss and the gradients again; rarely useful.

        Returns:
            What `closure` returned.

        Raises:
            RuntimeError: `prepare_step()` was not called for this step, a parameter's memory has moved since
                construction, or a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_prepared()
        if any(slot.param.data_ptr() != at for slot, at in zip(self._slots, self._addresses, strict=True)):
            raise RuntimeError("a parameter's memory has moved; construct the optimizer after moving the model")
        if not self._in_backward:
            self._measure_gradients()
        bundled: set[int] = set()
        for bundle in self._bundles:
            bundled.update(slot.index for slot in bundle.slots)
            self._update_bundle(bundle)
        for slot in self._slots:
            if slot.param.grad is not None and slot.index not in bundled:
                self._update(slot)
        if self._in_backward:
            for slot in self._slots:
                slot.param.grad = None
        self._update_loss_scale()
        self._prepared = False
        return loss

    def _require_prepared(self) -> None:
        if not self._prepared:
            raise RuntimeError("call prepare_step() once before each step, ahead of backward")

    @torch.no_grad()
    def _update_in_hook(self, index: int) -> None:
        self._require_prepared()
        if index in self._updated:
            raise RuntimeError("with update_in_backward a step has one backward pass: gradients cannot accumulate")
        self._updated.add(index)
        slot = self._slots[index]
        self._update(slot)
        slot.param.grad = None

    def _update(self, slot: _Slot) -> None:
        param, grad = slot.param, slot.param.grad
        assert grad is not None
        if grad.is_sparse:
            raise RuntimeError("BlockwiseAdamW does not take sparse gradients")
        if not _same_layout(grad, param):
            grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        update = reference_update
        if self._kernels is None:
            param, grad = _in_memory_order(param.detach()), _in_memory_order(grad)
        else:
            update = self._kernels.update
        update(param, grad, slot.moments, self._scalars, index=slot.index, group=slot.group, fmt=self._format)

    def _update_bundle(self, bundle: _Bundle) -> None:
        found = [(slot, slot.param.grad) for slot in bundle.slots if slot.param.grad is not None]
        if not found:
            return
        slots = [slot for slot, _ in found]
        grads = [grad for _, grad in found]
        dtype = reduce(torch.promote_types, {g.dtype for g in grads})
        if bundle.grads is None or bundle.grads.dtype != dtype:
            elements = len(bundle.moments.m_scale) * self._format.size
            bundle.grads = torch.zeros(elements, dtype=dtype, device=self._device)
        places = [
            bundle.grads.as_strided(slot.param.shape, slot.param.stride(), slot.first_block * self._format.size)
            for slot in slots
        ]
        torch._foreach_copy_(places, grads)
        table = bundle.table if len(slots) == len(bundle.slots) else self._table(slots)
        assert self._kernels is not None
        self._kernels.update_bundle(
            table, slots[0].param.dtype, bundle.grads, bundle.moments, self._scalars, fmt=self._format
        )

    def _measure_gradients(self) -> None:
        """Global norm; from it the gradients' factor and whether to skip the step."""
        grads = [slot.param.grad for slot in self._slots if slot.param.grad is not None]
        if not grads:
            return
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
        torch.linalg.vector_norm(torch.stack(norms), out=self.grad_norm)
        self.grad_norm.div_(self.loss_scale)
        self.found_nonfinite.copy_(~torch.isfinite(self.grad_norm))
        factor = self.loss_scale.reciprocal()
        if self._max_grad_norm is not None:
            factor = factor * (self._max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        self._scalars.control[0].copy_(factor)
        self._scalars.control[1].copy_(self.found_nonfinite)

    def _update_loss_scale(self) -> None:
        found = self.found_nonfinite
        self.nonfinite_steps.add_(found)
        if not self._dynamic:
            return
        self._clean_steps.add_(1.0).mul_(1.0 - found)
        grow = self._clean_steps >= self._growth_interval
        self.loss_scale.mul_((1.0 - 0.5 * found) * (1.0 + grow.to(torch.float32)))
        self.loss_scale.clamp_(*self._loss_scale_bounds)
        self._clean_steps.mul_(~grow)
        self._scalars.control[0].copy_(self.loss_scale.reciprocal())

    # -- the rest ----------------------------------------------------------------------------------------------

    def fp32_weight(self, param: Tensor) -> Tensor:
        """The full-precision value of a parameter: weight and residual joined, in the parameter's layout.

        Raises:
            KeyError: not a parameter of this optimizer.
        """
        if param not in self.state:
            raise KeyError("not a parameter of this optimizer")
        residual = self.state[param].get("residual")
        if residual is None:
            return param.detach().to(torch.float32)
        join = join_bfloat16 if param.dtype == torch.bfloat16 else join_float16
        flat = join(_in_memory_order(param.detach()), residual[: param.numel()])
        return flat.as_strided(param.shape, param.stride())

    @torch.no_grad()
    def average_into(self, average: Tensor, param: Tensor, weight: Tensor) -> None:
        """Move `average` by the share `weight` towards the full-precision value of a parameter. Can be captured.

        Args:
            average: float32, of the parameter's shape and layout, on its device.
            weight: () float32 on the device, from 0 to 1.

        Raises:
            KeyError: not a parameter of this optimizer.
        """
        if self._kernels is None:
            average.lerp_(self.fp32_weight(param), weight)
        else:
            self._kernels.average(average, param, self.state[param].get("residual"), weight)

    @torch.no_grad()
    def set_fp32_weight(self, param: Tensor, value: Tensor) -> None:
        """Set a parameter, and its residual, to a full-precision value: what `fp32_weight` reads afterwards.

        Args:
            value: float32 of the parameter's shape, on any device.

        Raises:
            KeyError: not a parameter of this optimizer.
        """
        if param not in self.state:
            raise KeyError("not a parameter of this optimizer")
        residual = self.state[param].get("residual")
        if residual is None:
            param.copy_(value)
            return
        split = split_bfloat16 if param.dtype == torch.bfloat16 else split_float16
        full = torch.empty_like(param, dtype=torch.float32).copy_(value)
        high, low = split(_in_memory_order(full))
        _in_memory_order(param.detach()).copy_(high)
        residual[: param.numel()].copy_(low)

    @torch.no_grad()
    def restart(self, seed: int) -> None:
        """Forget all steps: what follows is what a new optimizer would do. Captured graphs stay valid.

        Residuals are forgotten as well: set the weights after it.
        """
        self._seed, self._steps, self._prepared = seed, 0, False
        for slot in self._slots:
            for tensor in self.state[slot.param].values():
                tensor.zero_()
        for scalar in (self.found_nonfinite, self.nonfinite_steps, self.grad_norm, self._clean_steps):
            scalar.zero_()
        self.loss_scale.fill_(self._initial_loss_scale if self._dynamic else 1.0)
        self._scalars.control.zero_()
        self._scalars.control[0] = self.loss_scale.reciprocal()

    def close(self) -> None:
        """Remove the hooks. Without this they keep the model alive for as long as its graph nodes live."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def state_dict(self) -> dict[str, Any]:
        """Like torch's, plus a `blockwise` entry: step count, loss scale and format. Plain tensors and numbers.

        State of large parameters is referenced, not copied, as torch does.
        """
        saved = super().state_dict()
        # A view would drag the memory of its whole bundle into the file.
        saved["state"] = {
            index: {k: v.clone() if v.untyped_storage().nbytes() > v.nbytes else v for k, v in state.items()}
            for index, state in saved["state"].items()
        }
        saved["blockwise"] = {
            "state_bits": self._format.bits,
            "master": self._master,
            "seed": self._seed,
            "steps": self._steps,
            "loss_scale": self.loss_scale.clone(),
            "clean_steps": self._clean_steps.clone(),
            "nonfinite_steps": self.nonfinite_steps.clone(),
        }
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume bit for bit. Copies into the existing state, so that captured graphs stay valid.

        Raises:
            ValueError: saved with other parameters, another `state_bits` or another `master`.
        """
        own = state_dict.get("blockwise")
        if own is None:
            raise ValueError("not a state of BlockwiseAdamW")
        for name, here in (("state_bits", self._format.bits), ("master", self._master)):
            if own[name] != here:
                raise ValueError(f"the state was saved with {name}={own[name]!r}, this optimizer has {here!r}")
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("the state was saved with other parameter groups")
        saved = [state_dict["state"].get(i, {}) for g in groups for i in g["params"]]
        for slot, tensors in zip(self._slots, saved, strict=True):
            state = self.state[slot.param]
            if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in tensors.items()}:
                raise ValueError(f"the saved state of parameter {slot.index} does not fit its shape or type")
        for slot, tensors in zip(self._slots, saved, strict=True):
            for name, tensor in self.state[slot.param].items():
                tensor.copy_(tensors[name])
        for group, saved_group in zip(self.param_groups, groups, strict=True):
            group.update({k: v for k, v in saved_group.items() if k != "params"})
        self._seed = own["seed"]
        self._steps = own["steps"]
        self.loss_scale.copy_(own["loss_scale"])
        self._clean_steps.copy_(own["clean_steps"])
        self.nonfinite_steps.copy_(own["nonfinite_steps"])
        self._scalars.control[0].copy_(self.loss_scale.reciprocal())


def _load_kernels(backend: str, device: torch.device) -> ModuleType | None:
    """The module of Triton kernels, or None where the reference is to be used."""
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f'backend must be "auto", "triton" or "torch", not {backend!r}')
    if backend == "torch":
        return None
    if device.type != "cuda" and backend == "auto":
        return None
    if kernels := kernels_for("adamw_blockwise_triton", device):
        return kernels
    if backend == "triton":
        raise ValueError(f'backend="triton" cannot run here: {obstacle(device)}')
    return None
