"""What a single-file checkpoint holds: its kind, and the configuration that its tensors' names and shapes imply."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.stored.files import Stored, TensorFile
from dreambooth_sm.stored.layout import CLIP, OPEN_CLIP, UNET, VAE

# The metadata field in which our own files carry their configuration, for models that are no SD 1 or 2.
CONFIGS_FIELD = "dreambooth_sm.configs"
# Kinds of files that people have beside Stable Diffusion 1 and 2 checkpoints, by a name that only they hold.
_FOREIGN = (
    (r"lora_(unet|te\d?)_|\.lora_(A|B|up|down)\.|\.lora\.(up|down)\.|^lycoris_", "a LoRA, not a whole model"),
    (r"^(string_to_param|emb_params|clip_[lg])$", "a textual inversion embedding, not a whole model"),
    (r"(^|\.)double_blocks\.\d+\.", "a Flux model"),
    (r"(^|\.)joint_blocks\.\d+\.", "a Stable Diffusion 3 model"),
    (r"^conditioner\.embedders\.|^model\.diffusion_model\.label_emb\.", "a Stable Diffusion XL model"),
    (r"^control_model\.|^(input_hint_block|zero_convs|controlnet_\w+)\.", "a ControlNet, not a whole model"),
    (r"^(down|up)_blocks\.\d+\.|^input_blocks\.\d+\.", "a UNet (or VAE) alone, not a whole model"),
    (r"^(encoder|decoder)\.conv_in\.", "a VAE alone, not a whole model; name it in pretrained_vae_name_or_path"),
    (r"^(text_model|transformer)\.", "a text encoder alone, not a whole model"),
)
_TRAINABLE = "this project takes whole Stable Diffusion 1 and 2 checkpoints"
# Width of the text encoder's states: CLIP ViT-L of SD 1 and OpenCLIP ViT-H of SD 2.
_SD1, _SD2 = 768, 1024
# Written into 2.0-base by its makers, the one SD 2 checkpoint that tells its noise prediction apart by itself.
_SD2_BASE_STEP = 875_000
_PREDICTIONS = {"v": "v_prediction", "eps": "epsilon", "epsilon": "epsilon"}


def check_kind(file: TensorFile) -> None:
    """Raises UserError, with what the file is, where it is no Stable Diffusion 1 or 2 checkpoint for text to image."""
    first = file.tensors.get(f"{UNET}input_blocks.0.0.weight")
    kind = next((words for pattern, words in _FOREIGN if any(re.search(pattern, key) for key in file.tensors)), None)
    if kind is None and first is None:
        kind = "no Stable Diffusion checkpoint: it has no model.diffusion_model.input_blocks.0.0.weight"
    if kind is not None:
        raise UserError(f"{file.path} is {kind}; {_TRAINABLE}")
    assert first is not None
    inputs = first.shape[1] if len(first.shape) == 4 else 0
    if inputs != 4:
        names = {9: "an inpainting model", 8: "an InstructPix2Pix model", 5: "a depth model", 7: "an upscaler"}
        kind = names.get(inputs, "a model")
        raise UserError(f"{file.path} is {kind} whose UNet takes {inputs} channels instead of 4; {_TRAINABLE}")


def read_configs(file: TensorFile, prediction_type: str | None) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The configurations of ``unet``, ``vae``, ``text_encoder`` and ``scheduler``, and remarks on what was guessed.

    Args:
        prediction_type: ``epsilon`` or ``v_prediction``; None to find out (:func:`_prediction`).

    Raises:
        UserError: where the shapes are of no model known here, or the YAML beside the file can't be read.
    """
    if CONFIGS_FIELD in file.notes:
        try:
            configs: dict[str, dict[str, Any]] = json.loads(file.notes[CONFIGS_FIELD])
            if prediction_type:
                configs["scheduler"]["prediction_type"] = prediction_type
            return configs, []
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file.path}: its metadata {CONFIGS_FIELD} can't be read: {error!r}") from None
    options = _yaml_beside(file.path)
    try:
        unet, vae = _unet(file.tensors, options), _vae(file.tensors, options)
        text_encoder = _text_encoder(file.tensors)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{file.path} lacks tensors of a Stable Diffusion 1 or 2 checkpoint ({error}); copy it again"
        ) from None
    if "attention_head_dim" not in unet:
        raise UserError(
            f"{file.path}: its text encoder's states are {unet['cross_attention_dim']} wide, and those of Stable "
            f"Diffusion 1 and 2 {_SD1} and {_SD2}; put the model's .yaml beside it"
        )
    prediction, remarks = _prediction(file, unet["cross_attention_dim"], options)
    scheduler = {
        # As the original repositories of SD 1.5 and 2.1 have them.
        "_class_name": "PNDMScheduler" if unet["cross_attention_dim"] != _SD2 else "DDIMScheduler",
        "beta_start": options.get("linear_start", 0.00085),
        "beta_end": options.get("linear_end", 0.012),
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": options.get("timesteps", 1000),
        "prediction_type": prediction_type or prediction,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "clip_sample": False,
    }
    configs = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "scheduler": scheduler}
    return configs, [] if prediction_type else remarks


