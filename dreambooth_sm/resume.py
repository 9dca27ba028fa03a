"""Whether a job may be resumed from a checkpoint: it has to be the same job, as far as the weights can tell.

Hyperparameters count unless their own declaration says otherwise (``resume="free"``). Files count by their content:
pictures, masks, captions, the base model's weights. What the card decides counts as it was decided.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreambooth_sm.context import Context, upload_client
from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.data.masks import read_mask
from dreambooth_sm.distributed import World
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.length import length_of
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.report import Reporter, format_metrics
from dreambooth_sm.sagemaker import Contract
from dreambooth_sm.storage import S3Uri
from dreambooth_sm.stored.files import Stored, workers
from dreambooth_sm.training.checkpoint import Checkpoint, all_checkpoints, undamaged_checkpoints
from dreambooth_sm.training.remote_checkpoints import RemoteCheckpoints
from dreambooth_sm.training.schedule import Schedule, make_rate, make_schedule

# Known only once the base model is loaded.
BASE_MODEL_KEY = "base_model"
# What of the noise scheduler's settings training depends on.
NOISE_SETTINGS = ("prediction_type", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
# Values of each tensor that are compared: no two models that anybody has share them.
_VALUES = 64


@dataclass
class Start:
    """The point where a job begins, and what it shares with those that it is resumed from.

    Attributes:
        seed: of everything random.
        identity: see :func:`make_identity`; :data:`BASE_MODEL_KEY` joins it when the model is loaded.
        schedule: how long it trains.
        checkpoints: where they are written.
        remote: takes them to S3 as well; None where nobody has to.
        previous: checkpoint that it is resumed from; None where it starts from the base model.
    """

    seed: int
    identity: dict[str, Any]
    schedule: Schedule
    checkpoints: Path
    remote: RemoteCheckpoints | None
    previous: Checkpoint | None
    _older: Iterator[Checkpoint]

    @property
    def step(self) -> int:
        """Optimizer steps that were taken before."""
        return self.previous.step if self.previous else 0

    def fit_to(
        self,
        digests: Mapping[str, str],
        parameters: Mapping[str, torch.nn.Parameter],
        h: Hyperparameters,
        report: Reporter,
    ) -> None:
        """Looks whether the checkpoint is one of this model, now that it is loaded; an older one may be.

        Args:
            digests: of the model, see :func:`fingerprint`.

        Raises:
            UserError: where it is of another job.
        """
        self.identity[BASE_MODEL_KEY] = dict(digests)
        self.previous = first_that_fits(self.previous, self._older, parameters, report)
        if self.previous:
            check_resumable(self.previous, self.identity, self.schedule)
            if names := self.previous.not_comparable(self.identity):
                report.warn(
                    f"the checkpoint {self.previous.directory} is of an earlier version; whether its job had the same "
                    f"{', '.join(names)} can't be told"
                )
            if difference := find_other_rates(self.previous, h, self.schedule):
                report.warn(difference)


def find_start(job: Context, plan: Plan, subjects: tuple[Subject, ...], target: S3Uri | None) -> Start:
    """The newest checkpoint that the job may be resumed from, or its beginning.

    Raises:
        UserError: where the checkpoint is of another job.
    """
    h, world = job.h, job.world
    checkpoints = checkpoint_directory(h, job.contract)
    identity = make_identity(h, job.asked, plan, subjects, h.seed, world)

    def owns(checkpoint: Checkpoint) -> bool:
        open_yet = {"seed"} if h.seed is None else set()
        return checkpoint.belongs_to(identity, but=open_yet | ({BASE_MODEL_KEY} - identity.keys()))

    remote = remote_checkpoints(h, job.contract, target, world, owns, job.report)
    found = find_checkpoints(h, checkpoints, remote, world, owns, job.report)
    previous = next(found, None)
    drawn = previous.identity.get("seed") if previous else None  # none is known of another format's
    seed = world.first(next(seed for seed in (h.seed, drawn, secrets.randbits(31)) if seed is not None))
    job.report.say(format_metrics(model_name=h.model_name))
    identity["seed"] = seed
    length = length_of(h, sum(len(s.pictures) for s in subjects), world.size)
    job.report.metrics(seed=seed, processes=world.size, steps=length.steps)
    if length.note:
        job.report.say(length.note)
    schedule = make_schedule(h, length)
    if previous:
        check_resumable(previous, identity, schedule)
    return Start(seed, identity, schedule, checkpoints, remote, previous, found)


def make_identity(
    h: Hyperparameters,
    asked: Hyperparameters,
    plan: Plan,
    subjects: tuple[Subject, ...],
    seed: int | None,
    world: World,
) -> dict[str, Any]:
    """Describes what a job shares with the one that it is resumed from, as JSON; without :data:`BASE_MODEL_KEY`.

    Args:
        asked: the hyperparameters before paths were moved to where this machine has them.
        seed: None where it is not known yet.
    """
    same = h.names_where(lambda knob: knob.resume == "same")
    places = h.names_where(lambda knob: knob.resume == "same" and knob.path)
    values = h.model_dump(include=set(same), mode="json") | asked.model_dump(include=set(places))
    decided = {
        "seed": seed,
        "processes": world.size,
        "aspect_ratio_buckets": h.buckets,
        "with_prior_preservation": h.prior_preservation,
        "train_text_encoder": plan.train_text_encoder,
        "use_ema": plan.use_ema,
        "mixed_precision": plan.precision,
        "weights": plan.weights,
        "optimizer": f"{plan.optimizer} {plan.state_bits} bits",
        "use_8bit_adam": plan.optimizer == "adamw8bit",  # checkpoints have it from when it was a knob of its own
        "max_grad_norm": plan.max_grad_norm,
    }
    contents: dict[str, Any] = {
        "pictures": _digests(path for subject in subjects for path in subject.pictures),
        "class_pictures": _digests(path for subject in subjects for path in subject.class_pictures),
    }
    if h.concepts_list is not None:
        contents["concepts"] = [[subject.prompt, subject.class_prompt] for subject in subjects]
    captions = [
        (path, prompt)
        for subject in subjects
        if len(set(subject.prompts)) > 1
        for path, prompt in zip(subject.pictures, subject.prompts, strict=True)
    ]
    contents["captions"] = dict(zip(_names(path for path, _ in captions), (text for _, text in captions), strict=True))
    identity: dict[str, Any] = json.loads(json.dumps(values | decided | contents))
    return identity


def _names(paths: Iterable[Path]) -> list[str]:
    """The paths from the folder on that they have in common."""
    found = list(paths)
    if not found:
        return []
    top = os.path.commonpath([path.parent for path in found])
    return [str(path.relative_to(top)) for path in found]


def _digests(paths: Iterable[Path]) -> dict[str, str]:
    """Names to digests of the pictures' files and of their masks."""
    found = list(paths)
    return dict(zip(_names(found), map(_digest, found), strict=True))


