"""The job: its phases in order, each a function with typed input and output."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dreambooth_sm import outputs
from dreambooth_sm.context import Context
from dreambooth_sm.data.assemble import encode_training_set
from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.data.prior import make_class_images
from dreambooth_sm.distributed import joined
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.live_samples import live_samples
from dreambooth_sm.loading import open_model
from dreambooth_sm.memory import free_memory
from dreambooth_sm.methods import Resettable
from dreambooth_sm.onlookers import Onlooker
from dreambooth_sm.preflight import Checked, check_prompts, preflight
from dreambooth_sm.report import Reporter
from dreambooth_sm.results import REPORT_FILES, gather_facts, write_results
from dreambooth_sm.resume import Start, find_start
from dreambooth_sm.sagemaker import Contract
from dreambooth_sm.selection import Examiner
from dreambooth_sm.shared import Opened
from dreambooth_sm.space import Space
from dreambooth_sm.storage import S3Uri
from dreambooth_sm.trackers.told import told_trackers
from dreambooth_sm.training.attention import planned_kernels
from dreambooth_sm.training.loop import TrainingSet
from dreambooth_sm.training.train import TrainedModel, train
from dreambooth_sm.validation import SAMPLES, Validator, take_over_pictures, validation_prompts


def run(h: Hyperparameters, contract: Contract, *, report: Reporter, stop: threading.Event) -> Path | S3Uri:
    """Runs the whole job; with others, where several processes were started for it.

    Returns:
        where the trained pipeline lies: a directory, or an S3 location if one was asked for.

    Raises:
        UserError: bad input, before anything is downloaded where that is possible.
        StopRequested: ``stop`` was set; what was trained is in a checkpoint.
    """
    with joined() as world, contextlib.ExitStack() as background:
        if not world.is_main:
            report = Reporter(open(os.devnull, "w"))  # noqa: PTH123, SIM115 - for as long as the process lives
        job = Context(h, h, contract, world, report, stop, background)
        checked = preflight(job)
        made = make(job, checked)
        return job.directory if made is None or checked.target is None else send(job, checked.target, made)


@dataclass(frozen=True)
class Made:
    """A trained model in its directory.

    Attributes:
        start: where its training began.
        written: names of its files.
    """

    start: Start
    written: set[str]


def make(job: Context, checked: Checked) -> Made | None:
    """Trains the model and writes it into its directory; None on processes that only help with it."""
    job.report.listeners.clear()  # of a first try, in a fleet
    start = find_start(job, checked.plan, checked.subjects, checked.target)
    job.stop_if_asked()
    loaded = load(job, checked, start)
    job.stop_if_asked()
    with told_trackers(job, checked.plan, start.step), planned_kernels(checked.plan):
        prior = draw_prior(job, checked, loaded)
        validator = draw_before(job, checked, loaded, prior)
        data = encode(job, checked, loaded, prior, start)
        job.stop_if_asked()
        examiner = measure_before(job, checked, loaded, prior)
        trained = teach(job, checked, start, loaded, data, [each for each in (validator, examiner) if each])
        del data
        free_memory()
        if not job.world.is_main:
            return None
        measure_after(job, start, examiner)
        draw_after(job, start, validator)
        return Made(start, save(job, checked, start, trained, prior))


@dataclass(frozen=True)
class Loaded(Opened):
    """The base model, loaded, and all that belongs to its training.

    Attributes:
        space: what the job will write, and where to.
    """

    space: Space


def load(job: Context, checked: Checked, start: Start) -> Loaded:
    """Loads the base model, and looks at everything that could not be looked at without it."""
    h, plan, report = job.h, checked.plan, job.report
    with report.phase("load_base"):
        opened = open_model(job, plan, start.seed)
        trainable = opened.trainable
        check_prompts(trainable.model, checked.subjects, h)
        space = Space.needed(trainable, h, plan, start.checkpoints)
        if warning := space.check(h.checkpoints_total_limit if h.save_steps else 1):
            report.warn(warning)
        start.fit_to(opened.digests, trainable.parameters, h, report)
    samples, previous = job.directory / SAMPLES, start.previous
    if previous:
        if job.world.is_main:
            take_over_pictures(previous.pictures, samples)
        report.resume(previous.record, previous.step, samples)
    return Loaded(**vars(opened), space=space)


@dataclass(frozen=True)
class Prior:
    """The class pictures that keep the model from forgetting the class.

    Attributes:
        subjects: with their class pictures.
        shown: directory with some that were made, for people to look at.
    """

    subjects: tuple[Subject, ...]
    shown: Path


def draw_prior(job: Context, checked: Checked, loaded: Loaded) -> Prior:
    """Makes the class images that are missing, with the untrained base model, or finds those of earlier jobs."""
    scratch = tempfile.TemporaryDirectory(prefix="class-pictures-", ignore_cleanup_errors=True)
    shown = Path(job.world.first(job.background.enter_context(scratch)))
    with job.report.phase("class_images"):
        subjects = make_class_images(
            loaded.base,
            loaded.digests,
            checked.subjects,
            job.h,
            checked.plan,
            shown,
            report=job.report,
            stop=job.stop,
            world=job.world,
            scratch=job.shared.scratch if job.shared else None,
        )
    return Prior(subjects, shown)


def draw_before(job: Context, checked: Checked, loaded: Loaded, prior: Prior) -> Validator | None:
    """Draws the validation prompts with the untrained model; None where there are none."""
    prompts = validation_prompts(job.h, prior.subjects)
    if not (job.world.is_main and prompts):
        return None
    live = live_samples(job.h, job.contract, checked.target, job.background, job.report)
    with job.report.phase("validate_base"):
        validator = Validator(loaded.trainable, prompts, job.h, checked.plan, job.directory / SAMPLES, job.report)
        if live:
            live.drew(job.report.samples.copy())
            job.report.listeners.append(live)
        validator.draw(0)
    free_memory()
    return validator


def encode(job: Context, checked: Checked, loaded: Loaded, prior: Prior, start: Start) -> TrainingSet:
    """Puts everything that the steps read on the device."""
    with job.report.phase("encode"):
        device = torch.device(checked.plan.device)
        return encode_training_set(loaded.reader, prior.subjects, job.h, checked.plan, device=device, seed=start.seed)


def measure_before(job: Context, checked: Checked, loaded: Loaded, prior: Prior) -> Examiner | None:
    """Measures the untrained model; None where nothing is measured."""
    if loaded.encoders is None:
        return None
    with job.report.phase("measure_base"):
        return Examiner(loaded.trainable, prior.subjects, loaded.encoders, job.h, checked.plan, job.report)


def teach(
    job: Context, checked: Checked, start: Start, loaded: Loaded, data: TrainingSet, onlookers: Sequence[Onlooker]
) -> TrainedModel:
    """Trains the model in place."""
    with job.report.phase("train"), start.remote or contextlib.nullcontext():
        return train(
            loaded.trainable,
            data,
            checked.plan,
            job.h,
            start.schedule,
            start.identity,
            start.previous,
            start.checkpoints,
            start.remote.send if start.remote else None,
            keep_last=loaded.space.has_room_for_last,
            leaves_no_checkpoint=leaves_no_checkpoint(job, start),
            onlookers=onlookers,
            report=job.report,
            stop=job.stop,
            world=job.world,
            bench=job.shared.bench if job.shared and isinstance(loaded.trainable, Resettable) else None,
        )


def measure_after(job: Context, start: Start, examiner: Examiner | None) -> None:
    """Says how well the model was trained; with ``select_best``, goes back to the best checkpoint before."""
    if examiner:
        with job.report.phase("measure"):
            examiner.conclude(start.schedule.steps, start.identity, start.checkpoints)


def draw_after(job: Context, start: Start, validator: Validator | None) -> None:
    """Draws the validation prompts with the trained model."""
    if validator:
        with job.report.phase("validate"):
            validator.draw(start.schedule.steps)


def save(job: Context, checked: Checked, start: Start, trained: TrainedModel, prior: Prior) -> set[str]:
    """Writes model and report; the names of their files."""
    directory, steps, report = job.directory, start.schedule.steps, job.report
    with report.phase("save"), outputs.with_checkpoint_named(start.checkpoints, start.identity, steps):
        written = outputs.save(trained, job.h, prior.shown, start.checkpoints)
        written |= {sample.path.relative_to(directory).as_posix() for sample in report.samples}
        for name in REPORT_FILES:
            outputs.make_way(directory, name)
        facts = gather_facts(trained.base.name, prior.subjects, job.h, checked.plan, report, steps, directory)
        write_results(facts, prior.subjects, directory)
        report.finish(facts, directory)
        if leaves_no_checkpoint(job, start):
            outputs.discard_checkpoints(start.checkpoints, start.identity)
    return written | set(REPORT_FILES)


def leaves_no_checkpoint(job: Context, start: Start) -> bool:
    """Whether checkpoints are removed once the model is written: where it stands for them, and those of a trial, which
    would be brought to all trials after it."""
    return start.checkpoints.is_relative_to(job.directory) or job.contract.is_trial


def send(job: Context, target: S3Uri, made: Made) -> S3Uri:
    """Uploads what was written."""
    with job.report.phase("upload"):
        job.background.close()  # pictures that still wait come with the model
        steps = made.start.schedule.steps
        outputs.upload(job.directory, made.written, target, job.h, steps, job.contract, job.report)
        if made.start.remote:
            made.start.remote.clear()
    return target
