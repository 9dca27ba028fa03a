"""What Z-Image's files have to be like: configurations, noise schedule, and parts that belong together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreambooth_sm.errors import UserError

PIPELINES = ("ZImagePipeline",)
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# What the pipeline computes with, whatever a configuration says.
TIMES, PATCH = 1000, 2
_OTHERWISE = ("invert_sigmas", "stochastic_sampling", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def transformer_problems(config: Mapping[str, Any], where: str) -> list[str]:
    """What of a transformer's configuration training does not know."""
    problems = []
    if config.get("siglip_feat_dim") is not None:
        problems.append(
            f"{where}: siglip_feat_dim is set: it takes pictures beside prompts; name a model that does not"
        )
    for key, wanted in (("all_patch_size", [PATCH]), ("all_f_patch_size", [1]), ("t_scale", float(TIMES))):
        value = config.get(key, wanted)
        if (list(value) if isinstance(value, tuple) else value) != wanted:
            problems.append(f"{where}: {key} is {value!r:.60}, and this project trains models with {wanted}")
    return problems


def check_schedule(scheduler: Any, where: str) -> None:
    """Raises UserError where a model is not drawn by straight ways from noise, as it was trained."""
    name, config = type(scheduler).__name__, scheduler.config
    problems = []
    if name != SCHEDULER:
        problems.append(f"its scheduler is {name}, and the model is drawn with {SCHEDULER}")
    problems += [f"{key} is true, which the model was not trained with" for key in _OTHERWISE if config.get(key)]
    if config.get("num_train_timesteps") != TIMES:
        problems.append(f"num_train_timesteps is {config.get('num_train_timesteps')!r:.60} and should be {TIMES}")
    shift = config.get("shift")
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift <= 100:
        problems.append(f"shift is {shift!r:.60} and should be a number such as 6.0")
    if problems:
        raise UserError(f"{where}: {problem}; take the model's own scheduler_config.json" for problem in problems)


def fit_problems(pipeline: Any) -> list[str]:
    """What keeps the parts of a pipeline from belonging together."""
    transformer, vae, text = pipeline.transformer.config, pipeline.vae.config, pipeline.text_encoder.config
    tokenizer = pipeline.tokenizer
    problems = []
    if not tokenizer.chat_template:
        problems.append("its tokenizer has no chat template, which prompts are put into; copy the directory again")
    if len(tokenizer) > text.vocab_size:
        problems.append(f"the tokenizer has {len(tokenizer)} tokens and the text encoder {text.vocab_size}")
    if vae.latent_channels != transformer.in_channels:
        problems.append(
            f"the VAE makes latents of {vae.latent_channels} channels, and the transformer takes "
            f"{transformer.in_channels}"
        )
    if text.hidden_size != transformer.cap_feat_dim:
        problems.append(
            f"the text encoder's states are {text.hidden_size} wide, and the transformer takes "
            f"{transformer.cap_feat_dim}"
        )
    if text.num_hidden_layers < 2:
        problems.append("the text encoder has one layer, and its last but one is read")
    return problems
