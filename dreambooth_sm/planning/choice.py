"""Chooses the settings for a card: by its memory, and by what was asked for."""

from __future__ import annotations

import dataclasses
from typing import Literal

from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.training import DEFAULT_TRAIN_STEPS
from dreambooth_sm.methods import METHODS
from dreambooth_sm.planning.cards import CARDS, Card
from dreambooth_sm.planning.figures import figure
from dreambooth_sm.planning.ladder import BaseWeights, Optimizer, Rung, Weights
from dreambooth_sm.planning.memory import (
    drawing_gb,
    drawing_steps,
    predict_peak_gb,
    reading_gb,
    sampling_peak_gb,
)
from dreambooth_sm.planning.optimizers import ON_MASTERS
from dreambooth_sm.planning.plan import AttentionKernels, EmaPlace, Plan, Precision

# Compute capability from which on PyTorch prefers cuDNN's attention.
_CUDNN_FROM = (9, 0)
# Cards of this size draw 64 class images in seconds.
_FAST_FROM_GIB = 36


def make_plan(h: Hyperparameters, card: Card) -> Plan:
    """Chooses the settings for a card: the first rung of the ladder that fits, with explicit hyperparameters in place.

    Raises:
        UserError: where an explicit value can't work on this card, or what was asked for can't fit; the error names
            what would.
    """
    h = h.model_copy(update={"base_architecture": h.architecture})  # is looked for once, and not for each figure
    problems = _impossible(h, card)
    if problems:
        raise UserError(problems)
    if h.use_cpu or card.is_cpu:
        return _as_asked(_cpu_plan(h, card), h)
    plans = _candidates(h, card)
    for plan in plans:
        if _needed_gb(plan, h) <= card.budget_gb:
            return _as_asked(plan, h)
    raise UserError(_too_large(h, card, plans[-1]))


def _as_asked(plan: Plan, h: Hyperparameters) -> Plan:
    """A plan whose notes say what a preset set, and which licence was accepted."""
    asked = tuple(note for note in (h.licence_note, h.preset_note) if note)
    return dataclasses.replace(plan, notes=(*asked, *plan.notes)) if asked else plan


def smaller_plan(plan: Plan, h: Hyperparameters) -> Plan | None:
    """The next plan to try after ``plan`` ran out of memory; None where there is nothing left to give up.

    What is trained stays the same, and so does everything that was asked for explicitly.
    """
    steps: list[dict[str, object]] = []
    if h.use_ema == "auto" or plan.ema == "device":
        steps.append({"ema": "cpu"} if plan.ema == "device" else {})
    if h.gradient_checkpointing == "auto":
        steps.append({"gradient_checkpointing": True})
    if fewer := _fewer_bits(plan, h):
        steps.append({"base_weights": fewer})
    if plan.optimizer == "blockwise":
        if _may_drop_gradients(h):
            steps.append({"update_in_backward": True, "max_grad_norm": None})
        steps.append({"weights": "stochastic"} if plan.weights == "residual" else {})
        if h.optimizer != "auto16":
            steps.append({"state_bits": min(plan.state_bits, 4)})
    for change in steps:
        if any(getattr(plan, name) != value for name, value in change.items()):
            smaller = dataclasses.replace(plan, **change, tier=f"{plan.tier.removesuffix('-')}-")  # type: ignore[arg-type]
            return dataclasses.replace(smaller, predicted_peak_gb=predict_peak_gb(smaller, h))
    return None


def _fewer_bits(plan: Plan, h: Hyperparameters) -> BaseWeights | None:
    """What the method's ladder keeps a base model in after what it is in; None where that is all, or was asked for."""
    kinds = list(dict.fromkeys(rung.base_weights for rung in METHODS[h.method].ladder))
    after = kinds[kinds.index(plan.base_weights) + 1 :] if h.base_weights == "auto" else []
    return after[0] if after else None


def _candidates(h: Hyperparameters, card: Card) -> list[Plan]:
    """The plans to choose from, best first. An average that has no room on the device may live on the CPU."""
    return [
        _on(rung, ema_place, h, card)
        for rung in METHODS[h.method].ladder
        if card.memory_gib >= rung.from_gib
        for ema_place in (("device", "cpu") if h.use_ema is True else ("device",))
    ]


