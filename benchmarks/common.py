"""What the benchmarks share: base models of real shapes with random weights, pictures, timing."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    PNDMScheduler,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
    T5Config,
    T5EncoderModel,
)

from dreambooth_sm.data.assemble import encode_training_set
from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.cards import CONTEXT_GB, CPU, Card
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.planning.ladder import Rung
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.report import Reporter
from dreambooth_sm.training.loop import Trainer
from dreambooth_sm.training.schedule import Schedule
from tests.helpers.tiny import byte_tokenizer, chat_tokenizer, t5_tokenizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}


def sd15() -> PretrainedModel:
    """Stable Diffusion 1.5's architecture with random weights, in fp32 on the CPU."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )
        vae, text_encoder = _vae(), CLIPTextModel(_clip())
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "tokenizer": byte_tokenizer()}
    parts |= {"scheduler": scheduler, "feature_extractor": None}
    return _put_away(PretrainedModel("sd15", FAMILIES["sd"], parts))


def sdxl() -> PretrainedModel:
    """Stable Diffusion XL's architecture, likewise."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        vae, text_encoder = _vae(scaling_factor=0.13025, force_upcast=True), CLIPTextModel(_clip())
        text_encoder_2 = CLIPTextModelWithProjection(_clip(**_CLIP_G))
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "tokenizer": byte_tokenizer()}
    parts |= {"text_encoder_2": text_encoder_2, "tokenizer_2": byte_tokenizer()}
    parts |= {"scheduler": scheduler, "feature_extractor": None}
    return _put_away(PretrainedModel("sdxl", FAMILIES["sdxl"], parts))


# The language model of 4 billion parameters that both transformers read prompts with.
_QWEN3 = {
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
}


def z_image(transformer: Mapping[str, Any] = MappingProxyType({}), **text: Any) -> PretrainedModel:
    """Z-Image's architecture in bf16, likewise.

    Args:
        transformer, text: what differs from the true sizes.
    """
    torch.manual_seed(0)
    vae: dict[str, Any] = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    parts = {
        "transformer": _made(lambda: ZImageTransformer2DModel(**transformer)),
        "vae": _made(lambda: _vae(**vae, use_quant_conv=False, use_post_quant_conv=False)),
        "text_encoder": _made(lambda: Qwen3Model(Qwen3Config(**{**_QWEN3, **text}))),
        "tokenizer": chat_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
    }
    return _put_away(PretrainedModel("z_image", FAMILIES["z_image"], parts))


def flux2_klein() -> PretrainedModel:
    """FLUX.2 klein base 4B's architecture in bf16, likewise."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
    parts = {
        "transformer": _made(lambda: Flux2Transformer2DModel(**sizes, joint_attention_dim=7680, guidance_embeds=False)),
        "vae": _made(
            lambda: AutoencoderKLFlux2(
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4
            )
        ),
        "text_encoder": _made(lambda: Qwen3Model(Qwen3Config(**_QWEN3))),
        "tokenizer": chat_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }
    return _put_away(PretrainedModel("flux2_klein", FAMILIES["flux2"], parts))


# OpenCLIP bigG.
_CLIP_G: dict[str, Any] = {"width": 1280, "layers": 32, "heads": 20, "hidden_act": "gelu", "projection_dim": 1280}
# The encoder of T5-XXL.
_T5: dict[str, Any] = {
    "vocab_size": 32_128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10_240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}


def flux1() -> PretrainedModel:
    """FLUX.1 dev's architecture in bf16, likewise."""
    torch.manual_seed(0)
    vae: dict[str, Any] = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    parts = {
        "transformer": _made(lambda: FluxTransformer2DModel(guidance_embeds=True)),
        "vae": _made(lambda: _vae(**vae, use_quant_conv=False, use_post_quant_conv=False)),
        "text_encoder": _made(lambda: CLIPTextModel(_clip())),
        "tokenizer": byte_tokenizer(),
        "text_encoder_2": _made(lambda: T5EncoderModel(T5Config(**_T5))),
        "tokenizer_2": t5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }
    return _put_away(PretrainedModel("flux1", FAMILIES["flux1"], parts))


def qwen_image() -> PretrainedModel:
    """Qwen-Image's architecture in bf16, likewise."""
    torch.manual_seed(0)
    text: dict[str, Any] = {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    shifts = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    parts = {
        "transformer": _made(QwenImageTransformer2DModel),
        "vae": _made(AutoencoderKLQwenImage),
        "text_encoder": _made(lambda: Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**text))),
        "tokenizer": chat_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **shifts),
    }
    return _put_away(PretrainedModel("qwen_image", FAMILIES["qwen_image"], parts))


