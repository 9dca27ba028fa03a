"""The parts of the toybox's flow pipeline: small ones of Z-Image's classes, for pictures of 128 pixels."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from dreambooth_sm.stored.tokenizer import byte_letters
from toybox.networks import find_merges, make_vae

# Of prompts in training, in tokens with their template: what the transformer fills shorter ones up to. Few captions are
# longer.
CAPTION_LENGTH = 32
# Z-Image's.
_SCALING_FACTOR, _SHIFT_FACTOR, _CHANNELS = 0.3611, 0.1159, 16
_LONGEST_PROMPT = 512
_TEXT_WIDTH = 128
# Of times; more shows noisier pictures, and latents of 64 patches need little (Esser et al. 2024, "Scaling Rectified
# Flow Transformers for High-Resolution Image Synthesis").
_SHIFT = 2.0
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_flow_vae() -> AutoencoderKL:
    """1.9 M parameters; 8 pixels a latent, 16 channels."""
    return make_vae(_CHANNELS, _SCALING_FACTOR, _SHIFT_FACTOR)


def make_transformer() -> ZImageTransformer2DModel:
    """5.1 M parameters; a patch is 16 pixels a side. It begins with an answer of zeros, and blocks that change nothing
    (Peebles and Xie 2023, "Scalable Diffusion Models with Transformers")."""
    transformer = ZImageTransformer2DModel(
        in_channels=_CHANNELS,
        dim=192,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=6,
        n_kv_heads=6,
        cap_feat_dim=_TEXT_WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[2 * _LONGEST_PROMPT, 64, 64],
    )
    (answer,) = transformer.all_final_layer.values()
    modulated = [*transformer.noise_refiner, *transformer.layers, answer]
    for layer in (answer.linear, *(block.adaLN_modulation[-1] for block in modulated)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    torch.nn.init.normal_(transformer.cap_pad_token, std=0.02)
    return transformer


def make_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    """0.7 M parameters, for the tokens of ``tokenizer``. Nobody reads its last layer."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=2 * _TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=_LONGEST_PROMPT,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def make_tokenizer(captions: Iterable[str]) -> Qwen2Tokenizer:
    """A tokenizer to which the words of ``captions``, with the space before them, and of the template are one token
    each; it spells other words, in any language."""
    words = {word.replace(" ", "Ġ") for caption in captions for word in re.findall(" ?[a-z]+", caption)}
    merges = find_merges([list(word) for word in sorted({*words, "user", "assistant"})])
    tokens = dict.fromkeys([*byte_letters(), *(first + second for first, second in merges)])
    tokenizer = Qwen2Tokenizer(vocab={token: row for row, token in enumerate(tokens)}, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = _TEMPLATE
    tokenizer.model_max_length = _LONGEST_PROMPT
    return tokenizer


def make_pipeline(vae: AutoencoderKL, tokenizer: Qwen2Tokenizer) -> ZImagePipeline:
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=_SHIFT),
        vae=vae,
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=make_transformer(),
    )
