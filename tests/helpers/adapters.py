"""Adapters to test with: PEFT's own in a pipeline's modules, and layers of random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.peft_file import from_peft
from dreambooth_sm.stored.directory import read_directory

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "proj_in", "conv_in", "upsamplers.0.conv", "downsamplers.0.conv"]


def pipeline(directory: Path) -> Any:
    """A pipeline in memory, without progress bars."""
    return read_directory(directory).load()


def trained(module: nn.Module, config: Any, seed: int = 0) -> Adapter | dict[str, Any]:
    """Puts PEFT's layers with random values into a module, and gives them as layers of ours."""
    from peft import get_peft_model_state_dict, inject_adapter_in_model

    inject_adapter_in_model(config, module)
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        if "magnitude" in name:
            value.data *= 1 + 0.2 * torch.rand(value.shape, generator=generator)
        elif "lora_" in name or "hada_" in name or "lokr_" in name or "oft_" in name:
            value.data += 0.1 * torch.randn(value.shape, generator=generator)
    module.eval()
    layers, unknown = from_peft(get_peft_model_state_dict(module), config.to_dict())
    assert not unknown
    return layers


def answers(pipe: Any) -> dict[str, Tensor]:
    """What the UNet and the text encoders of a pipeline answer to one input."""
    generator = torch.Generator().manual_seed(7)
    width = pipe.unet.config.cross_attention_dim
    latents, states = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 7, width, generator=generator)
    ids = torch.arange(77)[None] % 500
    added: dict[str, Any] = {}
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        found["text_encoder"] = pipe.text_encoder(ids).last_hidden_state
        if second := getattr(pipe, "text_encoder_2", None):
            found["text_encoder_2"] = second(ids).text_embeds
            added = {"text_embeds": torch.randn(1, 96, generator=generator), "time_ids": torch.ones(1, 6)}
        found["unet"] = pipe.unet(latents, 5, states, added_cond_kwargs=added or None).sample
    return found


def furthest(these: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """The largest difference between answers."""
    assert these.keys() == others.keys()
    return max(float((these[key] - others[key]).abs().max()) for key in these)
