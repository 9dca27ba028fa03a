"""Estimates of a job's time and cost on an instance type, made without a GPU or an account.

The steps of each plan were measured on an H200 (docs/performance.md), on its own memory or under the cap of the card
that the plan is for (``dreambooth_sm/planning/measured``). Other cards are computed from it, by their data sheets and
what a step computes and moves (:mod:`dreambooth_sm.planning.roofline`). The parts of a job beside its steps are
:mod:`launcher.parts`. Where an account has run jobs that are like it, these say how long its parts take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from dreambooth_sm.errors import UserError
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS, asks_base, asks_base_of_classes
from dreambooth_sm.planning.cards import Card
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.planning.figures import figure
from dreambooth_sm.planning.length import length_of
from dreambooth_sm.planning.measuring import measured_pictures
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.planning.roofline import slowdown
from launcher.instances import INSTANCES, PRICES, Instance
from launcher.jobs.times import Median
from launcher.parts import NOTHING, JobPart, Known, after_training, before_training, in_minutes, pool_lines

# The family whose steps and class images were timed; what those of the others cost is relative to it.
_TIMED = next(iter(FAMILIES))
# The method whose variants were timed: what they add to a step is taken to be the same share with others.
_VARIED = "full"
# Of a step with two pictures, this share does not grow with them: the optimizer, mostly.
_FIXED_SHARE = figure("shared", "fixed_share")
# Of a picture's time in a step, by arithmetic: a base model that is asked has no backward pass.
_FORWARD_SHARE = 0.5
# Of a step's time on one GPU, where there are several.
_SEVERAL_CARDS = figure("shared", "several_cards_cost")
# Class images on the H200: GPU seconds of a picture in a large batch, and the host's seconds for a batch.
_CLASS_IMAGE_S, _CLASS_BATCH_HOST_S = 1 / figure(_TIMED, "class_images_per_s"), figure("shared", "class_batch_host_s")
# Before the first step of a job: kernels are compiled or read, and the step is captured.
_FIRST_STEP_S = figure("shared", "first_step_s")
# The card whose steps were measured.
_MEASURED_CARD = "H200"
# An instance type is chosen for a time limit only if the estimate leaves it this much room.
MARGIN = 1.5


@dataclass(frozen=True)
class Estimate:
    """The time, memory and money that a job needs on an instance type.

    Attributes:
        minutes: billed minutes that are expected, from the start of the instance; None on CPUs.
        usd: the same in dollars on demand, for all instances; None where the price is not known.
        training_minutes: of them, those of the steps alone; 0 on CPUs.
        length_note: what several processes change about the length of the training.
        parts: what the minutes are made of, in order, with the wait that is not billed.
        known: what the account said of the job.
        notes: on warm pools.
    """

    instance: Instance
    instance_count: int
    method: str
    plan: Plan
    minutes: float | None
    usd: float | None
    training_minutes: float = 0.0
    length_note: str | None = None
    parts: tuple[JobPart, ...] = ()
    known: Known = NOTHING
    notes: tuple[str, ...] = ()

    @property
    def waiting_minutes(self) -> float:
        """Minutes before the billed ones: until there is an instance."""
        return sum(part.seconds for part in self.parts if not part.is_billed) / 60

    @property
    def whole_minutes(self) -> float | None:
        """Minutes from the request to the end; None on CPUs."""
        return None if self.minutes is None else self.waiting_minutes + self.minutes

    def lines(self) -> list[str]:
        """For people: instance, plan, memory, time and cost."""
        plan, card = self.plan, self.instance.card
        count = self.instance.count * self.instance_count
        trained = METHODS[self.method].trains
        trained += " and text encoder" if plan.train_text_encoder else ""
        cards = f"{count} x {card.name}" if count > 1 else card.name
        memory = f", {plan.predicted_peak_gb:.1f} of {card.budget_gb:.1f} GB" if plan.device == "cuda" else ""
        lines = [
            f"instance: {f'{self.instance_count} x ' if self.instance_count > 1 else ''}{self.instance.name} ({cards})",
            f"plan: {plan.tier}: {trained}{' with EMA' if plan.use_ema else ''}, {plan.precision}{memory}",
            *([f"length: {self.length_note}"] if self.length_note else []),
        ]
        if self.minutes is None or self.whole_minutes is None:
            lines.append("time: no estimate for CPUs; choose an instance type with a GPU for more than a trial")
        else:
            cost = "at an unknown price" if self.usd is None else f"about ${self.usd:.2f} on demand ({PRICES})"
            lines.append(
                f"estimate: about {in_minutes(self.whole_minutes)}, {cost}; billed: {in_minutes(self.minutes)}"
            )
            lines += [*(f"  {part.line()}" for part in self.parts), *self.notes]
        return lines


def estimate_on(
    h: Hyperparameters, instance: Instance, *, instance_count: int = 1, pictures: int = 5, known: Known = NOTHING
) -> Estimate:
    """The plan for an instance type's card, and how long the job will take and cost with it.

    Args:
        pictures: of the subject, for a length that is given in epochs.
        known: what the account says of such jobs.

    Raises:
        UserError: where the job can't run on this card; the message says what would.
    """
    processes = _processes(h, instance) * instance_count
    card = Card(instance.card.name, instance.card.memory_gib, instance.card.capability, processes)
    plan = make_plan(h, card)
    length = length_of(h, pictures, processes)
    if plan.device == "cpu":
        return Estimate(instance, instance_count, h.method, plan, None, None, length_note=length.note)
    training = _step_of(h, plan, instance, processes) * length.steps
    is_measured = instance.card.name == _MEASURED_CARD
    source = "measured" if is_measured else f"measured on an {_MEASURED_CARD}, computed for this card"
    steps = JobPart(f"{length.steps} steps", training + _FIRST_STEP_S, source)
    if ratio := _own_ratio(known, instance, instance_count):
        training *= ratio.value
        steps = JobPart(
            steps.name, steps.seconds * ratio.value, f"{ratio.value:.2g} x what was expected, {ratio.source}"
        )
    parts = [*before_training(h, known), *_drawn(h, plan, instance, processes, length.steps, source), steps]
    parts.append(after_training(h, plan, known))
    minutes = sum(part.seconds for part in parts if part.is_billed) / 60
    price = instance.usd_per_hour
    usd = None if price is None else minutes / 60 * price * instance_count
    return Estimate(
        instance,
        instance_count,
        h.method,
        plan,
        minutes,
        usd,
        training / 60,
        length.note,
        tuple(parts),
        known,
        tuple(pool_lines(h, known)),
    )


def _step_of(h: Hyperparameters, plan: Plan, instance: Instance, processes: int) -> float:
    """Seconds of one optimizer step of a job."""
    samples: float = h.train_batch_size * (2 if h.prior_preservation else 1)
    if asks_base(h):
        samples += h.train_batch_size * _FORWARD_SHARE
    step = _step_seconds(plan, _slowdown(h, instance), h.method)
    step *= _FIXED_SHARE + (1 - _FIXED_SHARE) * samples / 2 * _size(h) * figure(h.architecture, "step_cost")
    return step * h.gradient_accumulation_steps * (_SEVERAL_CARDS if processes > 1 else 1)


def _slowdown(h: Hyperparameters, instance: Instance) -> float:
    whole = not METHODS[h.method].leaves_base
    return slowdown(instance.card.name, h.architecture, whole=whole, base=_MEASURED_CARD)


def _size(h: Hyperparameters) -> float:
    """What pictures and model cost beside those that were timed, by arithmetic."""
    return (h.resolution / 512) ** 2 * h.facts.relative.cost


def _drawn(
    h: Hyperparameters, plan: Plan, instance: Instance, processes: int, steps: int, source: str
) -> Iterator[JobPart]:
    """The pictures that a job draws: those of the class, and those that the model is measured by."""
    image = _CLASS_IMAGE_S * _slowdown(h, instance) * _size(h) * figure(h.architecture, "class_image_cost")

    def drawing(pictures: float, batch_size: int) -> float:
        return pictures / batch_size * max(_CLASS_BATCH_HOST_S, batch_size * image)

    if h.prior_preservation and not asks_base_of_classes(h):
        made = h.num_class_images * max(1, len(h.inline_concepts))
        yield JobPart(f"{made} class images", drawing(made / processes, plan.sample_batch_size), source)
    measured, on_the_way = measured_pictures(h, steps)
    if measured or on_the_way:
        seconds = drawing(measured, plan.sample_batch_size) + drawing(on_the_way, 1)
        yield JobPart(f"{measured + on_the_way} pictures to measure", seconds, source)


def _own_ratio(known: Known, instance: Instance, instance_count: int) -> Median | None:
    """How long the account's jobs trained, beside what would have been expected of them."""
    ratios = []
    for values, seconds in known.own.trained:
        with suppress(UserError):  # of another version, perhaps
            expected = estimate_on(Hyperparameters.parse(values), instance, instance_count=instance_count)
            if expected.training_minutes:
                ratios.append(seconds / (60 * expected.training_minutes + _FIRST_STEP_S))
    return Median.of(ratios)


