"""Base models in, trained pipelines out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreambooth_sm import sources, toybox
from dreambooth_sm.architecture import Architecture
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.sources import is_local, is_s3
from dreambooth_sm.storage import S3Uri
from dreambooth_sm.stored.checkpoint import SUFFIXES, read_checkpoint, read_vae, write_checkpoint
from dreambooth_sm.stored.directory import find_weights, read_config, read_directory, write_directory
from dreambooth_sm.stored.layout import PARTS
from dreambooth_sm.stored.model import (
    ZEROS,
    Pipeline,
    StoredModel,
    check_complete,
    empty_module,
    fill,
    make_pipeline,
    tokenizers_of,
)

# Names that stand for another: the id that notebooks still carry, whose model moved, and the model that comes with us.
RENAMED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    toybox.NAME: str(toybox.BASE),
}


@dataclass
class BaseModel:
    """A Stable Diffusion pipeline, taken apart.

    All modules are on the CPU, in eval mode and without gradients, as loaded: in fp32, or in the precision of their
    files where that is half of it (:func:`load_base`).

    Attributes:
        text_encoder_2, tokenizer_2: SDXL's, beside the first ones.
        zeros_for_empty_prompt: whether the empty prompt is embedded as zeros; of SDXL.
        remarks: what was guessed of a single file; for the user to read.
    """

    name: str
    unet: Any
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any
    feature_extractor: Any = None
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    zeros_for_empty_prompt: bool = True
    remarks: tuple[str, ...] = ()

    @property
    def latent_scale(self) -> int:
        """Pixels a side of one latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def is_xl(self) -> bool:
        """Whether the model is SDXL."""
        return self.text_encoder_2 is not None

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        return (self.text_encoder,) if self.text_encoder_2 is None else (self.text_encoder, self.text_encoder_2)

    @property
    def vae_dtype(self) -> torch.dtype:
        """The smallest type that the VAE computes in: SDXL's first one overflows in fp16."""
        return torch.float32 if self.is_xl and self.vae.config.force_upcast else torch.float16

    def pipeline(self) -> Pipeline:
        """The parts as a pipeline; it shares their weights."""
        names = ["vae", "text_encoder", "tokenizer", "unet", "scheduler", "feature_extractor"]
        if self.is_xl:
            names += ["text_encoder_2", "tokenizer_2"]
        parts = {name: getattr(self, name) for name in names}
        return make_pipeline(parts, {ZEROS: self.zeros_for_empty_prompt})

    def to(self, device: str | torch.device) -> None:
        """Moves all modules."""
        for module in (self.unet, self.vae, *self.text_encoders):
            module.to(device)

    def save(self, directory: Path, dtype: torch.dtype | None = torch.float16) -> None:
        """Writes a diffusers directory with safetensors of ``dtype``, or of the weights' own where it is None; the
        modules stay as they are."""
        write_directory(StoredModel.of(self.name, self.pipeline()), directory, dtype=dtype)

    def save_single_file(self, path: Path, dtype: torch.dtype | None = torch.float16, **facts: Any) -> None:
        """Writes one ``.safetensors`` file in the original layout.

        Args:
            facts: for its metadata, see :func:`dreambooth_sm.stored.checkpoint.write_checkpoint`.
        """
        write_checkpoint(StoredModel.of(self.name, self.pipeline()), path, dtype=dtype, **facts)


def check_base(h: Hyperparameters) -> None:
    """What can be said of a base model without loading it.

    Raises:
        UserError: for a local path that is no Stable Diffusion model, and an S3 location with nothing in it.
    """
    problems: list[str] = []
    name = RENAMED.get(h.pretrained_model_name_or_path, h.pretrained_model_name_or_path)
    for field, value in (("pretrained_model_name_or_path", name), ("pretrained_vae_name_or_path", _vae_name(h))):
        if is_s3(value):
            try:
                sources.check_s3(S3Uri.parse(value))
            except UserError as error:
                problems += [f"{field}: {problem}" for problem in error.problems]
        elif "://" in value:
            problems.append(
                f"{field}: {value} is a URL; name a hub id, s3://bucket/prefix, or pass the model as a channel, such "
                "as inputs={'model': 's3://...'} with pretrained_model_name_or_path=/opt/ml/input/data/model"
            )
    if is_local(name):
        problems += _check_path(Path(name))
    vae = Path(_vae_name(h))
    if _vae_name(h) and is_local(str(vae)) and not (_is_checkpoint(vae) or (vae / "config.json").is_file()):
        problems.append(
            f"pretrained_vae_name_or_path: {vae} holds no config.json; name a directory of an AutoencoderKL, or a "
            ".safetensors file"
        )
    if problems:
        raise UserError(problems)


def _vae_name(h: Hyperparameters) -> str:
    return h.pretrained_vae_name_or_path or ""


def _is_checkpoint(path: Path) -> bool:
    return path.is_file() and path.suffix in SUFFIXES


def _check_path(path: Path) -> list[str]:
    field = "pretrained_model_name_or_path"
    if path.is_file():
        if _is_checkpoint(path):
            return []  # what it holds is told when it is read, which takes no longer
        return [f"{field}: {path} is a file; name a .safetensors or .ckpt file, or a diffusers directory"]
    if not path.is_dir():
        return [f"{field}: {path} does not exist; name a hub id or a diffusers directory, such as a channel"]
    index = path / "model_index.json"
    try:
        pipeline = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except FileNotFoundError:
        if len(_checkpoints(path)) == 1:  # a channel that holds nothing else
            return []
        return [f"{field}: {path} holds no model_index.json; name a diffusers pipeline directory, or a checkpoint file"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{field}: {index} can't be read: {error}"]
    if pipeline not in PARTS:
        return [f"{field}: {path} holds a {pipeline}; this project takes Stable Diffusion 1, 2 and XL base models"]
    parts = PARTS[pipeline]
    return [
        f"{field}: {path / part} is missing; copy the whole pipeline directory"
        for part in (*parts, *tokenizers_of(parts), "scheduler")
        if not (path / part).is_dir()
    ]


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if _is_checkpoint(path))


