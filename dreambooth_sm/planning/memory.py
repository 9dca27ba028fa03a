"""Predicted peak memory, from figures that are fitted to measurements."""

from __future__ import annotations

from dreambooth_sm.families import ModelFootprint
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS, asks_base_of_classes, encodes_in_steps
from dreambooth_sm.planning.figures import figure
from dreambooth_sm.planning.ladder import BaseWeights
from dreambooth_sm.planning.optimizers import ON_MASTERS
from dreambooth_sm.planning.plan import Plan, Precision

# With prior=output: a prediction says less than a picture, and many are kept for each class image that would be made.
OUTPUTS_PER_IMAGE = 8
# Workspaces, the largest gradients in flight and the caches of latents and embeddings.
_OVERHEAD_GB = figure("shared", "overhead_gb")
# Gradients grow while activations go: their peaks add up in part.
_OVERLAP = figure("shared", "overlap")
# The VAE's activations for a picture of 512 pixels: in 32 bits while it encodes, and for each byte of its values' width
# while it decodes.
_ENCODING_GB, _DECODING_GB = figure("shared", "encoding_gb"), figure("shared", "decoding_gb")


def predict_peak_gb(plan: Plan, h: Hyperparameters) -> float:
    """Highest allocation of the training phase, in GB (1e9 bytes)."""
    model = h.facts.footprint
    method = METHODS[h.method]
    millions = method.trained_millions(model, h, plan.train_text_encoder)
    encodes = encodes_in_steps(plan, h)
    frozen = frozen_gb(plan, model, encodes) if method.leaves_base else 0.0
    scales = 8 / (128 if plan.state_bits == 4 else 256)  # two of fp32 a block
    on_masters = ON_MASTERS.get(plan.optimizer)
    state = on_masters.state if on_masters else 2 * plan.state_bits / 8
    state += scales if plan.optimizer == "blockwise" else 0
    weights = {"fp32": 4.0, "master": 6.0, "residual": 4.0, "stochastic": 2.0}[plan.weights]
    average = 4.0 if plan.ema == "device" else 0.0
    gradients = 0.0 if plan.update_in_backward else (4e-3 if plan.weights == "fp32" else 2e-3) * millions
    # Masters take their gradients in fp32.
    updating = ((4 if plan.weights == "master" else 0) + (on_masters.working if on_masters else 0)) * millions * 1e-3
    follows_graph = on_masters is not None and plan.cuda_graph
    gradients += 0 if follows_graph else updating
    # Autocast makes a 16-bit copy of every fp32 weight, which its backward pass needs.
    casts = 2e-3 * millions if plan.weights == "fp32" and plan.precision != "fp32" else 0.0
    rows = h.train_batch_size * (2 if h.prior_preservation else 1)
    # Of one 512-pixel sample in 16 bits: recomputed unit by unit, or everything kept.
    kept = "checkpointed_gb" if plan.gradient_checkpointing else "activations_gb"
    activations = figure(h.architecture, method.activations(h) + kept)
    relative = h.facts.relative
    if method.leaves_base and not _keeps_less(plan):
        activations += figure(h.architecture, "elsewhere_" + kept)
    activations *= relative.recomputed if plan.gradient_checkpointing else relative.kept
    scale = (h.resolution / 512) ** 2 * (2 if plan.precision == "fp32" else 1)
    text = 0.0
    if encodes and not plan.gradient_checkpointing:
        text = figure(h.architecture, "text_activations_gb") * relative.text
    samples = casts + rows * (activations * scale + text)
    passing = max(samples, gradients) + _OVERLAP * min(samples, gradients)
    vae = 0.0 if plan.cache_latents else 4e-3 * model.vae + _ENCODING_GB * (h.resolution / 512) ** 2
    # The latents of its outputs; a forward pass of a live base keeps nothing, and comes before what is kept.
    if h.prior_preservation and h.prior == "output" and not asks_base_of_classes(h):
        vae += OUTPUTS_PER_IMAGE * h.num_class_images * 6.6e-5 * (h.resolution / 512) ** 2
    stays = (weights + state + average) * millions * 1e-3 + frozen + vae + _OVERHEAD_GB
    stays += updating if follows_graph else 0  # beside the graph, which keeps its memory
    peak = stays + passing
    if drawing_steps(h):
        # A captured step keeps all its memory while pictures are drawn; another one its gradients at most.
        held = passing if plan.cuda_graph else gradients
        peak = max(peak, stays + held + drawing_gb(plan.precision, h))
    return round(peak, 2)


