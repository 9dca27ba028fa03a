"""Single files in the original Stable Diffusion layout, as WebUI, ComfyUI and Civitai have them."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dreambooth_sm.errors import UserError
from dreambooth_sm.stored.configs import class_name, make_module, read_json, read_tokenizer_directory
from dreambooth_sm.stored.files import HASH_FIELD, Stored, TensorFile, write_safetensors
from dreambooth_sm.stored.layout import (
    CLIP,
    OPEN_CLIP,
    UNET,
    XL_OPEN_CLIP,
    Configs,
    is_xl,
    parts_in,
    places,
    text_prefix,
    to_diffusers,
    to_original,
    today,
)
from dreambooth_sm.stored.model import (
    CLASSES,
    ZEROS,
    StoredModel,
    StoredPart,
    WriteProgress,
    check_complete,
    clip_tokenizer,
    make_pipeline,
    no_progress,
    tokenizers_of,
)
from dreambooth_sm.stored.noise_schedule import check_schedule, make_scheduler
from dreambooth_sm.stored.opening import open_tensors
from dreambooth_sm.stored.recognise import CONFIGS_FIELD, V_PREDICTION, ZERO_SNR, check_kind, read_configs, vae_config

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# The metadata fields in which our own files carry tokenizers that are not CLIP's, by the tokenizer's name.
_TOKENIZER_FIELD = "dreambooth_sm.{}"
# Among our own files' configurations, that of the pipeline itself.
_INDEX = "pipeline"
_CLIP_TOKENS = 49_408
_EMA = "model_ema."
# What whole files hold beside what a pipeline needs: averages, what the VAE and the UNet were trained with, constants,
# marks, and of text encoders what only comparing pictures with texts needs.
_KNOWN_OTHERS = re.compile(
    r"(model_ema|first_stage_model\.loss|denoiser|cond_stage_model\.model\.visual)\..*|v_pred|ztsnr|scale_factor|logvar|"
    r"(sqrt_|log_|posterior_)?\w*(alphas_cumprod|betas|lvlb_weights|posterior_\w+)\w*|"
    r"(cond_stage_model|conditioner)\..*(position_ids|logit_scale|text_projection(\.weight)?|attn_mask|resblocks\.\d+\..*)"
)


def read_single_file(
    path: Path, *, use_ema: bool = False, prediction_type: str | None = None, vae: StoredPart | None = None
) -> StoredModel:
    """Understands a safetensors file or a pickle (``.ckpt``) of Stable Diffusion 1, 2 or XL, without reading weights.

    Args:
        use_ema: takes the average that some files carry beside the UNet's weights.
        prediction_type: ``epsilon`` or ``v_prediction``; None to find out
            (:func:`dreambooth_sm.stored.recognise.read_configs`).
        vae: takes the place of the file's own, which may then be missing.

    Raises:
        UserError: where the file is damaged, another kind of model, or a pickle that wants more than tensors.
    """
    file = open_tensors(path)
    check_kind(file)
    file = TensorFile(path, _renamed(file.tensors), file.notes)
    if use_ema:
        file = TensorFile(path, _averaged(file), file.notes)
    configs, remarks = read_configs(file, prediction_type, with_vae=vae is None)
    where = f"{path}: its configuration of the {{}}"
    scheduler, more = make_scheduler(configs["scheduler"], where.format("scheduler"))
    check_schedule(scheduler, where.format("scheduler"))
    modules: dict[str, Any] = {
        part: make_module(part, configs[part], where.format(part))
        for part in parts_in(configs)
        if part != "vae" or vae is None
    }
    if vae:
        vae.scale_like(configs["vae"])
        modules["vae"] = vae.module
    configs["unet"] = dict(modules["unet"].config)  # with the defaults that the shapes say nothing of
    configs["vae"] = dict(modules["vae"].config)
    tensors: dict[str, dict[str, Stored]] = {}
    used: set[str] = set()
    for part, module in modules.items():
        names = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        used |= {place.key for place in places(part, names, configs).values()}
        tensors[part] = vae.tensors if part == "vae" and vae else to_diffusers(part, names, configs, file.tensors)
        check_complete(str(path), part, module, tensors[part])
    tokenizers = {name: read_tokenizer(file, name, configs) for name in tokenizers_of(modules)}
    parts = {**modules, **tokenizers, "scheduler": scheduler, "feature_extractor": None}
    pipeline = make_pipeline(parts, configs.get(_INDEX, {}))
    return StoredModel(str(path), pipeline, tensors, (*remarks, *more, *_left_out(file, used)))


def _left_out(file: TensorFile, used: set[str]) -> list[str]:
    others = [key for key in file.tensors if key not in used and not _KNOWN_OTHERS.fullmatch(key)]
    if not others:
        return []
    return [f"{file.path}: {len(others)} tensors are of no part of the model and are left out, such as {min(others)}"]


def read_vae(path: Path) -> StoredPart:
    """The VAE of a single file, or of a file of its own in the original layout or in that of diffusers.

    Raises:
        UserError: where the file is damaged or holds no VAE.
    """
    found = open_tensors(path).tensors
    beside = path.with_name("config.json")
    if beside.is_file() and class_name(config := read_json(beside)) == CLASSES["vae"]:
        module = make_module("vae", config, str(beside))
        tensors, scaled = {today(name, "vae"): tensor for name, tensor in found.items()}, True
    else:
        try:
            config, inner = vae_config(found)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(f"{path} holds no VAE of Stable Diffusion: it lacks {error!s:.200}") from None
        module, scaled = make_module("vae", config, f"{path}: its configuration of the vae"), False
        names = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        tensors = to_diffusers("vae", names, {"vae": config}, inner) if inner else _flattened(found, names)
    check_complete(str(path), "vae", module, tensors)
    return StoredPart(module, tensors, scaled)


def _flattened(found: Mapping[str, Stored], names: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """A VAE's tensors under today's names, matrices of its attention as matrices."""
    tensors = {today(name, "vae"): tensor for name, tensor in found.items()}
    return {
        name: tensor.reshaped(tensor.shape[:2])
        if tensor.shape[2:] == (1, 1) and names.get(name) == tensor.shape[:2]
        else tensor
        for name, tensor in tensors.items()
    }


def write_single_file(
    model: StoredModel,
    path: Path,
    *,
    dtype: torch.dtype | None = torch.float16,
    title: str = "",
    resolution: int | None = None,
    trigger: str | None = None,
    licence: str | None = None,
    progress: WriteProgress = no_progress,
) -> None:
    """Writes one ``.safetensors`` file in the original layout, with ModelSpec 1.0.1 metadata
    (github.com/Stability-AI/ModelSpec). SD 2's text encoder is written without OpenCLIP's last layer, as diffusers
    pipelines lack it and nothing uses it.

    Args:
        dtype: of the weights; None keeps each as it is.
        title: defaults to the file's name.
        resolution: of the training pictures; the UNet's own if left out.
        trigger: the prompt that shows the subject.
        progress: is called with the bytes of each tensor once they are written.
    """
    configs = model.configs
    v_prediction = configs["scheduler"]["prediction_type"] == "v_prediction"
    architecture, implementation, layer = specification(configs, v_prediction)
    pixels = resolution or pixels_of(configs)
    notes = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": f"https://github.com/Stability-AI/{implementation}",
        "modelspec.title": title or path.stem,
        "modelspec.resolution": f"{pixels}x{pixels}",
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "modelspec.encoder_layer": layer,
        HASH_FIELD: "",
        CONFIGS_FIELD: _json({**configs, "scheduler": _scheduler_config(model), **_index(model)}),
    }
    notes |= {f"modelspec.{key}": value for key, value in (("trigger_phrase", trigger), ("license", licence)) if value}
    for name in tokenizers_of(model.tensors):
        if len(tokenizer := getattr(model.pipeline, name)) != _CLIP_TOKENS:
            notes[_TOKENIZER_FIELD.format(name)] = _json(_tokenizer_files(tokenizer))
    tensors = {
        key: value
        for part, stored in model.tensors.items()
        for key, value in to_original(part, stored, configs).items()
    }
    if (
        is_xl(configs) and v_prediction
    ):  # without these marks, other programs take the model for one that predicts noise
        marks = [V_PREDICTION, *([ZERO_SNR] if configs["scheduler"].get("rescale_betas_zero_snr") else [])]
        tensors |= {mark: Stored.of(torch.empty(0)) for mark in marks}
    write_safetensors(path, tensors, dtype=dtype, notes=notes, progress=progress)


def specification(configs: Configs, v_prediction: bool) -> tuple[str, str, str]:
    """Returns ModelSpec's words for the architecture and the repository of its code, and the text encoder's layer that
    is used, counted from its end."""
    if is_xl(configs):
        return "stable-diffusion-xl-v1-base", "generative-models", "2"
    if text_prefix("text_encoder", configs) == OPEN_CLIP:
        return f"stable-diffusion-v2-{'768-v' if v_prediction else '512'}", "stablediffusion", "2"
    return "stable-diffusion-v1", "stablediffusion", "1"


def pixels_of(configs: Configs) -> int:
    """Side of the pictures that the UNet was made for; that of its kind where it does not say."""
    said = configs["unet"].get("sample_size") or (128 if is_xl(configs) else 64)
    latents: int = said if isinstance(said, int) else max(said)
    return latents * 2 ** (len(configs["vae"]["block_out_channels"]) - 1)


def _index(model: StoredModel) -> dict[str, dict[str, Any]]:
    """Returns what only SDXL's ``model_index.json`` says."""
    return {_INDEX: {ZEROS: model.pipeline.config[ZEROS]}} if is_xl(model.configs) else {}