def _on(rung: Rung, ema_place: EmaPlace, h: Hyperparameters, card: Card) -> Plan:
    """A rung of the ladder with the explicit hyperparameters in place of its own choices."""
    notes: list[str] = []
    precision = _precision(h, card)
    weights: Weights = rung.weights
    optimizer: Optimizer = rung.optimizer
    state_bits: int = rung.state_bits
    if h.optimizer == "adamw" or h.optimizer == "adamw8bit":
        optimizer = h.optimizer
        weights, state_bits = "fp32", 8 if optimizer == "adamw8bit" else 32
    elif asked := _on_masters(h):
        optimizer, weights, state_bits = asked, "master", 32
    elif h.optimizer == "blockwise" and optimizer != "blockwise":
        optimizer, weights, state_bits = "blockwise", "residual", 8
    elif h.optimizer == "auto16":
        state_bits = max(16, state_bits)
        notes.append(f"optimizer=auto16 (use_8bit_adam=false): Adam's state takes {state_bits} bits a value")
    if precision == "fp32":
        weights = "fp32"
    keeps = rung.keeps_gradients or not _may_drop_gradients(h) or optimizer != "blockwise" or card.count > 1
    clips = keeps and h.max_grad_norm is not None
    if not keeps and h.max_grad_norm == "auto":
        notes.append("gradients are not clipped: each is used and dropped inside the backward pass")
    if weights == "stochastic":
        notes.append("16-bit weights with stochastic rounding: unbiased, but noisier than an fp32 master")
    if not card.has_bf16 and precision == "fp16":
        notes.append(f"{card.name} has no bf16: fp16 with loss scaling")
    if optimizer == "adamw8bit" and h.cuda_graph is not False:
        notes.append("no CUDA graph: bitsandbytes' optimizer counts its steps on the host")
    if optimizer in ON_MASTERS and h.cuda_graph is not False:
        notes.append(f"the update follows the CUDA graph: {ON_MASTERS[optimizer].host}")
    ema = _choose(h.use_ema, rung.use_ema and optimizer != "schedule_free")  # whose weights are an average
    by_default = h.facts.footprint.trains_text_encoder
    text_encoder = _choose(h.train_text_encoder, rung.train_text_encoder and by_default)
    if drawing_steps(h):
        drawing = " and ".join(drawing_steps(h))
        notes.append(f"{drawing}: drawing takes {drawing_gb(precision, h):.1f} GB beside training's memory")
    if not text_encoder and h.train_text_encoder == "auto" and _trains_text_encoder(h):
        why = "the card has no room for it" if by_default else "set train_text_encoder=true for that"
        notes.append(f"the text encoder is not trained: {why}")
    if h.text_encoder_lr is not None and not text_encoder:
        notes.append(_rate_without_use(h))
    base_weights = rung.base_weights if h.base_weights == "auto" else h.base_weights
    if base_weights != "plain":
        why = "the card has no room for more: " if h.base_weights == "auto" else ""
        bits = 8 if base_weights == "int8" else 4
        notes.append(f"{why}the base model takes {bits} bits a weight (base_weights={base_weights})")
    plan = Plan(
        tier=rung.name if weights == rung.weights else "reference",
        device="cuda",
        precision=precision,
        weights=weights,
        optimizer=optimizer,
        state_bits=state_bits,
        update_in_backward=not keeps,
        gradient_checkpointing=_choose(h.gradient_checkpointing, rung.gradient_checkpointing),
        attention=_attention(h, card, precision),
        # Volta and older have no fast fp16 kernels for it.
        channels_last=card.capability >= (7, 5),
        cuda_graph=optimizer != "adamw8bit" and h.cuda_graph is not False,
        compile=h.torch_compile is True,
        train_text_encoder=text_encoder,
        ema=ema_place if ema else "no",
        cache_latents=h.not_cache_latents in (False, "auto"),
        sample_batch_size=1,
        max_grad_norm=(1.0 if h.max_grad_norm == "auto" else h.max_grad_norm) if clips else None,
        base_weights=base_weights,
        notes=tuple(notes),
    )
    plan = _reading(dataclasses.replace(plan, predicted_peak_gb=predict_peak_gb(plan, h)), h, card)
    if h.sample_batch_size != "auto":
        return dataclasses.replace(plan, sample_batch_size=h.sample_batch_size)
    # A job that is asked to stop finishes a batch first: on small cards that has to be seconds.
    sizes = (64, 32, 16, 8, 4, 2, 1) if card.memory_gib >= _FAST_FROM_GIB else (16, 8, 4, 2, 1)
    most = h.facts.drawing.batch
    batches = [n for n in sizes if n <= most and sampling_peak_gb(n, h) <= card.budget_gb]
    return dataclasses.replace(plan, sample_batch_size=batches[0] if batches else 1)