def chroma() -> PretrainedModel:
    """Chroma's architecture in bf16, likewise."""
    torch.manual_seed(0)
    vae: dict[str, Any] = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    parts = {
        "transformer": _made(ChromaTransformer2DModel),
        "vae": _made(lambda: _vae(**vae, use_quant_conv=False, use_post_quant_conv=False)),
        "text_encoder": _made(lambda: T5EncoderModel(T5Config(**_T5))),
        "tokenizer": t5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
    }
    return _put_away(PretrainedModel("chroma", FAMILIES["chroma"], parts))


def sd35_medium() -> PretrainedModel:
    """Stable Diffusion 3.5 Medium's architecture in bf16, likewise."""
    torch.manual_seed(0)
    config: dict[str, Any] = dict(FAMILIES["sd3"].facts.config)
    vae: dict[str, Any] = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    parts = {
        "transformer": _made(lambda: SD3Transformer2DModel(**config)),
        "vae": _made(lambda: _vae(**vae, use_quant_conv=False, use_post_quant_conv=False)),
        "text_encoder": _made(lambda: CLIPTextModelWithProjection(_clip(projection_dim=768))),
        "tokenizer": byte_tokenizer(),
        "text_encoder_2": _made(lambda: CLIPTextModelWithProjection(_clip(**_CLIP_G))),
        "tokenizer_2": byte_tokenizer(),
        "text_encoder_3": _made(lambda: T5EncoderModel(T5Config(**_T5))),
        "tokenizer_3": t5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    return _put_away(PretrainedModel("sd35_medium", FAMILIES["sd3"], parts))


def krea2() -> PretrainedModel:
    """Krea 2's architecture in bf16, likewise."""
    torch.manual_seed(0)
    rotations = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text: dict[str, Any] = {**_QWEN3, "rope_parameters": rotations}
    shifts = {"base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 6400}
    parts = {
        "transformer": _made(Krea2Transformer2DModel),
        "vae": _made(AutoencoderKLQwenImage),
        "text_encoder": _made(lambda: Qwen3VLTextModel(Qwen3VLTextConfig(**text))),
        "tokenizer": chat_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **shifts),
    }
    return _put_away(PretrainedModel("krea2", FAMILIES["krea2"], parts))


def _made(make: Callable[[], torch.nn.Module]) -> Any:
    """A module with random weights in bf16, made on the device in seconds; what is computed stays as it is."""
    with init_empty_weights(include_buffers=False):
        module = make()
    for layer in module.modules():
        for name, empty in list(layer.named_parameters(recurse=False)):
            value = torch.empty(empty.shape, dtype=torch.bfloat16, device=DEVICE)
            if value.dim() > 1:
                value.normal_(std=0.02)
            else:
                value.fill_(0.0 if name == "bias" else 1.0)
            setattr(layer, name, torch.nn.Parameter(value))
    return module


# What `--model` takes, and the families of these models.
MODELS: dict[str, Callable[[], PretrainedModel]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "z_image": z_image,
    "flux2_klein": flux2_klein,
    "flux1": flux1,
    "qwen_image": qwen_image,
    "chroma": chroma,
    "sd35_medium": sd35_medium,
    "krea2": krea2,
}
_FAMILIES = {name: name for name in MODELS} | {"sd15": "sd", "flux2_klein": "flux2", "sd35_medium": "sd3"}


def hyperparameters(model: str, **wishes: object) -> Hyperparameters:
    """Those of a benchmark on one of ``MODELS``, at the model's own resolution: of full training, where it has that."""
    architecture = _FAMILIES[model]
    methods = FAMILIES[architecture].facts.methods
    shown: dict[str, object] = {**PROMPTS, "method": "full" if "full" in methods else next(iter(methods))}
    shown |= {"with_prior_preservation": True}  # also with methods that learn nothing from class pictures
    return Hyperparameters.parse({**shown, "seed": 0, "base_architecture": architecture, **wishes})


def _vae(*, latent_channels: int = 4, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=latent_channels,
        **options,
    )


def _clip(*, width: int = 768, layers: int = 12, heads: int = 12, **options: Any) -> CLIPTextConfig:
    tokenizer = byte_tokenizer()
    return CLIPTextConfig(
        vocab_size=49408,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **options,
    )


def _put_away(base: PretrainedModel) -> PretrainedModel:
    """On the CPU, as a job loads it."""
    for module in base.modules.values():
        module.to("cpu").requires_grad_(False).eval()
    torch.cuda.empty_cache()
    return base


def make_pictures(directory: Path, count: int, side: int = 512) -> tuple[Path, ...]:
    """Pictures of noise: speed and memory do not depend on what they show."""
    directory.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    paths = tuple(directory / f"{number:03d}.jpg" for number in range(count))
    for path in paths:
        Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return paths


def make_trainer(base: PretrainedModel, plan: Plan, h: Hyperparameters, pictures: Path, steps: int) -> Trainer:
    """A trainer on five instance and seven class pictures."""
    subject = Subject(
        pictures=make_pictures(pictures / "instance", 5, h.resolution),
        prompt=str(h.instance_prompt),
        class_prompt=h.class_prompt,
        class_directory=pictures / "class",
        class_pictures=make_pictures(pictures / "class", 7, h.resolution) if h.prior_preservation else (),
    )
    trainable = METHODS[h.method].attach(base, plan, h, 0)
    data = encode_training_set(trainable.model, (subject,), h, plan, device=DEVICE, seed=0)
    return Trainer(
        trainable,
        data,
        plan,
        h,
        Schedule(steps, 0, h.learning_rate),
        device=DEVICE,
        identity={"seed": 0},
        report=Reporter(stream=sys.stderr),
    )


def plan_of_rung(h: Hyperparameters, rung: Rung | None, precision: str) -> Plan:
    """A rung's weights and optimizer, the UNet alone, for models that fit everywhere; for None AdamW in fp32."""
    plan = dataclasses.replace(make_plan(h, CPU), device=DEVICE.type)  # type: ignore[arg-type]
    if rung is None:
        return plan
    return dataclasses.replace(
        plan,
        precision=precision,  # type: ignore[arg-type]
        weights=rung.weights,
        optimizer=rung.optimizer,
        state_bits=rung.state_bits,
        update_in_backward=not rung.keeps_gradients,
        max_grad_norm=1.0 if rung.keeps_gradients else None,
        gradient_checkpointing=rung.gradient_checkpointing,
        cuda_graph=DEVICE.type == "cuda",
    )


def limit_memory(card: Card, cap_gb: float | None = None) -> float:
    """Leaves this process what ``card`` leaves to one (or ``cap_gb``), and the attention kernels that it has.

    Returns:
        the cap, in GB (1e9 bytes).
    """
    cap_gb = cap_gb or card.memory_gib * 1.0737 - CONTEXT_GB
    total_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gb / total_gb))
    torch.backends.cuda.enable_flash_sdp(card.has_bf16)
    torch.backends.cuda.enable_cudnn_sdp(card.has_bf16)
    return cap_gb