def _keeps_less(plan: Plan) -> bool:
    """Whether the kernels of norms serve, which keep less, and convolutions that are not trained keep no images."""
    return plan.channels_last and not plan.compile


def frozen_gb(plan: Plan, model: ModelFootprint, encodes: bool) -> float:
    """GB of a base model that only computes, in the precision that is computed in but for layers in fewer bits.

    Args:
        encodes: whether its text encoders compute as well.
    """
    computing = model.denoiser + (model.text_read if encodes else 0)
    coded = model.denoiser_coded + (model.text_coded if encodes else 0)
    return _kept_gb(plan.base_weights, plan.precision, computing, coded, model.largest_coded)


def reading_gb(plan: Plan, model: ModelFootprint) -> float:
    """Highest allocation while text encoders that are language models read prompts, in GB: before all else; else 0."""
    if not model.has_language_model:
        return 0.0
    weights = _kept_gb(plan.text_weights, plan.precision, model.text_read, model.text_coded, model.largest_coded)
    return weights + figure("shared", "reading_gb")


def _kept_gb(kind: BaseWeights, precision: Precision, millions: float, coded: float, largest: float) -> float:
    """GB of weights that only compute.

    Args:
        coded, largest: millions that are kept in fewer bits, and of the largest layer of them.
    """
    width = 4 if precision == "fp32" else 2
    if kind == "plain":
        return 1e-3 * width * millions
    # A scale of each row counts for nothing, and one of each block of 64 values for its share.
    codes = 1.0 if kind == "int8" else 0.5 + width / 64
    return 1e-3 * (width * (millions - coded) + codes * coded + width * largest)


def drawing_steps(h: Hyperparameters) -> list[str]:
    """Names of the knobs for which pictures are drawn while training's memory stays where it is."""
    validating = h.validation_prompt is not None and h.validation_steps > 0
    return [*(["validation_steps"] if validating else []), *(["fidelity_steps"] if h.fidelity_steps else [])]


def drawing_gb(precision: Precision, h: Hyperparameters) -> float:
    """Predicts what a validation picture takes beside training: a pipeline with its VAE, only while it draws."""
    facts = h.facts
    peak = sampling_peak_gb(1, h)
    if METHODS[h.method].leaves_base and facts.overflows and precision == "bf16":
        peak -= 2e-3 * facts.footprint.denoiser  # training's own draws, in the same type
    return peak * (2 if precision == "fp32" else 1)


def sampling_peak_gb(batch_size: int, h: Hyperparameters) -> float:
    """Highest allocation while pictures are drawn, in GB: 16-bit weights, two rows (guidance) a picture."""
    return sampling_models_gb(h) + max(drawn_gb(h) * batch_size, decoding_gb(h))


def sampling_models_gb(h: Hyperparameters) -> float:
    """Weights of what draws, in GB, without text encoders that are language models: these are let go of before."""
    model = h.facts.footprint
    text = 0.0 if model.has_language_model else model.text_encoder
    return 2e-3 * (model.denoiser + text) + 1e-3 * model.vae_bytes * model.vae


def drawn_gb(h: Hyperparameters) -> float:
    """Activations of the denoiser for one picture of the size that it is trained on, in GB, with guidance."""
    return figure(h.architecture, "drawn_gb") * (h.resolution / 512) ** 2


def decoding_gb(h: Hyperparameters) -> float:
    """Activations of the VAE while it decodes one picture of that size, in GB."""
    return _DECODING_GB * h.facts.footprint.vae_bytes * (h.resolution / 512) ** 2