def cheapest_that_fits(h: Hyperparameters, instance_count: int, pictures: int) -> str:
    """Names the instance type that a job would get, after one that it does not fit; empty where there is none."""
    try:
        found = choose_instance(h, instance_count=instance_count, pictures=pictures).name
    except UserError:
        return ""
    return f"; instance_type='auto' takes {found}"


def choose_instance(
    h: Hyperparameters, *, max_minutes: float | None = None, instance_count: int = 1, pictures: int = 5
) -> Instance:
    """The cheapest instance type whose plan fits, and that will be done in ``max_minutes`` with room to spare.

    Raises:
        UserError: where there is none; the message names the fastest one.
    """
    fitting: list[Estimate] = []
    refusals: list[str] = []
    for instance in INSTANCES.values():
        if instance.usd_per_hour is None:
            continue
        try:
            fitting.append(estimate_on(h, instance, instance_count=instance_count, pictures=pictures))
        except UserError as error:
            refusals = error.problems
    timed = [(e.usd, e.minutes, e) for e in fitting if e.usd is not None and e.minutes is not None]
    if not timed:
        raise UserError(refusals or "instance_type='auto' chooses between cards, and use_cpu=true uses none")
    in_time = [entry for entry in timed if max_minutes is None or entry[1] * MARGIN <= max_minutes]
    if not in_time:
        _, minutes, fastest = min(timed, key=lambda entry: entry[1])
        raise UserError(
            f"max_minutes={max_minutes:g}: no instance type is expected to be done in time; the fastest, "
            f"{fastest.instance.name}, takes about {in_minutes(minutes)}: allow {minutes * MARGIN:.0f}, or train fewer "
            "steps"
        )
    return min(in_time, key=lambda entry: entry[:2])[2].instance


