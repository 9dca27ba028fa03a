"""Base models in, trained pipelines out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from dreambooth_sm import sources, toybox
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.sources import is_local, is_s3
from dreambooth_sm.storage import S3Uri
from dreambooth_sm.stored.checkpoint import SUFFIXES, read_checkpoint, read_vae, write_checkpoint
from dreambooth_sm.stored.directory import find_weights, read_config, read_directory, write_directory
from dreambooth_sm.stored.layout import PARTS
from dreambooth_sm.stored.model import StoredModel, check_complete, empty_module, fill, make_pipeline, tokenizers_of

# Names that stand for another: the id that notebooks still carry, whose model moved, and the model that comes with us.
RENAMED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    toybox.NAME: str(toybox.BASE),
}
_UNTRAINED = "{} is a Stable Diffusion XL model, which this job does not train; name a Stable Diffusion 1 or 2 model"


@dataclass
class BaseModel:
    """A Stable Diffusion 1 or 2 pipeline, taken apart.

    All modules are in fp32, on the CPU, in eval mode and without gradients, as loaded.

    Attributes:
        remarks: what was guessed of a single file; for the user to read.
    """

    name: str
    unet: Any
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any
    feature_extractor: Any = None
    remarks: tuple[str, ...] = ()

    @property
    def latent_scale(self) -> int:
        """Pixels a side of one latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def pipeline(self) -> StableDiffusionPipeline:
        """The parts as a pipeline; it shares their weights."""
        return make_pipeline(
            {
                "vae": self.vae,
                "text_encoder": self.text_encoder,
                "tokenizer": self.tokenizer,
                "unet": self.unet,
                "scheduler": self.scheduler,
                "feature_extractor": self.feature_extractor,
            }
        )

    def to(self, device: str | torch.device) -> None:
        """Moves all modules."""
        for module in (self.unet, self.vae, self.text_encoder):
            module.to(device)

    def save(self, directory: Path, dtype: torch.dtype = torch.float16) -> None:
        """Writes a diffusers directory with safetensors of ``dtype``; the modules stay as they are."""
        write_directory(StoredModel.of(self.name, self.pipeline()), directory, dtype=dtype)

    def save_single_file(self, path: Path, dtype: torch.dtype = torch.float16, **facts: Any) -> None:
        """Writes one ``.safetensors`` file in the original layout.

        Args:
            facts: for its metadata, see :func:`dreambooth_sm.stored.checkpoint.write_checkpoint`.
        """
        write_checkpoint(StoredModel.of(self.name, self.pipeline()), path, dtype=dtype, **facts)


def check_base(h: Hyperparameters) -> None:
    """What can be said of a base model without loading it.

    Raises:
        UserError: for a local path that is no Stable Diffusion 1 or 2 model, and an S3 location with nothing in it.
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
        path = Path(name)
        problems += _check_path(path) or ([_UNTRAINED.format(name)] if (path / "text_encoder_2").is_dir() else [])
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


def load_base(h: Hyperparameters) -> BaseModel:
    """Loads the base pipeline, and the replacement VAE if one is asked for.

    Raises:
        UserError: where there is no such model, or its files are damaged.
    """
    check_base(h)
    name = RENAMED.get(h.pretrained_model_name_or_path, h.pretrained_model_name_or_path)
    path = sources.fetch(name, revision=h.revision, variant=h.variant, token_secret=h.hf_token_secret)
    prediction = None if h.prediction_type == "auto" else h.prediction_type
    stored = read_stored(path, use_ema=h.use_ema_weights, prediction_type=prediction)
    if "text_encoder_2" in stored.tensors:
        raise UserError(_UNTRAINED.format(name))
    parts = stored.pipeline
    vae = _load_vae(h) if h.pretrained_vae_name_or_path else None
    _check_parts(name, parts.unet, vae or parts.vae, parts.text_encoder, parts.tokenizer)
    stored.load()
    return BaseModel(
        name=name,
        unet=parts.unet,
        vae=vae or parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        scheduler=parts.scheduler,
        feature_extractor=parts.feature_extractor,
        remarks=stored.remarks,
    )


def _load_vae(h: Hyperparameters) -> AutoencoderKL:
    name = _vae_name(h)
    path = sources.fetch(name, token_secret=h.hf_token_secret)
    if path.is_file():
        return read_vae(path)
    config = read_config(path)
    if config.get("_class_name") != "AutoencoderKL":
        kind = config.get("_class_name")
        raise UserError(f"pretrained_vae_name_or_path: {name} is a {kind}; name a directory of an AutoencoderKL")
    vae = empty_module("vae", config)
    tensors = find_weights(path, "vae")
    check_complete(name, "vae", vae, tensors, "copy the directory again")
    fill(vae, tensors, torch.float32)
    return vae


def _check_parts(name: str, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Raises UserError where the parts do not belong together."""
    problems: list[str] = []
    words = tokenizer("photo of a toy", add_special_tokens=False).input_ids
    if set(words) <= {tokenizer.unk_token_id}:
        problems.append(f"{name}: the tokenizer knows no words: its vocabulary is missing; copy the directory again")
    elif len(tokenizer) > text_encoder.config.vocab_size:
        problems.append(
            f"{name}: the tokenizer has {len(tokenizer)} tokens and the text encoder {text_encoder.config.vocab_size}"
        )
    latents, wanted = vae.config.latent_channels, unet.config.in_channels
    if latents != wanted:
        problems.append(f"{name}: the VAE makes latents of {latents} channels and the UNet takes {wanted}")
    width, wanted = text_encoder.config.hidden_size, unet.config.cross_attention_dim
    if width != wanted:
        problems.append(f"{name}: the text encoder's states are {width} wide and the UNet takes {wanted}")
    if problems:
        raise UserError(problems)
