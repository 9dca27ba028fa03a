"""A Stable Diffusion pipeline whose weights still lie in files: what every kind of model file is read as, and written
from."""

from __future__ import annotations

import gzip
import inspect
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from dreambooth_sm.errors import UserError
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.families.file_rules import FileRules
from dreambooth_sm.stored.files import Stored, load_tensors
from dreambooth_sm.stored.kept_in_fp32 import kept_in_fp32
from dreambooth_sm.stored.layout import PARTS, Configs
from dreambooth_sm.stored.tokenizer import bpe_tokenizer

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

Pipeline: TypeAlias = "StableDiffusionPipeline | StableDiffusionXLPipeline"

_HALF = (torch.float16, torch.bfloat16)
# Bytes that are read before layers are made smaller.
_PIECE = 2**27
_TYPES = ("dtype", "torch_dtype")  # of weights, as transformers 5 and 4 name them in a configuration
# In SDXL's model_index.json: whether the empty prompt is embedded as zeros.
ZEROS = "force_zeros_for_empty_prompt"
# Names, of :mod:`dreambooth_sm.stored.classes`.
CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
}
# The pipeline that a part is taken to be of where nobody knows.
USUAL = "StableDiffusionPipeline"
# How latents are scaled and whether decoding them overflows in half precision, of Stable Diffusion 1 and 2, and XL.
VAE_SCALES: dict[bool, dict[str, Any]] = {
    False: {"scaling_factor": 0.18215},
    True: {"scaling_factor": 0.13025, "force_upcast": True},
}


@dataclass(frozen=True)
class StoredPart:
    """A module whose weights still lie in files.

    Attributes:
        tensors: see :class:`StoredModel`.
        scaled: of a VAE, whether its configuration says how latents are scaled, which its tensors don't.
    """

    module: Any
    tensors: dict[str, Stored]
    scaled: bool = True

    def scale_like(self, config: Mapping[str, Any]) -> None:
        """Takes over how another VAE scales, where this one doesn't say."""
        if not self.scaled:
            self.module.register_to_config(**{key: config[key] for key in VAE_SCALES[True] if key in config})


