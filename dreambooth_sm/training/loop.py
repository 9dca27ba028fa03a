"""The training loop: obeys the plan, knows nothing of cards or of SageMaker."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreambooth_sm.data.training_set import Batch, BatchSampler, Latents, PictureExtras, SubjectWeights, on_device
from dreambooth_sm.distributed import World
from dreambooth_sm.errors import StopRequested, UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import Trainable, encodes_in_steps, exports_base
from dreambooth_sm.onlookers import Onlooker
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.report import Reporter
from dreambooth_sm.training.attention import attention_context
from dreambooth_sm.training.batch_loss import BatchLoss
from dreambooth_sm.training.checkpoint import Checkpoint, save_checkpoint
from dreambooth_sm.training.ema import Ema
from dreambooth_sm.training.losses import Loss
from dreambooth_sm.training.optimizers import by_factor, make_updater, options_of
from dreambooth_sm.training.precision import weights_dtype
from dreambooth_sm.training.schedule import Schedule, make_rate
from dreambooth_sm.training.step import CapturedStep, GradientAverage, Inputs, Step
from dreambooth_sm.training.trend import find_rise
from dreambooth_sm.training.window import Window

# A loss scaler needs some steps to find its scale; more than this many skipped in a row is a broken job.
_MOST_SKIPPED = 30


class TrainingError(RuntimeError):
    """Training that learns nothing: losses or gradients that are not finite, weights that do not change."""


@dataclass(frozen=True)
class TrainingSet:
    """All that the loop reads.

    Attributes:
        batch_sampler: draws the batches.
        latents: the pictures' latents.
        prompts: what the text encoders make of them, by name, a row a prompt; what they take, where steps encode them.
        extras: what the denoiser is told of the pictures.
        weights: what parts of the pictures weigh in the loss; None where all weigh the same.
    """

    batch_sampler: BatchSampler
    latents: Latents
    prompts: dict[str, torch.Tensor]
    extras: PictureExtras
    weights: SubjectWeights | None = None


class Trainer:
    """Trains what a method trains of a model, in place.

    Args:
        trained: on the CPU; what the steps run is moved to the device.
        device: where to.
        identity: what a checkpoint of this job is recognised by.
        world: the processes that train together.
        stays: whether the model stays on the device after training, for :meth:`restart`.

    Attributes:
        rate_after: the learning rate of the step that follows so many steps.
        on_save: is told the directory of each checkpoint that was written.
        leaves_no_checkpoint: whether checkpoints are removed once the model is written: the last takes no more steps.
    """

    def __init__(
        self,
        trained: Trainable,
        data: TrainingSet,
        plan: Plan,
        h: Hyperparameters,
        schedule: Schedule,
        *,
        device: torch.device,
        identity: dict[str, Any],
        report: Reporter,
        world: World = World(),  # noqa: B008 - frozen
        stays: bool = False,
    ) -> None:
        self.world, self.plan, self.device = world, plan, device
        self._trained, self._stays = trained, stays
        self.base, self.family = trained.model, trained.model.family
        self.encodes = encodes_in_steps(plan, h)
        trained.load()
        self.named_parameters = trained.parameters
        self.parameters = list(self.named_parameters.values())
        originals = [p.detach() for p in self.parameters]
        try:
            trained.place(plan, device)
            attention = attention_context(plan, self.base.denoiser, device, report.warn)
            groups = by_factor(self.named_parameters, trained.rates)
            options = options_of(h, schedule.learning_rate)
            self.updater = make_updater(list(groups.values()), plan, options, identity["seed"])
            if weights_dtype(plan) != torch.float32:
                for parameter, original in zip(self.parameters, originals, strict=True):
                    self.updater.write(parameter, original.to(device))
        except torch.OutOfMemoryError:
            for parameter, original in zip(self.parameters, originals, strict=True):
                parameter.data = original
            raise
        del originals
        self._memory = [parameter.data for parameter in self.parameters] if stays else []  # the device's
        self._loss = self._loss_of(data, h)
        self.make_step = (CapturedStep if plan.cuda_graph else Step)(self._loss, self.updater, attention)
        self.make_step.shapes = len(data.batch_sampler.shapes)
        if world.size > 1:
            self.make_step.average = GradientAverage(self.parameters)
        self._factors = list(groups)
        if plan.use_ema:
            on_cpu = plan.ema == "cpu" and device.type != "cpu"
            self.make_step.ema = Ema(
                self.parameters,
                h.ema_decay,
                read=self.updater.read,
                average_into=None if on_cpu else self.updater.average_into,
                on_cpu=on_cpu,
            )
        self._begin(data, h, schedule, identity, report)

    def _loss_of(self, data: TrainingSet, h: Hyperparameters) -> BatchLoss:
        classes = bool(data.batch_sampler.classes)
        return BatchLoss(self._trained, data.prompts, self.plan, h, device=self.device, has_classes=classes)

    def _begin(
        self,
        data: TrainingSet,
        h: Hyperparameters,
        schedule: Schedule,
        identity: dict[str, Any],
        report: Reporter,
    ) -> None:
        self.data, self.h, self.schedule, self.identity, self.report = data, h, schedule, identity, report
        self.rate_after = make_rate(h, schedule)
        self._set_rates(self.rate_after(0))
        self.step = 0
        self.on_save: Callable[[Path], object] | None = None
        self.leaves_no_checkpoint = False
        self._checked = False
        self._rise_told = self._complained = False
        self._skipped = 0
        # Whether all losses were finite, and how many were before one was not; on the device, so that no step waits.
        self._is_finite = torch.ones((), dtype=torch.bool, device=self.device)
        self._finite_steps = torch.zeros((), dtype=torch.int64, device=self.device)
        self._started_after = 0
        self._last_saved: Path | None = None
        self._window = Window()

    def restart(
        self,
        data: TrainingSet,
        h: Hyperparameters,
        schedule: Schedule,
        identity: dict[str, Any],
        report: Reporter,
    ) -> None:
        """Begins another training, from the values that the parameters have now: to the bit what a trainer of its own
        would do. The model is on the device, and graphs serve again where shapes are the same.

        Args:
            h: what of it is the model's and the plan's is as it was.
        """
        values = [parameter.detach() for parameter in self.parameters]
        for parameter, memory in zip(self.parameters, self._memory, strict=True):
            parameter.data = memory
        self.updater.restart(identity["seed"])
        for parameter, value in zip(self.parameters, values, strict=True):
            self.updater.write(parameter, value.to(self.device))
        if self.ema:
            self.ema.restart()
        if not self._loss.take(data.prompts, bool(data.batch_sampler.classes)):
            self._loss = self._loss_of(data, h)
        self.make_step.restart(self._loss, len(data.batch_sampler.shapes))
        self._begin(data, h, schedule, identity, report)

    @property
    def ema(self) -> Ema | None:
        return self.make_step.ema

    def state(self, *, is_final: bool = False) -> dict[str, Any]:
        """All that a job needs to be resumed here; weights in full precision, on the CPU.

        Args:
            is_final: whether no steps will follow: the optimizer's state, which is as large again, is then left out.
        """
        return {
            "weights": {name: self.updater.read(p).cpu() for name, p in self.named_parameters.items()},
            "step": {} if is_final else self.updater.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "window": self._window.state(),
        }

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Continues from another trainer's :meth:`state`, after ``step`` optimizer steps.

        Learning rates are those of this trainer's schedule at that step. Adam's moments start from zero where they have
        another format: the other trainer had run out of memory, or has.
        """
        for name, parameter in self.named_parameters.items():
            self.updater.write(parameter, state["weights"][name].to(self.device))
        if self.updater.accepts(state["step"]):
            self.updater.load_state_dict(state["step"])
        elif step < self.schedule.steps:
            self.report.warn("Adam's moments are not there, or not in this plan's format, and start from zero")
        self.make_step.forget()  # optimizers may have new memory
        self._set_rates(self.rate_after(step))
        if self.ema and state["ema"]:
            self.ema.load_state_dict(state["ema"])
        self.step = self._started_after = step
        self._finite_steps.zero_()
        self._window = Window.going_on(state["window"], self.device)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Resumes where ``checkpoint`` was written.

        Raises:
            UserError: where the job differs from the one that wrote it, or its tensors can't be used.
        """
        checkpoint.check_identity(self.identity)
        try:
            self.load_state(checkpoint.load(), checkpoint.step)
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint {checkpoint.directory} can't be used ({type(error).__name__}: {error}); remove it, or "
                "set resume_from_checkpoint=no to start again"
            ) from error
        self._last_saved = checkpoint.directory
        self._checked = True

    def save(self, root: Path) -> Path | None:
        """Writes a checkpoint, on the main process alone: all hold the same state. Where it can't be written, a line
        says so, and those that are there stay.

        Raises:
            TrainingError: where the weights are not finite: no good checkpoint gives way to them.
        """
        self._window.share(self.world)
        self._check_finite()
        if not self.world.is_main:
            return None
        is_last = self.step == self.schedule.steps
        try:
            saved = save_checkpoint(
                root,
                self.step,
                self.identity,
                self.state(is_final=is_last and self.leaves_no_checkpoint),
                # The last one is not a candidate of select_best, and takes no candidate's place.
                keep=self.h.checkpoints_total_limit + (self.h.select_best and is_last),
                record=self.report.record(self.step),
                pictures=[sample.path for sample in self.report.samples],
                # A seed that was drawn is another in each start of the same job.
                owns=lambda c: c.belongs_to(self.identity, but=("seed",) if self.h.seed is None else ()),
            ).directory
        except OSError as error:
            reason = error.strerror or str(error)
            self.report.warn(f"the checkpoint of step {self.step} could not be written: {reason}; {self._kept()}")
            return None
        self._last_saved = saved
        if self.on_save and not is_last:  # the model itself is about to follow
            self.on_save(saved)
        return saved

    def _kept(self) -> str:
        return f"the last checkpoint is {self._last_saved}" if self._last_saved else "there is no checkpoint before it"

    def weights_now(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields what :meth:`finish` would put into the modules, by parameter: name and full-precision value, EMA's
        where there is one."""
        return zip(
            self.named_parameters,
            self.ema.average if self.ema else map(self.updater.read, self.parameters),
            strict=True,
        )

    def train(
        self,
        checkpoints: Path,
        stop: threading.Event,
        onlookers: Sequence[Onlooker] = (),
        keep_last: Callable[[], bool] = lambda: True,
    ) -> None:
        """Runs all remaining steps, saves a checkpoint of the last one, then :meth:`finish`.

        Args:
            onlookers: draw and measure on the way; the steps are the same, to the bit, with and without them.
            keep_last: whether there is room for the last checkpoint; asked when it is due.

        Raises:
            StopRequested: when ``stop`` is set; the steps done are in a checkpoint.
            TrainingError: where the job learns nothing.
        """
        for _ in self.report.progress(range(self.step, self.schedule.steps), self.schedule.steps - self.step, "steps"):
            rate = self.rate_after(self.step)
            self._window.add(self.optimizer_step(rate))
            if self.step == 1 or self.step % self.h.logging_steps == 0 or self.step == self.schedule.steps:
                self._log(rate)
                self._window = Window()
            last = self.step == self.schedule.steps
            for onlooker in [each for each in onlookers if self.world.is_main and not last and each.is_due(self.step)]:
                paused = time.monotonic()
                onlooker.look(self.weights_now(), self.step)
                self._window.started += time.monotonic() - paused
            if not last and self._asked_to_stop(stop):
                saved = self.save(checkpoints)
                where = f"the checkpoint is {saved}; the same job is resumed from it" if saved else self._kept()
                raise StopRequested(f"after step {self.step} of {self.schedule.steps}; {where}")
            is_due = self.schedule.save_every and self.step % self.schedule.save_every == 0
            if (self.world.first(keep_last()) if last else is_due) and (saved := self.save(checkpoints)):
                self.report.metrics(checkpoint=saved, step=self.step)
        if rise := find_rise(self.report.training_rows):
            self.report.verdict(f"worse: {rise}")
        self.finish(with_base=bool(onlookers) or exports_base(self.h))

    def _asked_to_stop(self, stop: threading.Event) -> bool:
        """Several processes have to agree on the step; they do so where they meet anyway."""
        if self.world.size == 1:
            return stop.is_set()
        return self.step % self.h.logging_steps == 0 and self.world.any(stop.is_set())

    def finish(self, *, with_base: bool = True) -> None:
        """Puts the weights to be saved into the modules, in float32 on the CPU: EMA's where there is one.

        Args:
            with_base: whether anybody draws with the modules or writes them: what of them is frozen follows then.

        Raises:
            TrainingError: where they are not finite.
        """
        self._check_finite()
        self._put_back(self.ema.average if self.ema else None)
        if self._stays:
            return
        self.close()
        if with_base:
            for part in (self.family.facts.denoiser, *(self.base.text_parts if self.encodes else ())):
                getattr(self.base, part).to("cpu")

    def _check_finite(self) -> None:
        """Raises TrainingError where a loss of the steps so far, a weight or an average is not finite."""
        finite_steps = min(self.world.gather(self._started_after + int(self._finite_steps)))
        if finite_steps < self.step:
            raise TrainingError(self._diverged(f"the loss of step {finite_steps + 1} is not finite"))
        broken = [name for name, value in self._fingerprints().items() if value is None]
        if self.ema and not all(bool(torch.linalg.vector_norm(a, torch.inf).isfinite()) for a in self.ema.average):
            broken.append("the average")
        if broken:
            words = f"the weights of {' and '.join(broken)} are not finite after step {self.step}"
            raise TrainingError(self._diverged(words))

    def _diverged(self, words: str) -> str:
        return (
            f"{words}; lower learning_rate, which is {self.schedule.learning_rate:.4g}, or set mixed_precision=bf16 or "
            f"no; {self._kept()}"
        )

    def rescue(self) -> dict[str, Any]:
        """After the device ran out of memory: the state, and the modules back on the CPU.

        Where parameters are updated inside the backward pass, some have taken the step that failed and will take it
        again: once more 1e-6 or so, which training does not notice.
        """
        self.updater.drop_gradients()
        state = self.state()
        self._put_back(None)
        self.close()
        return state

    def close(self) -> None:
        """Lets go of the model, and of the device's memory for its parameters."""
        self.make_step.close()
        self._memory = []

    @torch.no_grad()
    def _put_back(self, values: list[torch.Tensor] | None) -> None:
        for number, parameter in enumerate(self.parameters):
            value = self.updater.read(parameter) if values is None else values[number]
            parameter.grad = None
            parameter.data = value.to("cpu", copy=True).contiguous()

    def optimizer_step(self, rate: float) -> Loss:
        """One step at learning rate ``rate``; the mean loss of its batches, detached, overwritten by the next step."""
        parts = self.h.gradient_accumulation_steps
        world = self.world
        inputs = [self._inputs((self.step * parts + part) * world.size + world.rank) for part in range(parts)]
        self._set_rates(rate)
        with self._self_check(rate) as check:
            loss = self.make_step(inputs)
            check(loss)
        self.step += 1
        self._is_finite &= loss.total.detach().isfinite()
        self._finite_steps += self._is_finite
        return loss

    def _set_rates(self, rate: float) -> None:
        for group, factor in zip(self.updater.optimizer.param_groups, self._factors, strict=True):
            group["lr"] = rate * factor

    def loss(self, batch: Batch) -> Loss:
        """The loss of one batch, with its graph."""
        return self._loss(self._to_device(batch))

    def _inputs(self, number: int) -> Inputs:
        together = self.h.gradient_accumulation_steps * self.world.size
        return self._to_device(self.data.batch_sampler.batch(number, self.h.train_batch_size, together))

    def _to_device(self, batch: Batch) -> Inputs:
        return Inputs(
            latents=self.data.latents(batch),
            noise=on_device(batch.noise, self.device),
            timesteps=on_device(batch.timesteps, self.device),
            prompts=on_device(batch.prompts, self.device),
            weights=self.data.weights(batch) if self.data.weights else None,
            extras={name: on_device(value, self.device) for name, value in self.data.extras(batch).items()},
        )

    @contextlib.contextmanager
    def _self_check(self, rate: float) -> Iterator[Callable[[Loss], None]]:
        """Around the first update that should change weights: stops a job that would learn nothing."""
        if self._checked or rate == 0:
            yield lambda loss: None
            return
        before = self._fingerprints()

        def check(loss: Loss) -> None:
            step = self.step + 1
            if not torch.isfinite(loss.total):
                raise TrainingError(f"the loss of step {step} is not finite; try mixed_precision=bf16 or no")
            after = self._fingerprints()
            if None in after.values() or (self.updater.skipped() and not self.updater.scales_loss):
                other = "flash_attention" if self.plan.attention == "default" else "default"
                raise TrainingError(
                    f"gradients are not finite at step {step}; try attention={other} or mixed_precision=no"
                )
            if self.updater.skipped():  # the loss scaler looks for its scale
                self._skipped += 1
                if self._skipped > _MOST_SKIPPED:
                    raise TrainingError(f"gradients were not finite in {self._skipped} steps; try mixed_precision=no")
                return
            unchanged = [name for name, value in after.items() if value == before[name]]
            if unchanged:
                raise TrainingError(
                    f"the first update left the weights of {' and '.join(unchanged)} as they were; the learning rate "
                    "may be too small, or the attention kernels return no gradients (attention=default)"
                )
            self._checked = True

        yield check

    @torch.no_grad()
    def _fingerprints(self) -> dict[str, int | None]:
        """A number for each part of the model that changes when a weight does; None where a weight is not finite."""
        prints: dict[str, int | None] = {}
        for part, named in itertools.groupby(self.named_parameters.items(), lambda item: item[0].partition(".")[0]):
            total = torch.zeros((), dtype=torch.int64, device=self.device)
            largest = torch.zeros((), device=self.device)
            for _, parameter in named:
                for bits in self.updater.bits(parameter):
                    total += bits.sum(dtype=torch.int64)
                norm = torch.linalg.vector_norm(parameter, torch.inf, dtype=torch.float32)
                largest = torch.maximum(largest, norm)  # both let NaN through, and make no copy
            prints[part] = int(total) if bool(largest.isfinite()) else None
        return prints

    def _log(self, rate: float) -> None:
        means = self._window.means(self.world)  # waits for the device: the seconds are those of finished steps
        seconds = self._window.seconds
        vram = torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else 0.0
        self.report.metrics(
            step=self.step,
            **means,
            lr=rate,
            **self.updater.metrics(),
            steps_per_s=self._window.count / seconds if seconds else None,
            vram_gb=vram,
        )
        if not math.isfinite(means["loss"]):
            self._check_finite()
            raise TrainingError(self._diverged(f"the loss is not finite by step {self.step}"))
        if not self._complained and (complaint := self.updater.complaint()):
            self._complained = True
            self.report.warn(complaint)
        if not self._rise_told and (rise := find_rise(self.report.training_rows)):
            self._rise_told = True
            self.report.warn(rise)
