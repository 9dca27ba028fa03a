"""A Stable Diffusion pipeline whose weights still lie in files: what every kind of model file is read as, and written
from."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreambooth_sm.errors import UserError
from dreambooth_sm.stored.files import Stored, load_tensors
from dreambooth_sm.stored.layout import PARTS, Configs
from dreambooth_sm.tiny import bpe_tokenizer

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StoredModel:
    """A pipeline and where its weights are.

    Attributes:
        name: what messages call it.
        pipeline: the parts; the modules' weights may lie on the meta device.
        tensors: of each part in ``PARTS``, by the names that diffusers and transformers (5) give them.
        remarks: how it was understood, where that had to be guessed; for the user to read.
    """

    name: str
    pipeline: StableDiffusionPipeline
    tensors: dict[str, dict[str, Stored]]
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, pipeline: StableDiffusionPipeline) -> StoredModel:
        """A pipeline that is in memory; its weights are shared."""
        tensors = {
            part: {key: Stored.of(value) for key, value in getattr(pipeline, part).state_dict().items()}
            for part in PARTS
        }
        return cls(name, pipeline, tensors)

    @property
    def configs(self) -> Configs:
        """Of the parts, as plain dictionaries."""
        return configs_of(self.pipeline)

    def load(
        self, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> StableDiffusionPipeline:
        """Reads the weights into the pipeline's modules; each tensor is in memory once.

        Args:
            dtype: of the weights; None leaves those in half precision as they are, and makes all others float32.
            device: with its number, where it has one.

        Returns:
            the pipeline; modules are in eval mode and without gradients.
        """
        for part in PARTS:
            fill(getattr(self.pipeline, part), self.tensors[part], dtype, device)
        return self.pipeline


def configs_of(pipeline: StableDiffusionPipeline) -> Configs:
    return {
        "unet": dict(pipeline.unet.config),
        "vae": dict(pipeline.vae.config),
        "text_encoder": pipeline.text_encoder.config.to_dict(),
        "scheduler": dict(pipeline.scheduler.config),
    }


def empty_module(part: str, config: Mapping[str, Any]) -> nn.Module:
    """A module of a pipeline with its weights on the meta device.

    Args:
        part: one of ``PARTS``.
        config: as in the part's ``config.json``.
    """
    with init_empty_weights(include_buffers=False):
        if part == "text_encoder":
            return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))
        kind: Any = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
        return kind.from_config(dict(config))


def fill(
    module: nn.Module, tensors: Mapping[str, Stored], dtype: torch.dtype | None, device: torch.device | str = "cpu"
) -> None:
    """Reads a module's weights, all of which ``tensors`` has to hold; what is more is left out.

    Args:
        dtype: see :meth:`StoredModel.load`.
    """
    wanted = {name: tensors[name] for name in module.state_dict()}
    dtypes = {
        name: dtype or (tensor.dtype if tensor.dtype in _HALF else torch.float32) for name, tensor in wanted.items()
    }
    module.load_state_dict(load_tensors(wanted, dtypes, torch.device(device)), assign=True)
    module.to(device).requires_grad_(False).eval()  # buffers are no weights, and move here


def check_complete(name: str, part: str, module: nn.Module, tensors: Mapping[str, Stored], advice: str) -> None:
    """Raises UserError where a weight of ``module`` is missing or has another shape."""
    for key, value in module.state_dict().items():
        if key not in tensors:
            raise UserError(f"{name}: {part} lacks {key}; {advice}")
        if tensors[key].shape != tuple(value.shape):
            found, wanted = (" x ".join(map(str, shape)) or "1" for shape in (tensors[key].shape, value.shape))
            raise UserError(f"{name}: {key} of {part} has the shape {found} and should have {wanted}; {advice}")


def make_pipeline(parts: Mapping[str, Any]) -> StableDiffusionPipeline:
    """A pipeline without a safety checker."""
    return StableDiffusionPipeline(safety_checker=None, requires_safety_checker=False, **parts)


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """CLIP's tokenizer, as SD 1 (padded with ``<|endoftext|>``) and SD 2 (padded with ``!``) use it."""
    merges = gzip.decompress(files(__package__).joinpath("clip_merges.txt.gz").read_bytes()).decode()
    tokenizer = bpe_tokenizer(merges.splitlines())
    tokenizer.pad_token = pad_token
    return tokenizer


Progress = Callable[[int], object]


def no_progress(done: int) -> None:
    """Takes the bytes that were written, and says nothing."""