def _digest(picture: Path) -> str:
    digest = hashlib.blake2b(picture.read_bytes(), digest_size=8)
    if mask := read_mask(picture):
        digest.update(mask.tobytes())
    return digest.hexdigest()


def fingerprint(base: PretrainedModel) -> dict[str, str]:
    """A digest of each part of a base model: of some values of each tensor, and of what else training depends on."""
    digests = {name: digest_of_weights(base.weights(name)) for name in base.modules}
    vocabulary = sorted(base.tokenizer.get_vocab().items())
    noise = {name: base.scheduler.config.get(name) for name in NOISE_SETTINGS}
    return digests | {"tokenizer": _digest_of(vocabulary), "scheduler": _digest_of(noise)}


def digest_of_weights(weights: Mapping[str, Stored]) -> str:
    def some(weight: Stored) -> list[float]:
        values: list[float] = weight.sample(max(1, weight.numel // _VALUES)).double().tolist()
        return values

    with workers() as pool:  # which reads several at a time
        values = pool.map(some, weights.values())
        return _digest_of([[name, list(weights[name].shape), its] for name, its in zip(weights, values, strict=True)])


def _digest_of(values: Any) -> str:
    return hashlib.blake2b(json.dumps(values, default=str).encode(), digest_size=8).hexdigest()


def check_resumable(checkpoint: Checkpoint, identity: dict[str, Any], schedule: Schedule) -> None:
    """Raises UserError unless the job can be resumed from ``checkpoint``.

    Args:
        identity: of the job; without :data:`BASE_MODEL_KEY` where that is not known yet.
    """
    checkpoint.check_identity({BASE_MODEL_KEY: checkpoint.identity.get(BASE_MODEL_KEY)} | identity)
    if checkpoint.step > schedule.steps:
        raise UserError(
            f"the checkpoint {checkpoint.directory} has taken {checkpoint.step} steps, and the job is to take "
            f"{schedule.steps}; set max_train_steps={checkpoint.step} or more, or resume_from_checkpoint=no to start "
            "again"
        )


def find_other_rates(checkpoint: Checkpoint, h: Hyperparameters, schedule: Schedule) -> str | None:
    """In words, that the steps of ``checkpoint`` had other learning rates than this schedule gives them; None where
    they had the same."""
    rate = make_rate(h, schedule)
    for row in checkpoint.record.get("steps", []):
        then, now = row.get("lr"), rate(row["step"] - 1)
        if then is not None and abs(then - now) > 1e-6 * schedule.learning_rate:
            return (
                f"the checkpoint's job had another number of steps: lr_scheduler={h.lr_scheduler} gave step "
                f"{row['step']} the learning rate {then:.4g}, and over {schedule.steps} steps it gives {now:.4g}; the "
                f"steps after {checkpoint.step} have the learning rates of {schedule.steps} steps"
            )
    return None


def first_that_fits(
    checkpoint: Checkpoint | None,
    older: Iterator[Checkpoint],
    parameters: Mapping[str, torch.nn.Parameter],
    report: Reporter,
) -> Checkpoint | None:
    """``checkpoint``, or the newest of ``older`` whose tensors are those of the parameters that are trained, with a
    line for each other."""
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    while checkpoint is not None:
        misfit = checkpoint.find_misfit(shapes)
        if misfit is None:
            return checkpoint
        report.warn(f"the checkpoint {checkpoint.directory} is passed over: {misfit}")
        checkpoint = next(older, None)
    return None


def checkpoint_directory(h: Hyperparameters, contract: Contract) -> Path:
    """Returns where checkpoints outlive the container: the synced directory if the job has one, else the model
    directory, which SageMaker saves when a job is stopped."""
    synced = contract.checkpoint_directory
    return synced if contract.keeps_checkpoints else Path(h.models_path) / "checkpoints"


def remote_checkpoints(
    h: Hyperparameters,
    contract: Contract,
    target: S3Uri | None,
    world: World,
    owns: Callable[[Checkpoint], bool],
    report: Reporter,
) -> RemoteCheckpoints | None:
    """Checkpoints beside the model in S3, unless SageMaker syncs them, or other hosts would need them as well."""
    if target is None or contract.keeps_checkpoints or len(contract.hosts) > 1 or not world.is_main:
        return None
    return RemoteCheckpoints(target, h.s3_options, upload_client(h), report, owns)


def find_checkpoints(
    h: Hyperparameters,
    checkpoints: Path,
    remote: RemoteCheckpoints | None,
    world: World,
    owns: Callable[[Checkpoint], bool],
    report: Reporter,
) -> Iterator[Checkpoint]:
    """The checkpoints that the job may be resumed from, the newest first; none where it is to start again.

    Args:
        owns: whether a checkpoint is this job's. Where none is, those of others are found, for the job to be refused.
    """
    starts_again = h.resume_from_checkpoint == "no"
    if remote and not starts_again:
        remote.fetch(checkpoints)
    world.first(None)  # the others wait for what was fetched
    whole = all_checkpoints(checkpoints)
    others = [checkpoint.directory.name for checkpoint in whole if not owns(checkpoint)]
    if others and (starts_again or len(others) < len(whole)):
        report.warn(f"checkpoints in {checkpoints} that are not of this job stay: {', '.join(others)}")
    return iter(()) if starts_again else undamaged_checkpoints(checkpoints, report.warn, owns)