def _processes(h: Hyperparameters, instance: Instance) -> int:
    return instance.count if h.num_processes == "auto" else h.num_processes


def _step_seconds(plan: Plan, slower: float, method: str) -> float:
    """One optimizer step with one instance and one class picture of 512 pixels each."""

    def steps_per_s(trained: str, precision: str = "bf16", method: str = _VARIED) -> float:
        return figure(_TIMED, f"{method}.{trained}.{precision}.steps_per_s")

    rung = next((rung for rung in METHODS[method].ladder if rung.name == plan.tier), None)
    # The T4's fp16, with loss scaling and neither flash nor cuDNN attention, against bf16.
    cost = slower * (steps_per_s("medium") / steps_per_s("medium", "fp16") if plan.precision == "fp16" else 1)
    # What training the text encoder, and averaging the weights, add to a step.
    text_encoder_cost = steps_per_s("unet") / steps_per_s("both")
    ema_cost = steps_per_s("both") / steps_per_s("roomy")
    cost *= text_encoder_cost ** (plan.train_text_encoder - (rung is not None and rung.train_text_encoder))
    cost *= ema_cost ** (plan.use_ema - (rung is not None and rung.use_ema))
    if not plan.cuda_graph:  # the host launches each kernel
        busy = figure(_TIMED, f"{_VARIED}.reference.bf16.gpu_busy_ms") / 1e3
        return max(1 / steps_per_s("reference"), busy * cost)
    return cost / (steps_per_s(rung.name, method=method) if rung else steps_per_s("reference_graph"))


def table(methods: Mapping[str, Hyperparameters]) -> str:
    """Lists what jobs need on each instance type of a known price, and on the smallest with an H100, in Markdown."""
    lines = [f"| instance type | card | $/h | {' | '.join(methods)} |", "|" + "---|" * (3 + len(methods))]
    for instance in INSTANCES.values():
        if instance.usd_per_hour is None and instance.name != "ml.p5.4xlarge":
            continue
        cards = f"{instance.count} x {instance.card.name}" if instance.count > 1 else instance.card.name
        price = "" if instance.usd_per_hour is None else f"{instance.usd_per_hour:.2f}"
        cells = [_cell(h, instance) for h in methods.values()]
        lines.append(f"| {instance.name} | {cards} | {price} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(h: Hyperparameters, instance: Instance) -> str:
    try:
        found = estimate_on(h, instance)
    except UserError:
        return "does not fit"
    cost = "" if found.usd is None else f", ${found.usd:.2f}"
    time = "" if found.whole_minutes is None else f", {found.whole_minutes:.0f} min"
    return f"{found.plan.tier}, {found.plan.predicted_peak_gb:.1f} GB{time}{cost}"


def documented_table() -> str:
    """The table of docs/launcher.md, for usual jobs."""
    prompts = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
    methods: dict[str, dict[str, object]] = {
        "as the plan chooses": {},
        "UNet alone": {"train_text_encoder": False},
        "without prior preservation": {"with_prior_preservation": False},
        "fp32 AdamW, the reference": {"optimizer": "adamw", "train_text_encoder": False, "use_ema": False},
    }
    return table({title: Hyperparameters.parse({**prompts, **values}) for title, values in methods.items()})