def _scheduler_config(model: StoredModel) -> dict[str, Any]:
    return {**model.configs["scheduler"], "_class_name": type(model.pipeline.scheduler).__name__}


def _json(value: Any) -> str:
    return json.dumps(value, default=str, separators=(",", ":"))


def _renamed(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Names as most files have them: some early fine-tuned ones lack ``text_model`` in the text encoder's."""
    return {
        key.replace(CLIP, f"{CLIP}text_model.", 1)
        if key.startswith(CLIP) and not key.startswith(f"{CLIP}text_model.")
        else key: value
        for key, value in tensors.items()
    }


def _averaged(file: TensorFile) -> dict[str, Stored]:
    names = {key: _EMA + "".join(key.split(".")[1:]) for key in file.tensors if key.startswith(UNET)}
    missing = [name for name in names.values() if name not in file.tensors]
    if missing:
        found = "no EMA weights" if len(missing) == len(names) else f"EMA weights without {missing[0]}"
        raise UserError(f"{file.path} holds {found}; leave use_ema_weights out")
    return {**file.tensors, **{key: file.tensors[name] for key, name in names.items()}}


def _tokenizer_files(tokenizer: CLIPTokenizer) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}


def read_tokenizer(file: TensorFile, name: str, configs: Configs) -> CLIPTokenizer:
    """The tokenizer ``name`` of a single file: the file's own where its metadata has one, or else CLIP's.

    Raises:
        UserError: where the text encoder has another vocabulary than CLIP's, and the file does not bring it.
    """
    field, encoder = _TOKENIZER_FIELD.format(name), name.replace("tokenizer", "text_encoder")
    if field in file.notes:
        try:
            with tempfile.TemporaryDirectory() as folder:
                for file_name, text in json.loads(file.notes[field]).items():
                    Path(folder, Path(file_name).name).write_text(text, encoding="utf-8")
                return read_tokenizer_directory(Path(folder), configs[encoder]["max_position_embeddings"])
        except Exception as error:  # another writer's metadata can be anything
            raise UserError(f"{file.path}: its metadata {field} can't be read: {error!r:.200}") from None
    tokens = configs[encoder]["vocab_size"]
    if tokens != _CLIP_TOKENS:
        raise UserError(
            f"{file.path}: its text encoder knows {tokens} tokens and CLIP's tokenizer {_CLIP_TOKENS}; convert it to a "
            "diffusers directory with its own tokenizer first"
        )
    return clip_tokenizer("!" if text_prefix(encoder, configs) in (OPEN_CLIP, XL_OPEN_CLIP) else "<|endoftext|>")
