"""Recognises what a single file holds: its kind, and the configuration that its tensors' names and shapes imply."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.families import FAMILIES, Facts
from dreambooth_sm.stored.files import Stored, TensorFile
from dreambooth_sm.stored.layout import CLIP, OPEN_CLIP, PARTS, UNET, VAE, XL_CLIP, XL_OPEN_CLIP
from dreambooth_sm.stored.model import VAE_SCALES

# The metadata field in which our own files carry their configuration, for models of other sizes.
CONFIGS_FIELD = "dreambooth_sm.configs"
# Empty tensors by which files say that the model predicts velocity, and that its last time step is noise alone.
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
# Whole models that differ from those that can be trained in more than shapes, by a name that only they hold.
_OTHERS = (
    (r"^conditioner\.embedders\.0\.model\.", "a Stable Diffusion XL refiner"),
    (r"^edm_(mean|std)$", "a Playground 2.5 model"),
    (r"^noise_augmentor\.", "an unCLIP model"),
    (r"^control_model\.", "a ControlNet, not a whole model"),
)
# Kinds of files that people have beside Stable Diffusion checkpoints. Some of these names stray into whole models.
_FOREIGN = (
    (r"lora_(unet|te\d?)_|\.lora_(A|B|up|down)\.|\.lora\.(up|down)\.|^lycoris_", "a LoRA, not a whole model"),
    (r"^(string_to_param|emb_params|clip_[lg])$", "a textual inversion embedding, not a whole model"),
    (r"^to_[kv]\.linear\.\d+\.", "a hypernetwork, which goes beside a model; name the model that it was trained with"),
    (r"(^|\.)(noise|context)_refiner\.\d+\.", "a Lumina model"),
    (r"(^|\.)double_blocks\.\d+\.", "a Flux model"),
    (r"(^|\.)joint_blocks\.\d+\.", "a Stable Diffusion 3 model"),
    (r"^control_model\.|^(input_hint_block|zero_convs|controlnet_\w+)\.", "a ControlNet, not a whole model"),
    (r"^(down|up)_blocks\.\d+\.|^input_blocks\.\d+\.", "a UNet (or VAE) alone, not a whole model"),
    (r"^(encoder|decoder)\.conv_in\.", "a VAE alone, not a whole model; name it in pretrained_vae_name_or_path"),
    (r"^(text_model|transformer)\.", "a text encoder alone, not a whole model"),
)
_TRAINABLE = "this project takes whole checkpoints of Stable Diffusion 1, 2 and XL base models"
# Of the UNet, in SDXL alone: it embeds the second text encoder's pooled states and the pictures' sizes.
_XL = f"{UNET}label_emb.0.0.weight"
# Channels in which SDXL embeds each of the six numbers that say a picture's sizes.
_XL_TIME_CHANNELS = 256
# Width of the text encoder's states: CLIP ViT-L of SD 1 and OpenCLIP ViT-H of SD 2.
_SD1, _SD2 = 768, 1024
# Written into 2.0-base by its makers, the one SD 2 checkpoint that tells its noise prediction apart by itself.
_SD2_BASE_STEP = 875_000
_PREDICTIONS = {"v": "v_prediction", "eps": "epsilon", "epsilon": "epsilon"}


def check_kind(file: TensorFile) -> None:
    """Raises UserError, with what the file is, where it is not a Stable Diffusion checkpoint for text to image."""
    if facts := held_alone(file):
        raise UserError(
            f"{file.path} holds the {facts.denoiser} of {facts.article} {facts.short} model alone; name the model that "
            f"its other parts come from, such as {next(iter(facts.licences))}, in pretrained_parts_name_or_path "
            "(convert: --parts)"
        )
    first = file.tensors.get(f"{UNET}input_blocks.0.0.weight")
    kinds = _OTHERS if first else (*_OTHERS, *_FOREIGN)
    kind = next((words for pattern, words in kinds if any(re.search(pattern, key) for key in file.tensors)), None)
    if kind is None and first is None:
        kind = "not a Stable Diffusion checkpoint: it has no model.diffusion_model.input_blocks.0.0.weight"
    if kind is not None:
        raise UserError(f"{file.path} is {kind}; {_TRAINABLE}")
    assert first is not None
    inputs = first.shape[1] if len(first.shape) == 4 else 0
    if inputs != 4:
        names = {9: "an inpainting model", 8: "an InstructPix2Pix model", 5: "a depth model", 7: "an upscaler"}
        kind = names.get(inputs, "a model")
        raise UserError(f"{file.path} is {kind} whose UNet takes {inputs} channels instead of 4; {_TRAINABLE}")


def is_whole(file: TensorFile) -> bool:
    """Whether it looks like a whole checkpoint of Stable Diffusion, of whatever kind."""
    return f"{UNET}input_blocks.0.0.weight" in file.tensors


def held_alone(file: TensorFile) -> Facts | None:
    """The family whose denoiser a file holds; None where it is of none whose files hold no more than that."""
    return next(
        (
            facts
            for facts in (family.facts for family in FAMILIES.values())
            if not facts.has_single_file and facts.tensor and _holds(file, facts.tensor.decode())
        ),
        None,
    )


def _holds(file: TensorFile, name: str) -> bool:
    return name in file.tensors or f"{UNET}{name}" in file.tensors


def kind_of(file: TensorFile) -> str:
    """What a file holds that is no adapter, in a few words with their article."""
    if facts := held_alone(file):
        return f"the {facts.denoiser} of {facts.article} {facts.short} model"
    for pattern, words in (*_FOREIGN[1:], *_OTHERS):
        if any(re.search(pattern, key) for key in file.tensors):
            return words.partition(",")[0]
    if any(key in file.notes for key in ("string_to_token", "sd_checkpoint_name")) or "*" in file.tensors:
        return "a textual inversion embedding"
    if is_whole(file):
        return "a whole model"
    return f"of a kind that is not known here, with {min(file.tensors, default='no tensors')}"


def read_configs(
    file: TensorFile, prediction_type: str | None, *, with_vae: bool = True
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The configurations of the modules with weights and of the ``scheduler``, and remarks on what was guessed.

    Args:
        prediction_type: ``epsilon`` or ``v_prediction``; None to find out (:func:`_prediction`).
        with_vae: whether the file has to hold a VAE; the configuration of one that it lacks says no more than scales.

    Raises:
        UserError: where the shapes are of no model known here, or the YAML beside the file can't be read.
    """
    if CONFIGS_FIELD in file.notes:
        try:
            configs: dict[str, dict[str, Any]] = json.loads(file.notes[CONFIGS_FIELD])
            wanted = {*PARTS["StableDiffusionPipeline"], "scheduler"}
            if not wanted <= configs.keys() or not all(isinstance(config, dict) for config in configs.values()):
                raise ValueError(f"it has to hold {', '.join(sorted(wanted))}")
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{file.path}: its metadata {CONFIGS_FIELD} can't be read: {error!r:.200}") from None
        if prediction_type:
            configs["scheduler"]["prediction_type"] = prediction_type
        return configs, []
    options = _yaml_beside(file.path)
    try:
        unet, vae = _unet(file.tensors, options), _vae(file.tensors, options, with_vae)
        text_encoders = _text_encoders(file.tensors)
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{file.path} lacks tensors of a Stable Diffusion {'XL' if _XL in file.tensors else '1 or 2'} checkpoint "
            f"({error}); copy it again"
        ) from None
    if _XL in file.tensors and _is_distilled(file.tensors, unet):
        raise UserError(
            f"{file.path} is a smaller model, distilled from Stable Diffusion XL (as SSD-1B, Vega and KOALA are); "
            f"{_TRAINABLE}"
        )
    if "attention_head_dim" not in unet:
        raise UserError(
            f"{file.path}: its text encoder's states are {unet['cross_attention_dim']} wide, and those of Stable "
            f"Diffusion 1 and 2 {_SD1} and {_SD2}; put the model's .yaml beside it"
        )
    second = _XL not in file.tensors and unet["cross_attention_dim"] == _SD2
    prediction, remarks = _prediction(file, second, options)
    scheduler = {
        # As the original repositories of SD 1.5, 2.1 and XL have them.
        "_class_name": "DDIMScheduler" if second else "PNDMScheduler",
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
    if _XL in file.tensors:
        scheduler |= {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
        if ZERO_SNR in file.tensors:
            scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    configs = {"unet": unet, "vae": vae, **text_encoders, "scheduler": scheduler}
    return configs, [] if prediction_type else remarks


def _prediction(file: TensorFile, second: bool, options: dict[str, Any]) -> tuple[str, list[str]]:
    """Tells what the UNet predicts: by the YAML beside the file, ModelSpec metadata, a ``v_pred`` tensor (as merging
    tools write it), or else by its kind: the second of Stable Diffusion predicts velocity, except for 2.0-base, which
    is known by its step."""
    if "parameterization" in options:
        return _PREDICTIONS.get(options["parameterization"], "epsilon"), []
    if said := _PREDICTIONS.get(str(file.notes.get("modelspec.prediction_type"))):
        return said, []
    if V_PREDICTION in file.tensors:
        return "v_prediction", []
    if not second or file.notes.get("global_step") == _SD2_BASE_STEP:
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
        raise UserError(f"{beside} is not a configuration of a Stable Diffusion model ({reason})") from None


def _unet(tensors: dict[str, Stored], options: dict[str, Any]) -> dict[str, Any]:
    widths: list[int] = []
    # Transformer blocks that follow on each residual block of a level.
    depths: list[int] = []
    layers = number = 0
    while f"{UNET}input_blocks.{(number := number + 1)}.0.in_layers.2.weight" in tensors or (
        f"{UNET}input_blocks.{number}.0.op.weight" in tensors
    ):
        if number == 1 or f"{UNET}input_blocks.{number}.0.op.weight" in tensors:
            widths.append(0)
            depths.append(0)
            layers = layers if number == 1 else layers or number - 1
        if (key := f"{UNET}input_blocks.{number}.0.out_layers.3.weight") in tensors:
            widths[-1] = tensors[key].shape[0]
            depths[-1] = max(depths[-1], _count(tensors, f"{UNET}input_blocks.{number}.1.transformer_blocks."))
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
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "cross_attention_dim": width,
        "use_linear_projection": len(tensors[proj_in].shape) == 2,
    }
    if _XL in tensors:
        numbers = tensors[_XL].shape[1]
        config |= {
            "sample_size": 128,
            "transformer_layers_per_block": [max(1, depth) for depth in depths],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": _XL_TIME_CHANNELS,
            "projection_class_embeddings_input_dim": numbers,
        }
    # diffusers calls the number of heads attention_head_dim.
    if (heads := options.get("num_heads", -1)) != -1:
        config["attention_head_dim"] = heads
    elif (channels := options.get("num_head_channels", 64 if width == _SD2 or _XL in tensors else -1)) != -1:
        config["attention_head_dim"] = [each // channels for each in widths]
    elif width == _SD1:
        config["attention_head_dim"] = 8
    if width == _SD2 and _XL not in tensors:
        config["upcast_attention"] = True  # in fp16 its attention scores overflow
    return config


def _is_distilled(tensors: dict[str, Stored], unet: dict[str, Any]) -> bool:
    """Whether transformer blocks are missing from an SDXL UNet: all of a level's layers have as many, down and up, and
    the middle as many as the last level."""
    layers, kinds = unet["layers_per_block"], unet["down_block_types"]
    depths = [
        depth if kind.startswith("CrossAttn") else 0
        for depth, kind in zip(unet["transformer_layers_per_block"], kinds, strict=True)
    ]
    wanted = {"middle_block": depths[-1]}
    for level, depth in enumerate(depths):
        down, up = level * (layers + 1) + 1, (len(depths) - 1 - level) * (layers + 1)
        wanted |= {f"input_blocks.{down + layer}": depth for layer in range(layers)}
        wanted |= {f"output_blocks.{up + layer}": depth for layer in range(layers + 1)}
    return any(_count(tensors, f"{UNET}{block}.1.transformer_blocks.") != depth for block, depth in wanted.items())


def _vae(tensors: Mapping[str, Stored], options: Mapping[str, Any], with_vae: bool = True) -> dict[str, Any]:
    scales = {"scaling_factor": options.get("scale_factor", 0.18215), **(VAE_SCALES[True] if _XL in tensors else {})}
    if not with_vae:
        return scales
    down = VAE + "encoder.down.{}.block.{}.conv1.weight"
    return _vae_of(tensors, down, f"{VAE}post_quant_conv.weight") | scales


def vae_config(tensors: Mapping[str, Stored]) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The configuration of a VAE without its scales, from its tensors; and the tensors under the names that whole
    checkpoints give them, or none where they have those of diffusers.

    Raises:
        KeyError: for what is missing.
    """
    if any(re.match(r"(encoder\.down|decoder\.up)_blocks\.", key) for key in tensors):
        return _vae_of(tensors, "encoder.down_blocks.{}.resnets.{}.conv1.weight", "post_quant_conv.weight"), {}
    inner = {key: tensor for key, tensor in tensors.items() if key.startswith(VAE)}
    inner = inner or {VAE + key: tensor for key, tensor in tensors.items()}
    config = _vae(inner, {})
    return {key: value for key, value in config.items() if key not in VAE_SCALES[True]}, inner


def _vae_of(tensors: Mapping[str, Stored], down: str, quant: str) -> dict[str, Any]:
    """
    Args:
        down: the name of a weight, with places for level and layer.
        quant: the name of the weight that takes latents.
    """
    widths: list[int] = []
    while (key := down.format(len(widths), 0)) in tensors:
        widths.append(tensors[key].shape[0])
    if not widths:
        raise KeyError(down.format(0, 0))
    layers = 0
    while down.format(0, layers) in tensors:
        layers += 1
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": 1024 if _XL in tensors else 512,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": tensors[quant].shape[0],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }


def _count(tensors: dict[str, Stored], prefix: str) -> int:
    """Counts the numbers that follow ``prefix`` in the names."""
    return len({key.removeprefix(prefix).partition(".")[0] for key in tensors if key.startswith(prefix)})


def _text_encoders(tensors: dict[str, Stored]) -> dict[str, dict[str, Any]]:
    if _XL in tensors:
        width = tensors[f"{XL_OPEN_CLIP}text_projection"].shape[1]
        return {
            "text_encoder": _clip(tensors, XL_CLIP),
            "text_encoder_2": _open_clip(tensors, XL_OPEN_CLIP, "CLIPTextModelWithProjection", projection_dim=width),
        }
    if f"{OPEN_CLIP}token_embedding.weight" in tensors:
        text_encoder = _open_clip(tensors, OPEN_CLIP, "CLIPTextModel", projection_dim=512)
        # SD 2 takes the states before OpenCLIP's last layer; files that diffusers' converters made have no 24th.
        text_encoder["num_hidden_layers"] = min(text_encoder["num_hidden_layers"], 23)
        return {"text_encoder": text_encoder}
    return {"text_encoder": _clip(tensors, CLIP)}


def _clip(tensors: dict[str, Stored], prefix: str) -> dict[str, Any]:
    prefix = f"{prefix}text_model."
    vocabulary, width = tensors[f"{prefix}embeddings.token_embedding.weight"].shape
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors[f"{prefix}encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(tensors, f"{prefix}encoder.layers."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": tensors[f"{prefix}embeddings.position_embedding.weight"].shape[0],
        "hidden_act": "quick_gelu",
        "projection_dim": width,
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def _open_clip(tensors: dict[str, Stored], prefix: str, architecture: str, *, projection_dim: int) -> dict[str, Any]:
    vocabulary, width = tensors[f"{prefix}token_embedding.weight"].shape
    return {
        "architectures": [architecture],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _count(tensors, f"{prefix}transformer.resblocks."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": tensors[f"{prefix}positional_embedding"].shape[0],
        "hidden_act": "gelu",
        "projection_dim": projection_dim,
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0,
    }
