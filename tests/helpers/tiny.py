"""Pipelines small enough for a laptop: the true classes, random weights, a tokenizer of their own.

They show that a job runs end to end; they draw noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dreambooth_sm.stored.tokenizer import bpe_tokenizer, byte_letters, write_tokenizer

_NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
# Of the pictures that UNets are made for, in pixels.
_SIDE = 64
# Small words of the example prompts; everything else, such as "zwx", is spelled letter by letter.
_WORDS = ("a", "of", "on", "the", "photo", "toy", "cat", "dog", "duck")


def save_tiny_pipeline(
    directory: Path,
    *,
    width: int = 32,
    scheduler_options: dict[str, object] | None = None,
    seed: int = 0,
    vae_levels: int = 3,
) -> Path:
    """Writes a diffusers directory of a pipeline of about ``width``² x 300 parameters.

    Args:
        width: channels of the UNet's first level; a multiple of 32.
        scheduler_options: put over the noise scheduler's, such as ``{"prediction_type": "v_prediction"}``.
        seed: of the weights.
        vae_levels: a latent is ``2 ** (vae_levels - 1)`` pixels wide.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=_vae(width, levels=vae_levels),
            text_encoder=CLIPTextModel(_text_config(width=32, heads=4)),
            tokenizer=byte_tokenizer(),
            unet=UNet2DConditionModel(
                sample_size=_SIDE >> (vae_levels - 1),
                block_out_channels=(width, 2 * width),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1,
                cross_attention_dim=32,
                attention_head_dim=8,
            ),
            scheduler=DDPMScheduler(clip_sample=False, **_NOISE, **(scheduler_options or {})),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _save(pipeline, directory)


def save_tiny_xl_pipeline(
    directory: Path, *, scheduler_options: dict[str, object] | None = None, seed: int = 0, vae_levels: int = 3
) -> Path:
    """Writes a diffusers directory of an SDXL pipeline of some 3 M parameters.

    Args:
        scheduler_options, seed, vae_levels: as of :func:`save_tiny_pipeline`.
    """
    second_tokenizer = byte_tokenizer()
    second_tokenizer.add_special_tokens({"pad_token": "!"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=_vae(32, levels=vae_levels, scaling_factor=0.13025, force_upcast=True),
            text_encoder=CLIPTextModel(_text_config(width=64, heads=1)),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(width=128, heads=2, projection=96)),
            tokenizer=byte_tokenizer(),
            tokenizer_2=second_tokenizer,
            unet=UNet2DConditionModel(
                sample_size=_SIDE >> (vae_levels - 1),
                block_out_channels=(64, 128),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1,
                transformer_layers_per_block=(1, 2),
                cross_attention_dim=64 + 128,
                attention_head_dim=(1, 2),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=96 + 6 * 256,
            ),
            scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **{**_NOISE, **(scheduler_options or {})}),
            add_watermarker=False,
        )
    return _save(pipeline, directory)


def save_tiny_z_image_pipeline(directory: Path, *, shift: float = 6.0, seed: int = 0) -> Path:
    """Writes a diffusers directory of a Z-Image pipeline of some 0.7 M parameters.

    Args:
        shift: of its scheduler.
        seed: of the weights.
    """
    tokenizer = chat_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ZImageTransformer2DModel(
            dim=64,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[8, 12, 12],
            axes_lens=[1024, 64, 64],
        )
        for token in (transformer.x_pad_token, transformer.cap_pad_token):  # which begin at zero
            torch.nn.init.normal_(token)
        text_encoder = Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                max_position_embeddings=1024,
            )
        )
        vae = _vae(
            32,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
        )
    return _save(pipeline, directory)


def save_tiny_flux2_pipeline(directory: Path, *, seed: int = 0) -> Path:
    """Writes a diffusers directory of a FLUX.2 klein pipeline of some 1 M parameters, whose text encoder has a head."""
    tokenizer = chat_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Flux2Transformer2DModel(
            in_channels=4 * 8,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=3 * 32,
            timestep_guidance_channels=32,
            axes_dims_rope=(8, 8, 8, 8),
            guidance_embeds=False,
        )
        text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=28,
                num_attention_heads=1,
                num_key_value_heads=1,
                head_dim=16,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
            )
        )
        vae = AutoencoderKLFlux2(
            latent_channels=8,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32,) * 4,
            layers_per_block=1,
            norm_num_groups=32,
        )
        torch.nn.init.normal_(vae.bn.running_mean)
        torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
        pipeline = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
        )
    return _save(pipeline, directory)


def save_tiny_flux1_pipeline(directory: Path, *, guidance: bool = True, dynamic: bool = True, seed: int = 0) -> Path:
    """Writes a diffusers directory of a FLUX.1 pipeline of some 1 M parameters.

    Args:
        guidance: whether it is told any, as dev is; schnell is not.
        dynamic: whether its shift of times grows with the picture; schnell's does not.
    """
    clip, reader = byte_tokenizer(), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=4 * 8,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=48,
            pooled_projection_dim=32,
            guidance_embeds=guidance,
            axes_dims_rope=(8, 12, 12),
        )
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic),
            vae=_shifted_vae(),
            text_encoder=CLIPTextModel(_text_config(width=32, heads=4)),
            tokenizer=clip,
            text_encoder_2=_t5(reader),
            tokenizer_2=reader,
            transformer=transformer,
        )
    return _save(pipeline, directory)