def reset_peaks() -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    """Peak memory since :func:`reset_peaks`, in GB (1e9 bytes)."""
    return {
        "peak_allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "peak_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
    }


@contextmanager
def gpu_profile(steps: int, result: dict[str, Any]) -> Iterator[None]:
    """Adds the milliseconds of kernels a step, their number, and the most expensive ones, from torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        yield
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("ProfilerStep", "Optim")):
            kernels.setdefault(event.name, []).append(event.device_time / 1e3)
    top = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    result |= {
        "gpu_busy_ms": round(sum(map(sum, kernels.values())) / steps, 2),
        "kernels": round(sum(map(len, kernels.values())) / steps),
        "top": [[_short(name), round(sum(ms) / steps, 3), round(len(ms) / steps)] for name, ms in top[:40]],
    }


def _short(kernel: str) -> str:
    """A kernel's name without the templates that all elementwise kernels share."""
    return re.sub(r"void |at::native::|\(anonymous namespace\)::|gpu_kernel_impl_nocast|gpu_kernel_impl", "", kernel)[
        :160
    ]


def measure_steps(trainer: Trainer, steps: int, *, profile: bool = True) -> dict[str, Any]:
    """Wall-clock and GPU-busy time of a step, after warm-up and capture."""
    rate = trainer.h.learning_rate
    started = time.perf_counter()
    for _ in range(6):
        trainer.optimizer_step(rate)
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(steps):
        loss = trainer.optimizer_step(rate)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {
        "steps_per_s": round(steps / seconds, 2),
        "ms_per_step": round(1e3 * seconds / steps, 2),
        "warm_up_s": round(warm_up, 1),
        "loss": round(float(loss.total), 4),
        **peaks(),
    }
    if profile:
        with gpu_profile(3, result):
            for _ in range(3):
                trainer.optimizer_step(rate)
    return result


def describe(plan: Plan) -> dict[str, object]:
    keys = (
        "tier",
        "precision",
        "base_weights",
        "weights",
        "optimizer",
        "state_bits",
        "update_in_backward",
        "gradient_checkpointing",
    )
    extra = ("train_text_encoder", "ema", "compile", "predicted_peak_gb")
    return {key: dataclasses.asdict(plan)[key] for key in keys + extra}


def in_fresh_processes(module: str, names: Sequence[str], *options: str) -> None:
    """Runs ``python -m module NAME`` for each name: what one leaves in a process does not burden the next."""
    for name in names:
        subprocess.run([sys.executable, "-m", module, name, *options], check=False)


def emit(**result: object) -> None:
    """One JSON object a line."""
    print(json.dumps(result), flush=True)