def _attention(h: Hyperparameters, card: Card, precision: Precision) -> AttentionKernels:
    """From Hopper on, SDPA's kernels are cuDNN's, which a job compiles for each shape: seconds that short ones save."""
    if h.attention != "auto":
        return h.attention
    steps = 0 if h.num_train_epochs else h.max_train_steps or DEFAULT_TRAIN_STEPS
    pictures = steps * h.train_batch_size * h.gradient_accumulation_steps
    is_short = 0 < pictures < figure(h.architecture, "cudnn_attention_from_steps") and h.fleet is None
    has_both = card.capability >= _CUDNN_FROM and precision != "fp32"
    return "flash_attention" if is_short and has_both else "default"


def _reading(plan: Plan, h: Hyperparameters, card: Card) -> Plan:
    """A plan whose text encoders are kept in as many bits as the card has room for while they read."""
    kinds: tuple[BaseWeights, ...] = ("plain", "int8", "nf4")
    for kind in kinds:
        plan = dataclasses.replace(plan, text_weights=kind)
        if reading_gb(plan, h.facts.footprint) <= card.budget_gb:
            break
    if plan.text_weights == "plain":
        return plan
    bits = 8 if plan.text_weights == "int8" else 4
    note = f"the card has no room for more: the text encoder takes {bits} bits a weight while it reads the prompts"
    return dataclasses.replace(plan, notes=(*plan.notes, note))


def _needed_gb(plan: Plan, h: Hyperparameters) -> float:
    """Highest allocation of a job: of training, or of a language model that reads prompts before it."""
    return max(plan.predicted_peak_gb, reading_gb(plan, h.facts.footprint))


def _cpu_plan(h: Hyperparameters, card: Card) -> Plan:
    notes = ["use_cpu: training on the CPU" if h.use_cpu else "no CUDA device: training on the CPU"]
    if h.mixed_precision == "fp16":
        notes.append("mixed_precision=fp16 needs a GPU: the CPU computes in fp32")
    if h.attention in ("xformers", "flash_attention"):
        notes.append(f"attention={h.attention} needs a GPU: SDPA serves")
    if h.text_encoder_lr is not None and h.train_text_encoder is not True:
        notes.append(_rate_without_use(h))
    return Plan(
        tier="cpu",
        device="cpu",
        precision="bf16" if h.mixed_precision == "bf16" else "fp32",
        weights="fp32",
        optimizer=_on_masters(h) or ("blockwise" if h.optimizer == "blockwise" else "adamw"),
        state_bits=8 if h.optimizer == "blockwise" else 32,
        update_in_backward=False,
        gradient_checkpointing=_choose(h.gradient_checkpointing, False),
        attention="default",
        channels_last=False,
        cuda_graph=False,
        compile=h.torch_compile is True,
        train_text_encoder=_choose(h.train_text_encoder, False),
        ema="device" if _choose(h.use_ema, False) else "no",
        cache_latents=h.not_cache_latents in (False, "auto"),
        sample_batch_size=1 if h.sample_batch_size == "auto" else h.sample_batch_size,
        max_grad_norm=1.0 if h.max_grad_norm == "auto" else h.max_grad_norm,
        base_weights="plain" if h.base_weights == "auto" else h.base_weights,
        notes=tuple(notes),
    )