def save_tiny_sd3_pipeline(directory: Path, *, norms: bool = True, seed: int = 0) -> Path:
    """Writes a diffusers directory of a Stable Diffusion 3.5 pipeline of some 1 M parameters.

    Args:
        norms: whether heads are normalised, and the first block looks at the picture alone as well; not so in 3.
    """
    clip, reader = byte_tokenizer(), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            in_channels=8,
            out_channels=8,
            num_layers=3,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=64,
            pooled_projection_dim=16 + 24,
            pos_embed_max_size=64,
            dual_attention_layers=(0, 1) if norms else (),
            qk_norm="rms_norm" if norms else None,
        )
        pipeline = StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_shifted_vae(),
            text_encoder=CLIPTextModelWithProjection(_text_config(width=16, heads=4, projection=16)),
            tokenizer=clip,
            text_encoder_2=CLIPTextModelWithProjection(_text_config(width=24, heads=4, projection=24)),
            tokenizer_2=clip,
            text_encoder_3=_t5(reader),
            tokenizer_3=reader,
            transformer=transformer,
        )
    return _save(pipeline, directory)


def save_tiny_chroma_pipeline(directory: Path, *, seed: int = 0) -> Path:
    """Writes a diffusers directory of a Chroma pipeline of some 1 M parameters."""
    reader = t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ChromaTransformer2DModel(
            in_channels=4 * 8,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=48,
            axes_dims_rope=(8, 12, 12),
            approximator_num_channels=32,
            approximator_hidden_dim=32,
            approximator_layers=2,
        )
        pipeline = ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
            vae=_shifted_vae(),
            text_encoder=_t5(reader),
            tokenizer=reader,
            transformer=transformer,
        )
    return _save(pipeline, directory)


def _t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    sizes = {"d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes))


def _shifted_vae() -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=8,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        norm_num_groups=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def t5_tokenizer() -> T5Tokenizer:
    """A tokenizer of T5's kind that spells letter by letter."""
    letters = [chr(code) for code in range(33, 127)]
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=[*marks, *((letter, -3.0) for letter in letters)], extra_ids=0, model_max_length=512)


def save_tiny_qwen_image_pipeline(directory: Path, *, seed: int = 0) -> Path:
    """Writes a diffusers directory of a Qwen-Image pipeline of some 0.4 M parameters, whose text encoder
    sees pictures."""
    tokenizer = chat_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = QwenImageTransformer2DModel(
            in_channels=4 * 8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(8, 12, 12),
        )
        text_encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    "vocab_size": len(tokenizer),
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "max_position_embeddings": 2048,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
                    "bos_token_id": 0,
                    "eos_token_id": 0,
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": 32,
                    "intermediate_size": 32,
                    "num_heads": 2,
                    "out_hidden_size": 32,
                    "fullatt_block_indexes": [0],
                },
            )
        )
        vae = _film_vae()
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        )
        pipeline = QwenImagePipeline(
            scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
        )
    return _save(pipeline, directory)


def save_tiny_krea2_pipeline(directory: Path, *, distilled: bool = False, seed: int = 0) -> Path:
    """Writes a diffusers directory of a Krea 2 pipeline of some 0.3 M parameters, whose text encoder sees pictures.

    Args:
        distilled: whether it says that it draws in a few steps.
    """
    tokenizer = chat_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Krea2Transformer2DModel(
            in_channels=4 * 8,
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=96,
            timestep_embed_dim=32,
            text_hidden_dim=32,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=48,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(8, 12, 12),
        )
        for name, parameter in transformer.named_parameters():  # which begin at zero
            if "norm" in name or name.endswith("scale_shift_table"):
                torch.nn.init.normal_(parameter, std=0.2)
        text_encoder = Qwen3VLModel(
            Qwen3VLConfig(
                text_config={
                    "vocab_size": len(tokenizer),
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 4,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "head_dim": 16,
                    "max_position_embeddings": 2048,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]},
                    "bos_token_id": 0,
                    "eos_token_id": 0,
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": 32,
                    "intermediate_size": 32,
                    "num_heads": 2,
                    "out_hidden_size": 32,
                    "deepstack_visual_indexes": [0],
                },
            )
        )
        pipeline = Krea2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400
            ),
            vae=_film_vae(),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            text_encoder_select_layers=(1, 2, 4),
            is_distilled=distilled,
        )
    return _save(pipeline, directory)


def _film_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=8,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=torch.randn(8).tolist(),
        latents_std=torch.rand(8).add(0.5).tolist(),
    )


def chat_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of Qwen's kind that spells byte by byte, with the marks of a conversation."""
    letters = byte_letters()
    tokenizer = Qwen2Tokenizer(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.model_max_length = 1024
    return tokenizer


def _save(pipeline: Any, directory: Path) -> Path:
    """With the files that models on the hub have."""
    pipeline.save_pretrained(directory, safe_serialization=True)
    for name, part in pipeline.components.items():
        if isinstance(part, CLIPTokenizer):
            write_tokenizer(part, directory / name)
    return directory


def byte_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of some 550 tokens that can spell any text, in any language, byte by byte."""
    merges: list[str] = []
    for word in _WORDS:
        left = word[0] + ("</w>" if len(word) == 1 else "")
        for number, letter in enumerate(word[1:], start=2):
            right = letter + ("</w>" if number == len(word) else "")
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
            left += right
    return bpe_tokenizer(merges)


def _vae(width: int, *, levels: int = 3, latent_channels: int = 4, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(width,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        **options,
    )


def _text_config(*, width: int, heads: int, projection: int = 32) -> CLIPTextConfig:
    tokenizer = byte_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        max_position_embeddings=77,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
