"""Modules that get their weights later, on the device that computes with them: the host never holds these."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dreambooth_sm.stored.files import Stored, load_tensors
from dreambooth_sm.stored.kept_in_fp32 import dtypes_of


class HollowModule:
    """A module whose weights have a shape and a type on the CPU, and no memory of their own until they are read.

    What is put into the module meanwhile stays, and so do its parameters: whoever shares them has the weights as well.

    Args:
        module: with its weights on the meta device; becomes hollow.
        weights: its weights, each in the precision that it has for whoever looks at it before it is read.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, Stored]) -> None:
        self.module = module
        self._parameters: dict[str, nn.Parameter] = {}
        self._weights = {name: weights[name] for name, _ in module.named_parameters()}
        for name, weight in self._weights.items():
            parent, _, leaf = name.rpartition(".")
            self._parameters[name] = nn.Parameter(_hollow(weight), requires_grad=False)
            setattr(module.get_submodule(parent), leaf, self._parameters[name])
        buffers = {name: weights[name].read() for name in module.state_dict() if name not in self._weights}
        module.load_state_dict(buffers, strict=False)
        module.eval()

    def fill(self, dtype: torch.dtype, device: torch.device) -> None:
        """Reads the weights into the device's memory.

        Raises:
            torch.OutOfMemoryError: where it has too little; the module is hollow again.
        """
        # With its number: threads read, and have a current device of their own.
        device = torch.empty(0, device=device).device
        try:
            dtypes = dtypes_of(self.module, self._weights, dtype)
            for name, value in load_tensors(self._weights, dtypes, device).items():
                self._parameters[name].data = value
        except torch.OutOfMemoryError:
            for name, weight in self._weights.items():
                self._parameters[name].data = _hollow(weight)
            raise


def _hollow(weight: Stored) -> torch.Tensor:
    return torch.zeros((), dtype=weight.dtype).expand(weight.shape)
