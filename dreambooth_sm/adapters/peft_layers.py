"""The layers of adapters: PEFT makes them and puts them into a module; those of LoRA compute in fewer passes here."""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth_sm.adapters.rank_mask import RankMask, TrainedRows
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.training.quantised import QuantisedLinear, asked_often, dequantised

# PEFT has a name for each adapter of a layer. Ours has one, which no name shows.
_ADAPTER = "trained"


def inject(module: nn.Module, h: Hyperparameters, layers: Iterable[str]) -> None:
    """Puts adapters beside layers of a module; they change nothing before they are trained.

    Where the module's weights are on the meta device, so are theirs.

    Args:
        layers: the ends of their names.
    """
    from peft import inject_adapter_in_model

    with asked_often(values=h.lora_variant == "dora"):  # whose magnitudes begin as the weights' norms
        inject_adapter_in_model(_configuration(h, list(layers)), module, _ADAPTER)
    for layer in module.modules():
        if _is_plain(layer):
            layer.forward = functools.partial(_forward, layer, None)


def mask_ranks(module: nn.Module, part: str, h: Hyperparameters, rows: TrainedRows, *, by_time: bool) -> None:
    """Makes LoRA's layers of a module, which is a part of a model, mask the activations between their matrices.

    Args:
        rows: those that are trained on; to be kept up to date.
        by_time: whether the ranks of a row may depend on its time.
    """
    from peft.tuners.lora import LoraLayer

    least = h.lora_min_rank if by_time else None
    if not h.lora_dropout and least is None:
        return
    for name, layer in module.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        mask = RankMask(zlib.crc32(f"{part}.{name}".encode()), h.lora_dropout, least, rows)
        layer.lora_A[_ADAPTER].register_forward_hook(functools.partial(_masked, mask))
        if _is_plain(layer):
            layer.forward = functools.partial(_forward, layer, mask)  # type: ignore[attr-defined]


def _masked(mask: RankMask, matrix: nn.Module, inputs: Any, low: Tensor) -> Tensor:
    factors = mask(low.shape, low.dtype, 1 if low.dim() == 4 else -1)  # of convolutions they are channels
    return low if factors is None else low * factors


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module's adapters, by names that say nothing of PEFT's name for them."""
    mark = f".{_ADAPTER}"
    return {name.replace(mark, ""): p for name, p in module.named_parameters() if mark in name}


def configuration_of(module: nn.Module) -> dict[str, Any]:
    """PEFT's description of a module's adapters."""
    configuration: dict[str, Any] = getattr(module, "peft_config")[_ADAPTER].to_dict()  # noqa: B009 - PEFT's own
    return configuration


@contextlib.contextmanager
def switched_off(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The modules compute as without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def squared_distance(modules: Iterable[nn.Module]) -> Tensor:
    """The sum over LoRA's layers of ``||scale B A||^2``, float32 ``()`` with its graph.

    It is the trace of ``(B^T B)(A A^T)``: no product has more values than the rank's square.
    """
    from peft.tuners.lora import LoraLayer

    squares = []
    for layer in (layer for module in modules for layer in module.modules() if isinstance(layer, LoraLayer)):
        down, up = (matrices[_ADAPTER].weight.flatten(1).float() for matrices in (layer.lora_A, layer.lora_B))
        squares.append(layer.scaling[_ADAPTER] ** 2 * ((up.t() @ up) * (down @ down.t())).sum())
    return torch.stack(squares).sum()


def _configuration(h: Hyperparameters, layers: list[str]) -> Any:
    """PEFT's description of the adapters."""
    import peft

    alpha = h.lora_rank if h.lora_alpha is None else h.lora_alpha
    if h.lora_variant == "oft":
        return peft.OFTConfig(r=0, oft_block_size=h.lora_rank, target_modules=layers)
    if h.lora_variant in ("loha", "lokr"):
        kind = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[h.lora_variant]
        return kind(r=h.lora_rank, alpha=alpha, target_modules=layers)
    return peft.LoraConfig(
        r=h.lora_rank,
        lora_alpha=alpha,
        use_rslora=h.lora_rank_stabilised,
        use_dora=h.lora_variant == "dora",
        init_lora_weights=True if h.lora_init == "kaiming" else h.lora_init,
        target_modules=layers,
    )


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is LoRA beside a linear layer, and nothing else."""
    from peft.tuners.lora import Linear

    return type(layer) is Linear and type(layer.base_layer) in (nn.Linear, QuantisedLinear) and not layer.lora_variant


def _forward(layer: Any, mask: RankMask | None, states: Tensor) -> Tensor:
    base, down, up = layer.base_layer, layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    if layer._disable_adapters:
        result: Tensor = base(states)
        return result
    weight, scales = (base.codes, base.scales) if isinstance(base, QuantisedLinear) else (base.weight, None)
    if not states.dtype == down.dtype == (weight if scales is None else scales).dtype:  # fp32 adapters under autocast
        result = type(layer).forward(layer, states)
        return result
    factors = mask(torch.Size((*states.shape[:-1], len(down))), down.dtype, -1) if mask else None
    result = _LinearWithLora.apply(states, weight, scales, base.bias, down, up, factors, layer.scaling[_ADAPTER])
    return result


def _whole(weight: Tensor, scales: Tensor | None) -> Tensor:
    return weight if scales is None else dequantised(weight, scales)


class _LinearWithLora(torch.autograd.Function):
    """``x W^T + b + scale (x A^T * mask) B^T`` with a frozen W.

    The sums are part of the matrix products, in both directions: none is a pass of its own over the activations. Where
    W has scales, it is quantised, and made whole in both directions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        rows = states.reshape(-1, states.shape[-1])
        low = rows @ down.t()
        if mask is not None:
            low.view(*states.shape[:-1], -1).mul_(mask)
        result = F.linear(rows, _whole(weight, scales), bias).addmm_(low, up.t(), alpha=scale)
        ctx.save_for_backward(rows, weight, scales, down, up, mask, low)
        ctx.scale = scale
        return result.view(*states.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, scales, down, up, mask, low = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        for_low = grad @ up
        if mask is not None:
            for_low.view(*grads[0].shape[:-1], -1).mul_(mask)
        if ctx.scale != 1:
            for_low *= ctx.scale
            low = low * ctx.scale
        for_states = None
        if ctx.needs_input_grad[0]:
            for_states = (grad @ _whole(weight, scales)).addmm_(for_low, down).view(*grads[0].shape[:-1], -1)
        return for_states, None, None, None, for_low.t() @ rows, grad.t() @ low, None, None
