"""What families share whose VAE is Qwen-Image's, and whose prompts stand in its sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dreambooth_sm.families.conditioning import Conditioning
from dreambooth_sm.families.family import LossKnobs, Pair
from dreambooth_sm.families.file_rules import is_number
from dreambooth_sm.families.flow import chosen_shift, shift_by_words
from dreambooth_sm.families.two_streams import PATCH, TIMES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dreambooth_sm.objectives import Objective

# What the models were shown prompts in, and how many tokens of it their transformers are not shown.
BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
BEHIND = "<|im_end|>\n<|im_start|>assistant\n"
UNSEEN = 34


def statistics_problems(config: Mapping[str, Any], where: str) -> list[str]:
    """What is wrong with a VAE's configuration: latents are told apart by the mean and deviation of each channel."""
    channels = config.get("z_dim", 16)
    if channels == 16 and not {"latents_mean", "latents_std"} & config.keys():
        return []  # those of its class
    problems = []
    for key in ("latents_mean", "latents_std"):
        values = config.get(key)
        numbers = isinstance(values, list | tuple) and len(values) == channels and all(map(is_number, values))
        if not numbers or (key == "latents_std" and not all(value > 0 for value in values or ())):
            problems.append(f"{where}: {key} is {values!r:.60} and should be a list of {channels} numbers")
    return problems


def channel_problems(transformer: Any, vae: Any) -> list[str]:
    """What keeps configurations of a transformer and a VAE from belonging together."""
    if PATCH**2 * vae.z_dim == transformer.in_channels:
        return []
    return [
        f"the VAE makes latents of {vae.z_dim} channels, and the transformer takes {transformer.in_channels}, "
        f"which is not {PATCH**2} times as many"
    ]


def filled_up(words: Sequence[Tensor]) -> Conditioning:
    """Prompts of any lengths in rows of one length.

    Args:
        words: of each prompt, ``(words, ...)``.

    Returns:
        ``states``, with zeros behind those of a prompt, and ``kept`` ``(rows, words)``, those that are a prompt's,
        where rows have more than others.
    """
    import torch

    counts = torch.tensor([len(each) for each in words])
    most = int(counts.max())
    text = {"states": torch.nn.utils.rnn.pad_sequence(list(words), batch_first=True)}
    if int(counts.min()) < most:
        text["kept"] = (torch.arange(most) < counts[:, None]).to(text["states"].device)
    return Conditioning(text)


class QwenParts:
    """What such families do in the same way: times, noise, and the latents of a VAE whose channels have a mean and a
    deviation each."""

    def shift(self, model: Any, size: Pair) -> float:
        """The logarithm of the shift of times that pictures of so many pixels are drawn with."""
        pixels: int = PATCH * 2 ** len(model.vae.config.temperal_downsample)
        return shift_by_words(model.scheduler.config, size[0] // pixels * (size[1] // pixels))

    def extras(self, size: Pair, crop: Pair, target: Pair) -> Mapping[str, Sequence[float]]:
        return {}

    def sampler(self, model: Any, steps: int, size: Pair, device: torch.device) -> Any:
        import numpy as np

        # One step has no last but one, whose noise level is moved to the schedule's.
        own = {"shift_terminal": None} if steps == 1 else {}
        scheduler = type(model.scheduler).from_config(model.scheduler.config, **own)
        shift = self.shift(model, size)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift, device=device)
        scheduler.set_begin_index(0)
        return scheduler

    def objective(self, model: Any, h: LossKnobs) -> Objective:
        """With the shift that pictures are drawn with, where no other is asked for."""
        import math

        from dreambooth_sm.objectives import FlowMatching

        by_size = math.exp(self.shift(model, (h.resolution, h.resolution)))
        return FlowMatching.of(chosen_shift(h, model.scheduler.config, by_size), h.time_sampling, TIMES)

    def scale(self, vae: Any) -> tuple[Tensor, Tensor]:
        """Mean of latents, and 1 / deviation, ``(channels, 1, 1)``."""
        import torch

        mean, deviation = (
            torch.tensor(vae.config[name], device=vae.device).view(-1, 1, 1) for name in ("latents_mean", "latents_std")
        )
        return mean, 1 / deviation

    def normalise(self, scale: tuple[Tensor, Tensor], latents: Tensor) -> Tensor:
        mean, factor = (each.to(latents) for each in scale)
        return (latents - mean) * factor

    def denormalise(self, scale: tuple[Tensor, Tensor], latents: Tensor) -> Tensor:
        mean, factor = (each.to(latents) for each in scale)
        return latents / factor + mean

    def vae_dtype(self, vae: Any) -> torch.dtype:
        import torch

        return torch.bfloat16