def read_stored(path: Path, *, use_ema: bool = False, prediction_type: str | None = None) -> StoredModel:
    """Understands a pipeline directory, a single-file checkpoint, or a directory that holds nothing but one.

    Raises:
        UserError: for what is none of these, and damaged files.
    """
    if problems := _check_path(path):
        raise UserError(problems)
    if path.is_dir() and not (path / "model_index.json").is_file():
        (path,) = _checkpoints(path)
    if path.is_file():
        return read_checkpoint(path, use_ema=use_ema, prediction_type=prediction_type)
    if use_ema:
        raise UserError(f"use_ema_weights=true: {path} is a directory, which holds one set of weights; leave it out")
    model = read_directory(path)
    if prediction_type:
        model.pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    return model


def load_base(h: Hyperparameters, dtype: torch.dtype | None = torch.float32) -> BaseModel:
    """Loads the base pipeline, and the replacement VAE if one is asked for.

    Args:
        dtype: of the weights; None leaves those in half precision as they are, which takes half the memory. Whoever
            computes with a module then says in which precision.

    Raises:
        UserError: where there is no such model, its files are damaged, or it is of another kind than the job was
            planned for.
    """
    check_base(h)
    name = RENAMED.get(h.pretrained_model_name_or_path, h.pretrained_model_name_or_path)
    path = sources.fetch(name, revision=h.revision, variant=h.variant, token_secret=h.hf_token_secret)
    prediction = None if h.prediction_type == "auto" else h.prediction_type
    stored = read_stored(path, use_ema=h.use_ema_weights, prediction_type=prediction)
    found: Architecture = "sdxl" if "text_encoder_2" in stored.tensors else "sd"
    if found != h.architecture:
        kinds = {"sd": "Stable Diffusion 1 or 2", "sdxl": "Stable Diffusion XL"}
        raise UserError(
            f"{name} is a {kinds[found]} model, and the job was planned for {kinds[h.architecture]}; set "
            f"base_architecture={found}"
        )
    base = _taken_apart(name, stored)
    if h.pretrained_vae_name_or_path:
        base.vae = _load_vae(h, base.vae.config, dtype)
    _check_parts(base)
    stored.load(dtype)
    return base


def _taken_apart(name: str, stored: StoredModel) -> BaseModel:
    parts = stored.pipeline
    return BaseModel(
        name=name,
        unet=parts.unet,
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        scheduler=parts.scheduler,
        feature_extractor=parts.feature_extractor,
        text_encoder_2=getattr(parts, "text_encoder_2", None),
        tokenizer_2=getattr(parts, "tokenizer_2", None),
        zeros_for_empty_prompt=bool(parts.config.get(ZEROS, True)),
        remarks=stored.remarks,
    )


def _load_vae(h: Hyperparameters, replaced: Any, dtype: torch.dtype | None) -> AutoencoderKL:
    """
    Args:
        replaced: configuration of the base model's own VAE.
    """
    name = _vae_name(h)
    path = sources.fetch(name, token_secret=h.hf_token_secret)
    if path.is_file():  # its tensors don't say how the UNet's latents are scaled, nor whether it overflows
        vae = read_vae(path, dtype)
        vae.register_to_config(scaling_factor=replaced.scaling_factor, force_upcast=replaced.force_upcast)
        return vae
    config = read_config(path)
    if config.get("_class_name") != "AutoencoderKL":
        kind = config.get("_class_name")
        raise UserError(f"pretrained_vae_name_or_path: {name} is a {kind}; name a directory of an AutoencoderKL")
    vae = empty_module("vae", config)
    tensors = find_weights(path, "vae")
    check_complete(name, "vae", vae, tensors, "copy the directory again")
    fill(vae, tensors, dtype)
    return vae


def _check_parts(base: BaseModel) -> None:
    """Raises UserError where the parts do not belong together."""
    problems: list[str] = []
    name, unet = base.name, base.unet.config
    tokenizers = [base.tokenizer, *([base.tokenizer_2] if base.tokenizer_2 else [])]
    for tokenizer, text_encoder in zip(tokenizers, base.text_encoders, strict=True):
        words = tokenizer("photo of a toy", add_special_tokens=False).input_ids
        tokens = text_encoder.config.vocab_size
        if set(words) <= {tokenizer.unk_token_id}:
            problems.append(
                f"{name}: the tokenizer knows no words: its vocabulary is missing; copy the directory again"
            )
        elif len(tokenizer) > tokens:
            problems.append(f"{name}: the tokenizer has {len(tokenizer)} tokens and the text encoder {tokens}")
    latents, wanted = base.vae.config.latent_channels, unet.in_channels
    if latents != wanted:
        problems.append(f"{name}: the VAE makes latents of {latents} channels and the UNet takes {wanted}")
    width, wanted = sum(each.config.hidden_size for each in base.text_encoders), unet.cross_attention_dim
    if width != wanted:
        problems.append(f"{name}: the text encoder's states are {width} wide and the UNet takes {wanted}")
    if base.text_encoder_2 is not None:
        pooled = base.text_encoder_2.config.projection_dim
        wanted = (unet.projection_class_embeddings_input_dim or 0) - 6 * (unet.addition_time_embed_dim or 0)
        if unet.addition_embed_type != "text_time" or pooled != wanted:
            problems.append(f"{name}: the UNet takes no pooled states of {pooled} values, which text_encoder_2 gives")
    if problems:
        raise UserError(problems)