def _prediction(file: TensorFile, width: int, options: dict[str, Any]) -> tuple[str, list[str]]:
    """What the UNet predicts: by the YAML beside the file, its ModelSpec metadata, a ``v_pred`` tensor (as merging
    tools write it), or else by the text encoder: SD 2 predicts velocity, except for 2.0-base, which is known by its
    step."""
    if "parameterization" in options:
        return _PREDICTIONS.get(options["parameterization"], "epsilon"), []
    if said := _PREDICTIONS.get(str(file.notes.get("modelspec.prediction_type"))):
        return said, []
    if "v_pred" in file.tensors:
        return "v_prediction", []
    if width != _SD2 or file.notes.get("global_step") == _SD2_BASE_STEP:
        return "epsilon", []
    remark = (
        f"{file.path} is a Stable Diffusion 2 model and does not say what it predicts; it is taken for a v-prediction "
        "model. If it descends from a -base model, set prediction_type=epsilon, or put its .yaml beside it"
    )
    return "v_prediction", [remark]


def _yaml_beside(path: Path) -> dict[str, Any]:
    """``model.params`` of the YAML that some checkpoints come with, with the UNet's own parameters among them."""
    import yaml  # type: ignore[import-untyped]

    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        return {}
    try:
        options: dict[str, Any] = yaml.safe_load(beside.read_text(encoding="utf-8"))["model"]["params"]
        return {**options["unet_config"]["params"], **options}
    except (OSError, UnicodeError, yaml.YAMLError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{beside} is no configuration of a Stable Diffusion model ({reason})") from None


def _unet(tensors: dict[str, Stored], options: dict[str, Any]) -> dict[str, Any]:
    widths: list[int] = []
    attention: list[bool] = []
    layers = number = 0
    while f"{UNET}input_blocks.{(number := number + 1)}.0.in_layers.2.weight" in tensors or (
        f"{UNET}input_blocks.{number}.0.op.weight" in tensors
    ):
        if number == 1 or f"{UNET}input_blocks.{number}.0.op.weight" in tensors:
            widths.append(0)
            attention.append(False)
            layers = layers if number == 1 else layers or number - 1
        if (key := f"{UNET}input_blocks.{number}.0.out_layers.3.weight") in tensors:
            widths[-1] = tensors[key].shape[0]
            attention[-1] |= f"{UNET}input_blocks.{number}.1.proj_in.weight" in tensors
    crossed = next((key for key in sorted(tensors) if key.startswith(UNET) and key.endswith("attn2.to_k.weight")), None)
    if crossed is None or not widths:
        raise KeyError("attention to the prompt")
    width = tensors[crossed].shape[1]
    proj_in = crossed[: crossed.index("transformer_blocks")] + "proj_in.weight"
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "block_out_channels": widths,
        "layers_per_block": layers or number - 1,
        "down_block_types": ["CrossAttnDownBlock2D" if crosses else "DownBlock2D" for crosses in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if crosses else "UpBlock2D" for crosses in reversed(attention)],
        "cross_attention_dim": width,
        "use_linear_projection": len(tensors[proj_in].shape) == 2,
    }
    # diffusers calls the number of heads attention_head_dim.
    if (heads := options.get("num_heads", -1)) != -1:
        config["attention_head_dim"] = heads
    elif (channels := options.get("num_head_channels", 64 if width == _SD2 else -1)) != -1:
        config["attention_head_dim"] = [each // channels for each in widths]
    elif width == _SD1:
        config["attention_head_dim"] = 8
    if width == _SD2:
        config["upcast_attention"] = True  # in fp16 its attention scores overflow
    return config


def _vae(tensors: dict[str, Stored], options: dict[str, Any]) -> dict[str, Any]:
    widths: list[int] = []
    while (key := f"{VAE}encoder.down.{len(widths)}.block.0.conv1.weight") in tensors:
        widths.append(tensors[key].shape[0])
    layers = 0
    while f"{VAE}encoder.down.0.block.{layers}.conv1.weight" in tensors:
        layers += 1
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": 512,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": tensors[f"{VAE}post_quant_conv.weight"].shape[0],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "scaling_factor": options.get("scale_factor", 0.18215),
    }


def vae_config(tensors: dict[str, Stored]) -> dict[str, Any]:
    """The configuration of a VAE, from its tensors under their original names."""
    return _vae(tensors, {})


def _text_encoder(tensors: dict[str, Stored]) -> dict[str, Any]:
    if f"{OPEN_CLIP}token_embedding.weight" in tensors:
        vocabulary, width = tensors[f"{OPEN_CLIP}token_embedding.weight"].shape
        length = tensors[f"{OPEN_CLIP}positional_embedding"].shape[0]
        blocks = {
            m[1] for key in tensors if (m := re.match(rf"{re.escape(OPEN_CLIP)}transformer\.resblocks\.(\d+)\.", key))
        }
        # SD 2 takes the states before OpenCLIP's last layer; files that diffusers' converters made have no 24th.
        layers = min(len(blocks), 23)
        inner = tensors[f"{OPEN_CLIP}transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
        activation, projection = "gelu", 512
    else:
        vocabulary, width = tensors[f"{CLIP}text_model.embeddings.token_embedding.weight"].shape
        length = tensors[f"{CLIP}text_model.embeddings.position_embedding.weight"].shape[0]
        layer = rf"{re.escape(CLIP)}text_model\.encoder\.layers\.(\d+)\."
        layers = len({m[1] for key in tensors if (m := re.match(layer, key))})
        inner = tensors[f"{CLIP}text_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
        activation, projection = "quick_gelu", width
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": length,
        "hidden_act": activation,
        "projection_dim": projection,
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0 if activation == "gelu" else vocabulary - 1,
    }
