"""Which settings a card gets, and why: the VRAM tiers. The plan decides, the training loop obeys.

Imports no torch: a plan can be made, printed and compared for a card that is not here.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from dreambooth_sm.errors import UserError
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.hyperparameters import Hyperparameters

Precision = Literal["fp32", "fp16", "bf16"]
Weights = Literal["fp32", "residual", "stochastic"]
Optimizer = Literal["adamw", "adamw8bit", "blockwise"]
EmaPlace = Literal["no", "device", "cpu"]


@dataclass(frozen=True)
class Card:
    """The device a job runs on.

    Attributes:
        name: as the driver gives it; ``CPU`` for none.
        memory_gib: memory that the driver reports, in GiB (a T4 reports 14.6 of its 16).
        capability: CUDA compute capability, such as (7, 5); (0, 0) for a CPU.
        count: cards of this kind that the job trains on.
    """

    name: str
    memory_gib: float
    capability: tuple[int, int] = (0, 0)
    count: int = 1

    @property
    def is_cpu(self) -> bool:
        return self.capability == (0, 0)

    @property
    def has_bf16(self) -> bool:
        return self.capability >= (8, 0)

    @property
    def budget_gb(self) -> float:
        """GB (1e9 bytes) that training may plan with: the CUDA context and fragmentation take their share first."""
        return (self.memory_gib * 1.0737 - CONTEXT_GB) * 0.97


# With prior=output: a prediction says less than a picture, and many are kept for each class image that would be made.
OUTPUTS_PER_IMAGE = 8
# What the CUDA context of one process takes beside the allocator.
CONTEXT_GB = 0.6
CPU = Card("CPU", 0.0)
# What the driver reports for the cards of SageMaker's instances.
CARDS = {
    "T4": Card("T4", 14.6, (7, 5)),
    "V100": Card("V100", 15.8, (7, 0)),
    "A10G": Card("A10G", 22.3, (8, 6)),
    "L4": Card("L4", 22.0, (8, 9)),
    "L40S": Card("L40S", 44.4, (8, 9)),
    "A100-40": Card("A100-40", 39.4, (8, 0)),
    "A100-80": Card("A100-80", 79.2, (8, 0)),
    "H100": Card("H100", 79.1, (9, 0)),
    "H200": Card("H200", 139.8, (9, 0)),
    "B200": Card("B200", 178.0, (10, 0)),
    "CPU": CPU,
}


@dataclass(frozen=True)
class Rung:
    """One line of the ladder of settings.

    Attributes:
        from_gib: smallest card that this rung is for, as its driver reports it; below, the memory goes to headroom.
        weights: ``residual``: 16-bit weights, and a 16-bit residual that stands in for an fp32 master;
            ``stochastic``: 16-bit weights alone, rounded stochastically.
        state_bits: bits of each of Adam's two moments.
        keeps_gradients: gradients are kept until the end of the backward pass, and can be clipped; otherwise each
            parameter is updated, and its gradient dropped, inside the backward pass.
    """

    name: str
    from_gib: float
    weights: Weights
    state_bits: Literal[4, 8]
    keeps_gradients: bool
    gradient_checkpointing: bool
    train_text_encoder: bool
    use_ema: bool


# From the most generous to the smallest. A card gets the first rung that it is large enough for and whose predicted
# peak fits: 40 GB cards and up `roomy`, A10G and L4 `large`, T4 to 10 GB `medium`, 8 GB `small`, 6 GB `tight`, and
# 4 GB `tiny`.
LADDER = (
    #     name      GiB  weights      bits  keeps grads  checkpoints  text encoder  EMA
    Rung("roomy", 36, "residual", 8, True, False, True, True),
    Rung("large", 20, "residual", 8, False, False, True, True),
    Rung("medium", 0, "residual", 8, False, False, True, False),
    Rung("small", 0, "residual", 8, False, True, True, False),
    Rung("lean", 0, "residual", 8, False, True, False, False),
    Rung("tight", 0, "stochastic", 8, False, True, False, False),
    Rung("tiny", 0, "stochastic", 4, False, True, False, False),
)


@dataclass(frozen=True)
class Plan:
    """What the training loop does on this card.

    Attributes:
        tier: name of the rung; ``cpu`` or ``reference`` beside the ladder.
        device: ``cuda`` or ``cpu``.
        precision: of the forward and backward pass.
        weights: how the trained weights are kept; ``fp32`` runs under autocast unless the precision is fp32.
        optimizer: ``blockwise`` (ours), ``adamw`` (torch's, fp32 state: the reference) or ``adamw8bit``
            (bitsandbytes').
        state_bits: bits of each of Adam's two moments: 32, 16, 8 or 4.
        update_in_backward: each parameter is updated as soon as its gradient is there.
        gradient_checkpointing: activations are recomputed in the backward pass.
        attention: ``default`` (SDPA), ``xformers`` or ``flash_attention``.
        channels_last: memory format of the UNet.
        cuda_graph: the step is captured once and replayed.
        compile: transformer and residual blocks go through torch.compile.
        train_text_encoder: the text encoder is trained beside the UNet.
        ema: where the average of the trained weights lives; ``no`` for none.
        cache_latents: pictures are encoded once, before training.
        sample_batch_size: class images generated at a time.
        max_grad_norm: gradients are clipped to this global norm; None: not at all.
        predicted_peak_gb: highest allocation that is expected, in GB (1e9 bytes); 0 on a CPU.
        notes: one line for every choice that a reader may wonder about.
    """

    tier: str
    device: Literal["cuda", "cpu"]
    precision: Precision
    weights: Weights
    optimizer: Optimizer
    state_bits: int
    update_in_backward: bool
    gradient_checkpointing: bool
    attention: Literal["default", "xformers", "flash_attention"]
    channels_last: bool
    cuda_graph: bool
    compile: bool
    train_text_encoder: bool
    ema: EmaPlace
    cache_latents: bool
    sample_batch_size: int
    max_grad_norm: float | None
    predicted_peak_gb: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def use_ema(self) -> bool:
        return self.ema != "no"

    def settings(self) -> dict[str, object]:
        """Every choice but the notes."""
        settings = dataclasses.asdict(self)
        del settings["notes"]
        return settings

    def lines(self) -> list[str]:
        """The plan for the log: one line of settings, then the notes."""
        return [" ".join(f"{k}={v}" for k, v in self.settings().items()), *self.notes]


def find_card(name: str) -> Card:
    """A card by the name that ``dreambooth-sm plan --gpu`` takes: one of :data:`CARDS`, or a size such as ``8GB``.

    Raises:
        UserError: for an unknown name.
    """
    if known := {key.lower(): card for key, card in CARDS.items()}.get(name.lower()):
        return known
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*GB", name, re.IGNORECASE):
        # The driver keeps some 3 % of a card for itself.
        return Card(f"{size[1]} GB card", float(size[1]) * 0.97, (8, 6))
    raise UserError(f"--gpu {name}: unknown card; write one of {', '.join(CARDS)}, or a size such as 8GB")


def detect_card() -> Card:
    """The CUDA devices of this process, or the CPU. A cap on the process' share of memory counts."""
    import torch

    if not torch.cuda.is_available():
        return CPU
    device = torch.cuda.get_device_properties(0)
    share = torch.cuda.get_per_process_memory_fraction()
    return Card(device.name, device.total_memory / 2**30 * share, (device.major, device.minor))


def make_plan(h: Hyperparameters, card: Card) -> Plan:
    """Chooses the settings for a card: the first rung of the ladder that fits, with explicit hyperparameters in place.

    Raises:
        UserError: where an explicit value can't work on this card, or what was asked for can't fit; the error names
            what would.
    """
    problems = _impossible(h, card)
    if problems:
        raise UserError(problems)
    if h.use_cpu or card.is_cpu:
        return _cpu_plan(h, card)
    plans = _candidates(h, card)
    for plan in plans:
        if plan.predicted_peak_gb <= card.budget_gb:
            return plan
    raise UserError(_too_large(h, card, plans[-1]))


_COLUMNS = (
    "card",
    "tier",
    "precision",
    "weights",
    "Adam's state",
    "checkpointing",
    "text encoder",
    "EMA",
    "class images at a time",
    "predicted peak",
)


def tier_rows(h: Hyperparameters) -> list[dict[str, str]]:
    """What each card gets: a row a card, with an ``error`` where it can't be trained on."""
    rows = []
    for name in [*CARDS, "24GB", "16GB", "12GB", "10GB", "8GB", "6GB", "4GB"]:
        try:
            plan = make_plan(h, find_card(name))
        except UserError as error:
            rows.append({"card": name, "error": str(error)})
            continue
        cells = [
            name,
            plan.tier,
            plan.precision,
            plan.weights,
            f"{plan.state_bits} bits",
            "yes" if plan.gradient_checkpointing else "no",
            "yes" if plan.train_text_encoder else "no",
            plan.ema,
            str(plan.sample_batch_size),
            f"{plan.predicted_peak_gb:.1f} GB" if plan.device == "cuda" else "",
        ]
        rows.append(dict(zip(_COLUMNS, cells, strict=True)))
    return rows


def tier_table(h: Hyperparameters) -> str:
    """The same as a Markdown table."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    for row in tier_rows(h):
        cells = [row["card"], row["error"], *[""] * (len(_COLUMNS) - 2)] if "error" in row else row.values()
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def smaller_plan(plan: Plan, h: Hyperparameters) -> Plan | None:
    """The next plan to try after ``plan`` ran out of memory; None where there is nothing left to give up.

    What is trained stays the same, and so does everything that was asked for explicitly.
    """
    steps: list[dict[str, object]] = []
    if h.use_ema == "auto" or plan.ema == "device":
        steps.append({"ema": "cpu"} if plan.ema == "device" else {})
    if h.gradient_checkpointing == "auto":
        steps.append({"gradient_checkpointing": True})
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


def _candidates(h: Hyperparameters, card: Card) -> list[Plan]:
    """The plans to choose from, best first. An average that has no room on the device may live on the CPU."""
    return [
        _on(rung, ema_place, h, card)
        for rung in LADDER
        if card.memory_gib >= rung.from_gib
        for ema_place in (("device", "cpu") if h.use_ema is True else ("device",))
    ]


def _on(rung: Rung, ema_place: EmaPlace, h: Hyperparameters, card: Card) -> Plan:
    """A rung of the ladder with the explicit hyperparameters in place of its own choices."""
    notes: list[str] = []
    precision = _precision(h, card)
    weights: Weights = rung.weights
    optimizer: Optimizer = "blockwise"
    state_bits: int = rung.state_bits
    if h.optimizer == "adamw" or h.optimizer == "adamw8bit":
        optimizer = h.optimizer
        weights, state_bits = "fp32", 8 if optimizer == "adamw8bit" else 32
    elif h.optimizer == "auto16":
        state_bits = 16
        notes.append("optimizer=auto16 (use_8bit_adam=false): Adam's state takes 16 bits a value")
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
    ema = _choose(h.use_ema, rung.use_ema)
    trainable = FAMILIES[h.architecture].footprint.trains_text_encoder
    text_encoder = _choose(h.train_text_encoder, rung.train_text_encoder and trainable)
    if _draws_while_training(h):
        notes.append(f"validation_steps: drawing takes {_drawing_gb(precision, h):.1f} GB beside training's memory")
    if not trainable:
        notes.append("the text encoders are not trained: with an SDXL base model the job trains the UNet only")
    elif not text_encoder and h.train_text_encoder == "auto":
        notes.append("the text encoder is not trained: the card has no room for it")
    plan = Plan(
        tier=rung.name if optimizer == "blockwise" and weights == rung.weights else "reference",
        device="cuda",
        precision=precision,
        weights=weights,
        optimizer=optimizer,
        state_bits=state_bits,
        update_in_backward=not keeps,
        gradient_checkpointing=_choose(h.gradient_checkpointing, rung.gradient_checkpointing),
        attention="default" if h.attention == "auto" else h.attention,
        # Volta and older have no fast fp16 kernels for it.
        channels_last=card.capability >= (7, 5),
        cuda_graph=optimizer != "adamw8bit" and h.cuda_graph is not False,
        compile=h.torch_compile is True,
        train_text_encoder=text_encoder,
        ema=ema_place if ema else "no",
        cache_latents=h.not_cache_latents in (False, "auto"),
        sample_batch_size=1,
        max_grad_norm=(1.0 if h.max_grad_norm == "auto" else h.max_grad_norm) if clips else None,
        notes=tuple(notes),
    )
    plan = dataclasses.replace(plan, predicted_peak_gb=predict_peak_gb(plan, h))
    if h.sample_batch_size != "auto":
        return dataclasses.replace(plan, sample_batch_size=h.sample_batch_size)
    # A job that is asked to stop finishes a batch first: on small cards that has to be seconds.
    sizes = (64, 32, 16, 8, 4, 2, 1) if card.memory_gib >= LADDER[0].from_gib else (16, 8, 4, 2, 1)
    batches = [n for n in sizes if sampling_peak_gb(n, h) <= card.budget_gb]
    return dataclasses.replace(plan, sample_batch_size=batches[0] if batches else 1)


def _cpu_plan(h: Hyperparameters, card: Card) -> Plan:
    notes = ["use_cpu: training on the CPU" if h.use_cpu else "no CUDA device: training on the CPU"]
    if h.mixed_precision == "fp16":
        notes.append("mixed_precision=fp16 needs a GPU: the CPU computes in fp32")
    if h.attention in ("xformers", "flash_attention"):
        notes.append(f"attention={h.attention} needs a GPU: SDPA serves")
    return Plan(
        tier="cpu",
        device="cpu",
        precision="bf16" if h.mixed_precision == "bf16" else "fp32",
        weights="fp32",
        optimizer="blockwise" if h.optimizer == "blockwise" else "adamw",
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
        notes=tuple(notes),
    )


def _impossible(h: Hyperparameters, card: Card) -> list[str]:
    """Explicit values that this card, or the base model, can't run, whatever its memory."""
    problems: list[str] = []
    if h.train_text_encoder is True and not FAMILIES[h.architecture].footprint.trains_text_encoder:
        problems.append(
            "train_text_encoder=true: with an SDXL base model the job trains the UNet only; set it to false or auto"
        )
    if (h.use_cpu or card.is_cpu) and h.optimizer == "adamw8bit":
        problems.append(
            "optimizer=adamw8bit or use_8bit_adam=true needs a GPU; set optimizer to auto, or use_8bit_adam to false"
        )
    if not card.is_cpu and not h.use_cpu and h.mixed_precision == "bf16" and not card.has_bf16:
        problems.append(f"mixed_precision=bf16: {card.name} has no bf16; write fp16 or auto")
    if not card.is_cpu and h.attention == "flash_attention" and card.capability < (8, 0):
        problems.append(f"attention=flash_attention: {card.name} can't run it; write default or auto")
    return problems


def _too_large(h: Hyperparameters, card: Card, smallest: Plan) -> list[str]:
    """Why nothing fits, and what would: the explicit values whose absence makes room."""
    wishes = {
        "gradient_checkpointing": False,
        "train_text_encoder": True,
        "use_ema": True,
        "optimizer": h.optimizer if h.optimizer in ("adamw", "auto16") else object(),
        "mixed_precision": "no",
        "max_grad_norm": h.max_grad_norm if isinstance(h.max_grad_norm, float) else object(),
    }
    asked = {name: "auto" for name, value in wishes.items() if getattr(h, name) == value}
    resolution = min(h.resolution, FAMILIES[h.architecture].resolution)
    smaller = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "resolution": resolution}
    asked_sizes = {name: value for name, value in smaller.items() if getattr(h, name) != value}
    text = (
        f"the job needs {smallest.predicted_peak_gb:.1f} GB at least and {card.name} has {card.budget_gb:.1f} GB for it"
    )
    drawing = {"validation_steps": 0} if _draws_while_training(h) else {}
    both = {**asked, **asked_sizes}
    for change in (drawing, asked, asked_sizes, both, {**both, **drawing}):
        if change:
            relaxed = h.model_copy(update=change)
            if any(plan.predicted_peak_gb <= card.budget_gb for plan in _candidates(relaxed, card)):
                return [f"{text}; it fits with {' '.join(f'{k}={v}' for k, v in change.items())}"]
    needed = [c for c in CARDS.values() if c.budget_gb >= smallest.predicted_peak_gb]
    return [f"{text}; use a larger card{f', such as {needed[0].name}' if needed else ''}"]


def _precision(h: Hyperparameters, card: Card) -> Precision:
    if h.mixed_precision == "auto":
        return "bf16" if card.has_bf16 else "fp16"
    return "fp32" if h.mixed_precision == "no" else h.mixed_precision


def _may_drop_gradients(h: Hyperparameters) -> bool:
    """Accumulation and clipping to a global norm need every gradient at the end of the backward pass."""
    return h.gradient_accumulation_steps == 1 and not isinstance(h.max_grad_norm, float)


def _choose(wish: bool | Literal["auto"], otherwise: bool) -> bool:
    return otherwise if wish == "auto" else wish


# --- predicted peak memory; the constants are fitted to benchmarks/train_step.py and benchmarks/tiers.py ---

# The text encoder's share of activations, for one prompt of 77 tokens.
_TEXT_ACTIVATIONS_GB = 0.05
# Workspaces, the largest gradients in flight and the caches of latents and embeddings.
_OVERHEAD_GB = 0.12
# Gradients grow while activations go: their peaks add up in part.
_OVERLAP = 0.2


def predict_peak_gb(plan: Plan, h: Hyperparameters) -> float:
    """Highest allocation of the training phase, in GB (1e9 bytes)."""
    model = FAMILIES[h.architecture].footprint
    millions = model.unet + (model.text_encoder if plan.train_text_encoder else 0)
    scales = 8 / (128 if plan.state_bits == 4 else 256)  # two of fp32 a block
    state = 2 * plan.state_bits / 8 + (scales if plan.optimizer == "blockwise" else 0)
    weights = {"fp32": 4.0, "residual": 4.0, "stochastic": 2.0}[plan.weights]
    average = 4.0 if plan.ema == "device" else 0.0
    width = 4 if plan.weights == "fp32" else 2
    gradients = 0.0 if plan.update_in_backward else width * millions * 1e-3
    # Autocast makes a 16-bit copy of every fp32 weight, which its backward pass needs.
    casts = 2e-3 * millions if plan.weights == "fp32" and plan.precision != "fp32" else 0.0
    rows = h.train_batch_size * (2 if h.prior_preservation else 1)
    activations = model.checkpointed_gb if plan.gradient_checkpointing else model.activations_gb
    scale = (h.resolution / 512) ** 2 * (2 if plan.precision == "fp32" else 1)
    text = _TEXT_ACTIVATIONS_GB if plan.train_text_encoder and not plan.gradient_checkpointing else 0
    samples = casts + rows * (activations * scale + text)
    passing = max(samples, gradients) + _OVERLAP * min(samples, gradients)
    vae = 0.0 if plan.cache_latents else 4e-3 * model.vae + 1.2 * (h.resolution / 512) ** 2
    if h.prior_preservation and h.prior == "output":  # the latents of its outputs
        vae += OUTPUTS_PER_IMAGE * h.num_class_images * 6.6e-5 * (h.resolution / 512) ** 2
    kept = (weights + state + average) * millions * 1e-3 + vae + _OVERHEAD_GB
    peak = kept + passing
    if _draws_while_training(h):
        # A captured step keeps all its memory while pictures are drawn; another one its gradients at most.
        held = passing if plan.cuda_graph else gradients
        peak = max(peak, kept + held + _drawing_gb(plan.precision, h))
    return round(peak, 2)


def _draws_while_training(h: Hyperparameters) -> bool:
    """Whether pictures are drawn while training's memory stays where it is."""
    return h.validation_prompt is not None and h.validation_steps > 0


def _drawing_gb(precision: Precision, h: Hyperparameters) -> float:
    """What a validation picture takes beside training: a pipeline of its own, VAE included, only while it draws."""
    return sampling_peak_gb(1, h) * (2 if precision == "fp32" else 1)


def sampling_peak_gb(batch_size: int, h: Hyperparameters) -> float:
    """Highest allocation while pictures are drawn, in GB: 16-bit weights, two rows (guidance) a picture."""
    model = FAMILIES[h.architecture].footprint
    models = 2e-3 * (model.unet + model.text_encoder) + 1e-3 * model.vae_bytes * model.vae
    decoding = 0.35 * model.vae_bytes
    return models + max(model.drawn_gb * batch_size, decoding) * (h.resolution / 512) ** 2
