"""Checks of all that can fail early, made before anything is downloaded, drawn or trained."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dreambooth_sm import storage
from dreambooth_sm.context import Context, upload_client
from dreambooth_sm.data.concepts import Subject, find_subjects, read_concepts
from dreambooth_sm.distributed import World
from dreambooth_sm.driver import find_cuda_build, find_host, find_mismatch, find_missing_kernels
from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.models import PretrainedModel, check_base
from dreambooth_sm.outputs import make_way
from dreambooth_sm.planning.cards import detect_card
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.sagemaker import Contract, localize
from dreambooth_sm.storage import S3Uri
from dreambooth_sm.trackers.needs import find_missing_packages, find_missing_settings, take_secrets
from dreambooth_sm.validation import SAMPLES

# Those that the SageMaker SDK adds for itself.
_PLATFORM_CHANNELS = ("code", "sm_drivers")


@dataclass(frozen=True)
class Checked:
    """The findings of the checks.

    Attributes:
        plan: for the card that is here.
        subjects: with their pictures and prompts.
        target: S3 location that the model goes to, on the main process; None to leave it to SageMaker.
    """

    plan: Plan
    subjects: tuple[Subject, ...]
    target: S3Uri | None


def preflight(job: Context) -> Checked:
    """Makes all checks that need no model, and names every problem at once.

    Raises:
        UserError: where the job can't run as it is.
    """
    job.h = localize(job.h, job.contract)
    with job.report.phase("check"):
        # Not collected: without the concepts there is little to check, and their file names places as well.
        h = job.h = localize(read_concepts(job.h), job.contract)
        problems = Problems()
        with problems.collected():
            plan = plan_for_card(h, job.contract, job.world)
        with problems.collected():
            subjects = find_subjects(h, job.report.warn)
        with problems.collected():
            if job.shared is None:  # a fleet's base model is looked at once
                check_base(h)
        with problems.collected():
            if job.shared is None:
                check_trackers(h, job.world)
        with problems.collected():
            check_output(h)
        with problems.collected():
            check_checkpoints(job.contract)
        with problems.collected():
            target = check_target(h) if job.world.is_main else None
        problems.raise_any()
    for name in find_unused_channels(job):
        job.report.warn(
            f"the channel {name} is not used: no hyperparameter names a path in it, such as "
            f"instance_data_dir=/opt/ml/input/data/{name}"
        )
    for line in plan.lines():
        job.report.say(f"plan: {line}")
    return Checked(plan, subjects, target)


def find_unused_channels(job: Context) -> list[str]:
    """Channels that SageMaker fetched and the job never looks into."""
    values = f"{job.asked.model_dump_json()} {job.h.model_dump_json()}"
    others = [name for name in job.contract.channels if name not in _PLATFORM_CHANNELS]
    return [name for name in sorted(others) if not re.search(rf"/input/data/{re.escape(name)}(?![\w.-])", values)]


def plan_for_card(h: Hyperparameters, contract: Contract, world: World) -> Plan:
    """The plan for the card that is here.

    Raises:
        UserError: where the job can't run on these resources.
    """
    card = dataclasses.replace(detect_card(), count=world.size)
    if h.use_cpu:
        return make_plan(h, card)
    if not card.is_cpu:
        if missing := find_missing_kernels(card.name, card.capability, find_cuda_build()):
            raise UserError(missing)
        return make_plan(h, card)
    host = find_host()
    if contract.has_gpu_instance:
        reason = find_mismatch(host, find_cuda_build()) or "its card may be broken; start the job again"
        raise UserError(f"the instance is a {contract.instance_type}, and torch sees no GPU: {reason}")
    plan = make_plan(h, card)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if host and not hidden and (mismatch := find_mismatch(host, find_cuda_build())):
        plan = dataclasses.replace(plan, notes=(*plan.notes, f"on the CPU: {mismatch}"))
    return plan


def check_output(h: Hyperparameters) -> None:
    """Raises UserError unless the trained model can be written where it is to go: hours later would be too late."""
    directory = Path(h.models_path)
    for field in ("pretrained_model_name_or_path", "pretrained_vae_name_or_path", "pretrained_parts_name_or_path"):
        base = getattr(h, field)
        replaced = (directory.resolve(), (directory / f"{h.model_name}.safetensors").resolve())
        if base and Path(base).resolve() in replaced:
            raise UserError(
                f"models_path: the trained model would replace {field}, {base}: set another directory or model_name"
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
        make_way(directory, SAMPLES)
    except OSError as error:
        raise UserError(f"models_path: {directory} can't be written to: {error.strerror}") from None


def check_trackers(h: Hyperparameters, world: World) -> None:
    """Raises UserError unless the trackers that are to be told have what they need."""
    if not (h.trackers and world.is_main):
        return
    problems = Problems()
    with problems.collected():
        take_secrets(h)
    problems.found += [*find_missing_settings(h, os.environ), *find_missing_packages(h, os.environ)]
    problems.raise_any()


def check_checkpoints(contract: Contract) -> None:
    """Raises UserError unless checkpoints can be written to the directory that SageMaker syncs, where there is one."""
    directory = contract.checkpoint_directory
    if not contract.keeps_checkpoints:
        return
    try:
        directory.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UserError(
            f"{directory}, which is for checkpoints, can't be written to: {error.strerror}; mount it writable, or "
            "leave it out"
        ) from None


def check_prompts(base: PretrainedModel, subjects: tuple[Subject, ...], h: Hyperparameters) -> None:
    """Raises UserError for prompts that are too long, before class images are made for them."""
    prompts = [prompt for s in subjects for prompt in (s.prompt, s.class_prompt, *s.prompts) if prompt]
    base.family.tokenize(base, prompts, max_tokens=h.max_token_length, pad=h.pad_tokens)


def check_target(h: Hyperparameters) -> S3Uri | None:
    """The S3 location that the model goes to, known to be writable; None to leave the model to SageMaker.

    The cache of class images has to be writable as well: later, its failures only cost time.
    """
    if h.class_cache is not None:
        storage.check_writable(S3Uri.parse(h.class_cache), h.s3_options)
    if h.upload_target is None:
        return None
    target = S3Uri.parse(h.upload_target)
    storage.check_writable(target, h.s3_options, client=upload_client(h, attempts=2, timeout=5))
    return target
