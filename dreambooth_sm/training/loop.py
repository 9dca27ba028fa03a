"""The training loop: obeys the plan, knows nothing of cards or of SageMaker."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler

from dreambooth_sm.data.prompts import encode
from dreambooth_sm.data.training_set import Batch, Dice, Latents
from dreambooth_sm.errors import StopRequested
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.models import BaseModel
from dreambooth_sm.plan import Plan
from dreambooth_sm.report import Reporter
from dreambooth_sm.training.checkpoint import Checkpoint, save_checkpoint
from dreambooth_sm.training.ema import Ema
from dreambooth_sm.training.losses import Loss, add_noise, dreambooth_loss, min_snr_weights, prediction_target

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# A loss scaler needs some steps to find its scale; more than this many skipped in a row is a broken job.
_MOST_SKIPPED = 30


class TrainingError(RuntimeError):
    """Training that learns nothing: losses or gradients that are not finite, weights that do not change."""


@dataclass(frozen=True)
class TrainingSet:
    """What the loop reads.

    Attributes:
        dice: draws the batches.
        latents: the pictures' latents.
        prompts: embeddings ``(prompts, length, width)``; token ids ``(prompts, chunks, length)`` where the text
            encoder is trained.
    """

    dice: Dice
    latents: Latents
    prompts: torch.Tensor


@dataclass(frozen=True)
class Schedule:
    """How long the job trains, in optimizer steps.

    Attributes:
        save_every: 0 for never.
    """

    steps: int
    save_every: int
    learning_rate: float


def make_schedule(h: Hyperparameters, instance_pictures: int, default_steps: int) -> Schedule:
    """Turns epochs into steps; ``max_train_steps`` wins."""
    batch = h.train_batch_size * h.gradient_accumulation_steps
    steps_per_epoch = -(-instance_pictures // batch)
    steps = h.max_train_steps or (h.num_train_epochs or 0) * steps_per_epoch or default_steps
    rate = h.learning_rate * (batch if h.scale_lr else 1)
    return Schedule(steps, h.save_steps * (steps_per_epoch if h.save_use_epochs else 1), rate)


@dataclass
class _Window:
    """Means since the last metric line; kept on the device until they are shown."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    count: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, loss: Loss) -> None:
        self.count += 1
        for name, value in (("loss", loss.total), ("instance_loss", loss.instance), ("prior_loss", loss.prior)):
            if value is not None:
                self.sums[name] = self.sums.get(name, 0) + value.detach()

    def means(self) -> dict[str, float]:
        return {name: (total / self.count).item() for name, total in self.sums.items()}