@dataclass(frozen=True)
class StoredModel:
    """A pipeline and where its weights are.

    Attributes:
        name: what messages call it.
        pipeline: the parts; the modules' weights may lie on the meta device.
        tensors: of each part with weights, by the names that diffusers and transformers (5) give them.
        remarks: how it was understood, where that had to be guessed; for the user to read.
    """

    name: str
    pipeline: Pipeline
    tensors: dict[str, dict[str, Stored]]
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, pipeline: Pipeline) -> StoredModel:
        """A pipeline that is in memory; its weights are shared."""
        tensors = {
            part: {key: Stored.of(value) for key, value in state_of(getattr(pipeline, part)).items()}
            for part in parts_of(pipeline)
        }
        return cls(name, pipeline, tensors)

    @property
    def configs(self) -> Configs:
        """Of the parts, as plain dictionaries."""
        return configs_of(self.pipeline)

    def load(self, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu") -> Pipeline:
        """Reads the weights into the pipeline's modules; each tensor is in memory once.

        Args:
            dtype: of the weights; None leaves those in half precision as they are, and makes all others float32.
            device: with its number, where it has one.

        Returns:
            the pipeline; modules are in eval mode and without gradients.
        """
        for part, tensors in self.tensors.items():
            fill(getattr(self.pipeline, part), tensors, dtype, device)
        return self.pipeline


def parts_of(pipeline: Pipeline) -> tuple[str, ...]:
    """Names of a pipeline's modules with weights."""
    return PARTS[type(pipeline).__name__]


def tokenizers_of(parts: Iterable[str]) -> tuple[str, ...]:
    """Names of the tokenizers that belong to a pipeline's modules."""
    return tuple(part.replace("text_encoder", "tokenizer") for part in parts if part.startswith("text_encoder"))


def configs_of(pipeline: Pipeline) -> Configs:
    configs = {part: getattr(pipeline, part).config for part in (*parts_of(pipeline), "scheduler")}
    return {
        part: config.to_dict() if part.startswith("text_encoder") else dict(config) for part, config in configs.items()
    }


def class_of(pipeline: str, part: str) -> str:
    """The name of a part's class in a pipeline of that name."""
    rules = rules_of(pipeline)
    return rules.classes[part] if rules else CLASSES[part]


def rules_of(pipeline: str) -> FileRules | None:
    """What the files of a pipeline of that name have to be like; None: as those of Stable Diffusion."""
    return next((family.facts.files for family in FAMILIES.values() if family.facts.pipeline == pipeline), None)


# The libraries make modules without weights by changing, meanwhile, how all threads make modules.
MAKING = threading.RLock()


def empty_module(part: str, config: Mapping[str, Any], pipeline: str = USUAL) -> nn.Module:
    """A module of a pipeline with its weights on the meta device.

    Args:
        part: one of those that ``PARTS`` names.
        config: as in the part's ``config.json``.
        pipeline: name of the pipeline's class.
    """
    from dreambooth_sm.stored import classes

    kind: Any = classes.named(class_of(pipeline, part))
    # With a largest size the table of positions is one of the weights; without one it follows from the configuration.
    positions = classes.no_positions() if config.get("pos_embed_max_size") else nullcontext()
    with MAKING, positions, classes.no_init_weights(), classes.init_empty_weights(include_buffers=False):
        if issubclass(kind, classes.PreTrainedModel):
            # The stored weights say their types themselves.
            values = {key: value for key, value in config.items() if key not in _TYPES}
            module: nn.Module = kind(kind.config_class.from_dict(values))
        else:
            module = kind.from_config(dict(config))
    _tie(module)
    return module


def _tie(module: Any) -> None:
    """Makes those weights one again that a model of transformers has by several names."""
    if getattr(module, "all_tied_weights_keys", None):
        module.tie_weights()


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's values by name, each once."""
    once = {id(value): name for name, value in reversed(module.state_dict(keep_vars=True).items())}
    return {
        name: value.detach() for name, value in module.state_dict(keep_vars=True).items() if once[id(value)] == name
    }


def fill(
    module: nn.Module,
    tensors: Mapping[str, Stored],
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    shrink: Callable[[nn.Module], object] | None = None,
) -> None:
    """Reads a module's weights, all of which ``tensors`` has to hold; what is more is left out.

    Args:
        dtype: see :meth:`StoredModel.load`.
        shrink: makes the layers smaller whose weights are not on the meta device any more. It is called after each
            piece, so that more is never in memory beside what it leaves.
    """
    wanted = weights_of(module, tensors, dtype)
    for piece in _pieces(wanted) if shrink else [wanted]:
        dtypes = {name: tensor.dtype for name, tensor in piece.items()}
        module.load_state_dict(load_tensors(piece, dtypes, torch.device(device)), strict=False, assign=True)
        _tie(module)
        module.requires_grad_(False)
        if shrink:
            shrink(module)
    module.to(device).requires_grad_(False).eval()  # buffers are not weights, and move here


def _pieces(weights: Mapping[str, Stored]) -> Iterator[dict[str, Stored]]:
    """Weights of whole layers, about as much as is read at a time."""
    piece: dict[str, Stored] = {}
    size = 0
    for _, names in itertools.groupby(weights, key=lambda name: name.rpartition(".")[0]):
        layer = {name: weights[name] for name in names}
        piece |= layer
        size += sum(tensor.numel * tensor.dtype.itemsize for tensor in layer.values())
        if size >= _PIECE:
            yield piece
            piece, size = {}, 0
    if piece:
        yield piece


def weights_of(module: nn.Module, tensors: Mapping[str, Stored], dtype: torch.dtype | None) -> dict[str, Stored]:
    """The weights of a module, in its order and in the precision that they are loaded in.

    Args:
        dtype: see :meth:`StoredModel.load`.
    """
    found = {name: tensors[name] for name in _weights(module)}
    kept = kept_in_fp32(module, found, dtype)
    return {
        name: tensor.cast(
            torch.float32 if name in kept else dtype or (tensor.dtype if tensor.dtype in _HALF else torch.float32)
        )
        for name, tensor in found.items()
    }


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's values by name, without counts, such as how many batches a norm has seen."""
    return {name: value for name, value in state_of(module).items() if value.is_floating_point()}


def check_complete(name: str, part: str, module: nn.Module, tensors: Mapping[str, Stored]) -> None:
    """Raises UserError where a weight of ``module`` is missing, quantised, or has another shape."""
    for key, value in _weights(module).items():
        if key not in tensors:
            raise UserError(f"{name}: {part} lacks {key}; copy all of the model's files again, or take another version")
        tensor = tensors[key]
        check_plain(name, part, key, tensor)
        if tensor.shape != tuple(value.shape):
            shape, wanted = (" x ".join(map(str, shape)) or "1" for shape in (tensor.shape, value.shape))
            raise UserError(
                f"{name}: {key} of {part} has the shape {shape} and should have {wanted}; take weights and "
                "configuration of the same model"
            )


def check_plain(name: str, part: str, key: str, tensor: Stored) -> None:
    """Raises UserError where a weight is quantised."""
    if tensor.companions or not tensor.dtype.is_floating_point:
        found = f"comes with {tensor.companions[0]}" if tensor.companions else f"is of the type {tensor.dtype}"
        raise UserError(
            f"{name}: {key} of {part} {found}: such weights are quantised or belong to an adapter; take a version in "
            "fp16, bf16 or fp32"
        )


def make_pipeline(parts: Mapping[str, Any], index: Mapping[str, Any] = MappingProxyType({})) -> Pipeline:
    """A pipeline of the kind that has these parts, without safety checker and watermark.

    Args:
        index: what else its ``model_index.json`` says.
    """
    from dreambooth_sm.stored import classes

    for facts in (family.facts for family in FAMILIES.values()):
        if facts.files and type(parts.get(facts.denoiser)).__name__ == facts.files.classes[facts.denoiser]:
            kind = classes.named(facts.pipeline)
            names = (inspect.signature(kind).parameters.keys() - parts.keys()) & index.keys()
            options = {name: index[name] for name in names if not _is_part(index[name])}
            pipeline: Pipeline = kind(**parts, **options)
            return pipeline
    if "text_encoder_2" in parts:
        zeros = bool(index.get(ZEROS, True))
        return classes.StableDiffusionXLPipeline(force_zeros_for_empty_prompt=zeros, add_watermarker=False, **parts)
    return classes.StableDiffusionPipeline(safety_checker=None, requires_safety_checker=False, **parts)


def _is_part(entry: Any) -> bool:
    """Whether something that an index says is a part, which stands there as its library and class."""
    return isinstance(entry, list | tuple) and all(each is None or isinstance(each, str) for each in entry)


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """CLIP's tokenizer, as the encoders of CLIP (padded with ``<|endoftext|>``) and of OpenCLIP (with ``!``) use it."""
    merges = gzip.decompress(files(__package__).joinpath("clip_merges.txt.gz").read_bytes()).decode()
    tokenizer = bpe_tokenizer(merges.splitlines())
    tokenizer.add_special_tokens({"pad_token": pad_token})  # as on the hub: a prompt's "!" is the pad token as well
    return tokenizer


WriteProgress = Callable[[int], object]


def no_progress(done: int) -> None:
    """Takes the bytes that were written, and says nothing."""
