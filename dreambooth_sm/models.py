"""Base models in, trained pipelines out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from dreambooth_sm import toybox
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters

# Names that stand for another: the id that notebooks still carry, whose model moved, and the model that comes with us.
RENAMED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    toybox.NAME: str(toybox.BASE),
}
# Weight files of a diffusers directory, by preference.
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass
class BaseModel:
    """A Stable Diffusion 1 or 2 pipeline, taken apart.

    All modules are in fp32, on the CPU, in eval mode and without gradients, as loaded.
    """

    name: str
    unet: Any
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any
    feature_extractor: Any = None

    @property
    def latent_scale(self) -> int:
        """Pixels a side of one latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def pipeline(self) -> StableDiffusionPipeline:
        """The parts as a pipeline; it shares their weights."""
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=self.feature_extractor,
            requires_safety_checker=False,
        )

    def to(self, device: str | torch.device) -> None:
        """Moves all modules."""
        for module in (self.unet, self.vae, self.text_encoder):
            module.to(device)

    def save(self, directory: Path, dtype: torch.dtype = torch.float16) -> None:
        """Writes a diffusers directory with safetensors. The modules are converted to ``dtype`` in place."""
        pipeline = self.pipeline()
        pipeline.to(device="cpu", dtype=dtype)
        pipeline.save_pretrained(directory, safe_serialization=True)


def check_base(h: Hyperparameters) -> None:
    """What can be said of a base model without loading it.

    Raises:
        UserError: for a local path that is no Stable Diffusion 1 or 2 pipeline directory.
    """
    problems: list[str] = []
    name = RENAMED.get(h.pretrained_model_name_or_path, h.pretrained_model_name_or_path)
    if "://" in name:
        problems.append(
            f"pretrained_model_name_or_path: {name} is a URL; name a hub id, or pass the model as a channel, such as "
            "inputs={'model': 's3://...'} with pretrained_model_name_or_path=/opt/ml/input/data/model"
        )
    elif _is_local(name):
        problems += _check_directory(Path(name))
    vae = h.pretrained_vae_name_or_path
    if vae is not None and _is_local(vae) and not (Path(vae) / "config.json").is_file():
        problems.append(
            f"pretrained_vae_name_or_path: {vae} holds no config.json; name a directory of an AutoencoderKL"
        )
    if problems:
        raise UserError(problems)


def _is_local(name: str) -> bool:
    """Paths are told from hub ids (``owner/name``) by their look, so that a missing channel is never looked up."""
    return name.startswith(("/", ".", "~")) or Path(name).exists()


def _check_directory(directory: Path) -> list[str]:
    field = "pretrained_model_name_or_path"
    if directory.is_file():
        return [f"{field}: {directory} is a file; name a diffusers directory (one with model_index.json)"]
    if not directory.is_dir():
        return [f"{field}: {directory} does not exist; name a hub id or a diffusers directory, such as a channel"]
    index = directory / "model_index.json"
    try:
        pipeline = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except FileNotFoundError:
        return [f"{field}: {directory} holds no model_index.json; name a diffusers pipeline directory"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{field}: {index} can't be read: {error}"]
    if pipeline != "StableDiffusionPipeline":
        return [f"{field}: {directory} holds a {pipeline}; this job trains Stable Diffusion 1 and 2"]
    return [
        f"{field}: {directory / part} is missing; copy the whole pipeline directory"
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
        if not (directory / part).is_dir()
    ]


def load_base(h: Hyperparameters) -> BaseModel:
    """Loads the base pipeline, and the replacement VAE if one is asked for.

    Raises:
        UserError: where there is no such model, or its files are damaged.
    """
    check_base(h)
    name = RENAMED.get(h.pretrained_model_name_or_path, h.pretrained_model_name_or_path)
    # By itself, because only so does transformers tell of weights that are not there and drawn at random.
    text_encoder, found = _load(CLIPTextModel, name, h, subfolder="text_encoder", output_loading_info=True)
    if found["missing_keys"]:
        raise UserError(f"{name}: text_encoder lacks {sorted(found['missing_keys'])[0]}; copy the directory again")
    pipeline = _load(
        StableDiffusionPipeline,
        name,
        h,
        text_encoder=text_encoder,
        safety_checker=None,
        requires_safety_checker=False,
    )
    vae = pipeline.vae
    if h.pretrained_vae_name_or_path is not None:
        vae = _load(AutoencoderKL, h.pretrained_vae_name_or_path, h)
    _check_parts(name, pipeline.unet, vae, text_encoder, pipeline.tokenizer)
    for module in (pipeline.unet, vae, text_encoder):
        module.requires_grad_(False).eval()
    return BaseModel(
        name=name,
        unet=pipeline.unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=pipeline.tokenizer,
        scheduler=pipeline.scheduler,
        feature_extractor=pipeline.feature_extractor,
    )


def _check_parts(name: str, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Raises UserError where weights are missing, or the parts do not belong together."""
    problems = [
        f"{name}: {part} lacks {weight}; copy the directory again"
        for part, module in (("unet", unet), ("vae", vae))
        for weight in [key for key, tensor in module.state_dict().items() if tensor.is_meta][:1]
    ]
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


def _load(kind: Any, name: str, h: Hyperparameters, **options: Any) -> Any:
    local = _is_local(name)
    if local:
        options["variant"] = _variant(Path(name) / options.get("subfolder", ""))
    elif kind is not AutoencoderKL:
        options["revision"] = h.revision
    try:
        return kind.from_pretrained(name, dtype=torch.float32, **options)
    except Exception as error:  # a damaged directory makes the libraries raise nearly anything
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        advice = (
            "copy the whole directory again"
            if local
            else "check the id and revision, and that the job may reach the network, or pass the model as a channel"
        )
        source = "" if local else "from the model hub "
        raise UserError(f"{name} can't be loaded {source}as {kind.__name__} ({reason}); {advice}") from error


def _variant(directory: Path) -> str | None:
    """``fp16`` for a directory that holds only half-precision files."""
    unet = directory / "unet" if (directory / "unet").is_dir() else directory
    full = [f for pattern in _WEIGHTS for f in unet.glob(pattern) if ".fp16." not in f.name]
    half = [f for pattern in _WEIGHTS for f in unet.glob(pattern) if ".fp16." in f.name]
    return "fp16" if half and not full else None