def _impossible(h: Hyperparameters, card: Card) -> list[str]:
    """Explicit values that this card, or the base model, can't run, whatever its memory."""
    problems: list[str] = []
    facts = h.facts
    if refusal := facts.refusal_of(h.method):  # of a base model that is what its files say
        problems.append(refusal)
    if h.train_text_encoder is True and not METHODS[h.method].trains_text_encoder:
        problems.append(f"train_text_encoder=true: method={h.method} leaves it as it is; set it to false or auto")
    if h.prior == "dco" and not METHODS[h.method].has_live_base:
        beside = " or ".join(name for name in facts.methods if METHODS[name].has_live_base)
        problems.append(
            f"prior=dco: method={h.method} keeps no base model to compare with; set method to {beside}, or prior to "
            "images or output"
        )
    quantises = any(rung.base_weights != "plain" for rung in METHODS[h.method].ladder)
    if h.base_weights in ("int8", "nf4") and not quantises:
        problems.append(
            f"base_weights={h.base_weights}: method={h.method} computes with the base model as it is; set base_weights "
            "to auto"
        )
    if (h.use_cpu or card.is_cpu) and h.optimizer == "adamw8bit":
        problems.append(
            "optimizer=adamw8bit or use_8bit_adam=true needs a GPU; set optimizer to auto, or use_8bit_adam to false"
        )
    if not card.is_cpu and not h.use_cpu and h.mixed_precision == "bf16" and not card.has_bf16:
        problems.append(f"mixed_precision=bf16: {card.name} has no bf16; set mixed_precision to fp16 or auto")
    if facts.overflows and not (card.is_cpu or h.use_cpu or card.has_bf16 or h.mixed_precision == "no"):
        able = next(name for name, other in CARDS.items() if other.has_bf16)
        problems.append(
            f"{card.name} has no bf16, and {facts.title} is not trained in fp16: "
            f"{facts.takes['mixed_precision'][1]}; use a card with bf16, such as {able}"
        )
    if not card.is_cpu and h.attention == "flash_attention" and card.capability < (8, 0):
        problems.append(f"attention=flash_attention: {card.name} can't run it; set attention to default or auto")
    return problems


def _too_large(h: Hyperparameters, card: Card, smallest: Plan) -> list[str]:
    """Says why nothing fits, and what would: the explicit values whose absence makes room."""
    wishes = {
        "gradient_checkpointing": False,
        "train_text_encoder": True,
        "use_ema": True,
        "optimizer": h.optimizer if h.optimizer in ("adamw", "auto16", *ON_MASTERS) else object(),
        "mixed_precision": "no",
        "base_weights": "plain",
        "max_grad_norm": h.max_grad_norm if isinstance(h.max_grad_norm, float) else object(),
    }
    asked = {name: "auto" for name, value in wishes.items() if getattr(h, name) == value}
    resolution = min(h.resolution, h.facts.resolution)
    smaller = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "resolution": resolution}
    asked_sizes = {name: value for name, value in smaller.items() if getattr(h, name) != value}
    least = _needed_gb(smallest, h)
    text = f"the job needs {least:.1f} GB at least and {card.name} has {card.budget_gb:.1f} GB for it"
    drawing = dict.fromkeys(drawing_steps(h), 0)
    both = {**asked, **asked_sizes}
    for change in (drawing, asked, asked_sizes, both, {**both, **drawing}):
        if change:
            relaxed = h.model_copy(update=change)
            if any(_needed_gb(plan, relaxed) <= card.budget_gb for plan in _candidates(relaxed, card)):
                return [f"{text}; it fits with {' '.join(f'{k}={v}' for k, v in change.items())}"]
    overflows = h.facts.overflows
    able = [c for c in CARDS.values() if c.has_bf16 or not overflows]
    needed = [c for c in able if c.budget_gb >= least]
    return [f"{text}; use a larger card{f', such as {needed[0].name}' if needed else ''}"]


def _precision(h: Hyperparameters, card: Card) -> Precision:
    if h.mixed_precision == "auto":
        return "bf16" if card.has_bf16 else "fp16"
    return "fp32" if h.mixed_precision == "no" else h.mixed_precision


def _trains_text_encoder(h: Hyperparameters) -> bool:
    """Whether the method trains text encoders where there is room."""
    return any(rung.train_text_encoder for rung in METHODS[h.method].ladder)


def _on_masters(h: Hyperparameters) -> Optimizer | None:
    """The optimizer that is asked for, if it is one of those that work on fp32 values."""
    return next((name for name in ON_MASTERS if name == h.optimizer), None)


def _rate_without_use(h: Hyperparameters) -> str:
    return f"text_encoder_lr={h.text_encoder_lr:g} changes nothing: the text encoder is not trained"


def _may_drop_gradients(h: Hyperparameters) -> bool:
    """Accumulation and clipping to a global norm need every gradient at the end of the backward pass."""
    return h.gradient_accumulation_steps == 1 and not isinstance(h.max_grad_norm, float)


def _choose(wish: bool | Literal["auto"], otherwise: bool) -> bool:
    return otherwise if wish == "auto" else wish