class Trainer:
    """Trains the UNet, and the text encoder where the plan says so, in place.

    Args:
        base: the base model; the parts that are trained are moved to the device.
        device: where to.
        identity: what a checkpoint of this job is recognised by.
    """

    def __init__(
        self,
        base: BaseModel,
        data: TrainingSet,
        plan: Plan,
        h: Hyperparameters,
        schedule: Schedule,
        *,
        device: torch.device,
        identity: dict[str, Any],
        report: Reporter,
    ) -> None:
        self.data, self.plan, self.h, self.schedule = data, plan, h, schedule
        self.device, self.identity, self.report = device, identity, report
        self.unet, self.text_encoder = base.unet, base.text_encoder
        self.modules = {"unet": self.unet} | ({"text_encoder": self.text_encoder} if plan.train_text_encoder else {})
        for module in self.modules.values():
            module.to(device).requires_grad_(True).train()
            if plan.gradient_checkpointing:
                (getattr(module, "enable_gradient_checkpointing", None) or module.gradient_checkpointing_enable)()
        self.attention = _attention(self.unet, plan, report)
        self.parameters = [p for module in self.modules.values() for p in module.parameters()]
        self.optimizer = make_optimizer(self.parameters, plan, h, schedule.learning_rate)
        self.scheduler = get_scheduler(
            h.lr_scheduler,
            self.optimizer,
            num_warmup_steps=h.lr_warmup_steps,
            num_training_steps=schedule.steps,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "fp16")
        self.ema = Ema(self.parameters, h.ema_decay) if plan.use_ema else None
        noise_scheduler: Any = DDPMScheduler.from_config(base.scheduler.config)
        self.prediction_type = noise_scheduler.config.prediction_type
        self.alphas_cumprod = noise_scheduler.alphas_cumprod.to(device)
        self.step = 0
        self._checked = False
        self._skipped = 0

    def resume(self, checkpoint: Checkpoint) -> None:
        """Goes on where ``checkpoint`` was written.

        Raises:
            UserError: where the job differs from the one that wrote it.
        """
        checkpoint.check_identity(self.identity)
        tensors = checkpoint.load()
        for name, module in self.modules.items():
            module.load_state_dict(tensors["modules"][name])
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.scheduler.load_state_dict(tensors["scheduler"])
        self.scaler.load_state_dict(tensors["scaler"])
        if self.ema:
            self.ema.load_state_dict(tensors["ema"])
        self.step = checkpoint.step
        self._checked = True

    def save(self, root: Path) -> Checkpoint:
        tensors = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
        }
        return save_checkpoint(root, self.step, self.identity, tensors, keep=self.h.checkpoints_total_limit)

    def train(self, checkpoints: Path, stop: threading.Event) -> None:
        """Runs all remaining steps; afterwards the modules hold the weights to be saved (EMA's, if there is one).

        Raises:
            StopRequested: when ``stop`` is set; the steps done are in a checkpoint.
            TrainingError: where the job learns nothing.
        """
        window = _Window()
        for _ in self.report.progress(range(self.step, self.schedule.steps), self.schedule.steps - self.step, "steps"):
            rate = self.scheduler.get_last_lr()[0]
            window.add(self._optimizer_step(rate))
            if self.step == 1 or self.step % self.h.logging_steps == 0 or self.step == self.schedule.steps:
                self._log(window, rate)
                window = _Window()
            last = self.step == self.schedule.steps
            if stop.is_set() and not last:
                saved = self.save(checkpoints)
                raise StopRequested(f"after step {self.step} of {self.schedule.steps}; saved in {saved.directory}")
            if self.schedule.save_every and self.step % self.schedule.save_every == 0 and not last:
                self.report.metrics(checkpoint=self.save(checkpoints).directory, step=self.step)
        if self.ema:
            self.ema.copy_to_parameters()

    def loss(self, batch: Batch) -> Loss:
        """The loss of one batch, with its graph."""
        latents = self.data.latents(batch)
        noise, timesteps = batch.noise.to(self.device), batch.timesteps.to(self.device)
        alphas = self.alphas_cumprod[timesteps]
        with self._autocast(), self.attention():
            prompts = self.data.prompts[batch.prompts.to(self.data.prompts.device)]
            hidden = encode(self.text_encoder, prompts) if self.plan.train_text_encoder else prompts
            prediction = self.unet(add_noise(latents, noise, alphas), timesteps, hidden, return_dict=False)[0]
        gamma = self.h.snr_gamma
        return dreambooth_loss(
            prediction,
            prediction_target(self.prediction_type, latents, noise, alphas),
            prior_loss_weight=self.h.prior_loss_weight if self.data.dice.classes else None,
            row_weights=min_snr_weights(self.prediction_type, alphas, gamma) if gamma else None,
        )

    def _optimizer_step(self, rate: float) -> Loss:
        parts = self.h.gradient_accumulation_steps
        losses: list[Loss] = []
        for part in range(parts):
            loss = self.loss(self.data.dice.batch(self.step * parts + part, self.h.train_batch_size))
            self.scaler.scale(loss.total / parts).backward()
            losses.append(loss.detach())
        self.scaler.unscale_(self.optimizer)
        if self.plan.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.plan.max_grad_norm)
        with self._self_check(losses, rate):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        if self.ema:
            self.ema.update()
        self.step += 1
        return Loss.mean(losses)

    @contextlib.contextmanager
    def _self_check(self, losses: list[Loss], rate: float) -> Iterator[None]:
        """Around the first update that should change weights: stops a job that would learn nothing."""
        if self._checked or rate == 0:
            yield
            return
        if not all(torch.isfinite(loss.total) for loss in losses):
            raise TrainingError(f"the loss of step {self.step + 1} is not finite; try mixed_precision=bf16 or no")
        finite = all(bool(torch.isfinite(p.grad).all()) for p in self.parameters if p.grad is not None)
        if not finite and (not self.scaler.is_enabled() or self._skipped == _MOST_SKIPPED):
            raise TrainingError(
                f"gradients are not finite at step {self.step + 1}; try attention=default or mixed_precision=no"
            )
        before = {name: _fingerprint(module) for name, module in self.modules.items()}
        yield
        if not finite:  # the loss scaler skipped this step and halves its scale
            self._skipped += 1
            return
        unchanged = [name for name, module in self.modules.items() if _fingerprint(module) == before[name]]
        if unchanged:
            raise TrainingError(
                f"the first update left the weights of {' and '.join(unchanged)} as they were; "
                "the learning rate may be too small, or the attention kernels return no gradients (attention=default)"
            )
        self._checked = True

    def _log(self, window: _Window, rate: float) -> None:
        seconds = time.monotonic() - window.started
        vram = torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else 0.0
        self.report.metrics(
            step=self.step,
            **window.means(),
            lr=rate,
            steps_per_s=window.count / seconds if seconds else None,
            vram_gb=vram,
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.plan.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, _DTYPES[self.plan.precision])


def make_optimizer(
    parameters: list[torch.nn.Parameter], plan: Plan, h: Hyperparameters, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), with 8-bit state (Dettmers et al. 2022) where the plan says so."""
    options: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (h.adam_beta1, h.adam_beta2),
        "eps": h.adam_epsilon,
        "weight_decay": h.adam_weight_decay,
    }
    if plan.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=plan.device == "cuda", **options)


def _fingerprint(module: torch.nn.Module) -> float:
    """A number that changes when any weight does."""
    return sum(p.detach().double().abs().sum().item() for p in module.parameters())


def _attention(unet: Any, plan: Plan, report: Reporter) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Sets the attention kernels; returns the context that the forward pass runs in."""
    if plan.attention == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except Exception as error:  # the package is missing, or was built for another torch
            report.warn(f"attention=xformers can't run here ({error}); SDPA serves instead")
    if plan.attention == "flash_attention":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        return lambda: sdpa_kernel(backends, set_priority=True)
    return contextlib.nullcontext
