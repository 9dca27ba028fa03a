"""The job: its phases in order, each a function with typed input and output."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dreambooth_sm import storage
from dreambooth_sm.convert import DTYPES
from dreambooth_sm.data.buckets import class_shapes
from dreambooth_sm.data.class_cache import is_latents
from dreambooth_sm.data.concepts import Subject, find_subjects, read_concepts, shapes_of, shapes_of_class_pictures
from dreambooth_sm.data.conditioning import embed, tokenizers_in
from dreambooth_sm.data.masks import read_mask
from dreambooth_sm.data.pictures import View
from dreambooth_sm.data.prior import ClassImages
from dreambooth_sm.data.prior_outputs import Output, base_outputs
from dreambooth_sm.data.prompts import tokenize_for
from dreambooth_sm.data.training_set import (
    Dice,
    Latents,
    PictureSizes,
    PromptTable,
    Sample,
    SubjectWeights,
    mix,
    views_of,
)
from dreambooth_sm.distributed import World, join, leave
from dreambooth_sm.driver import find_build, find_host, find_mismatch, find_missing_kernels
from dreambooth_sm.errors import Problems, StopRequested, UserError
from dreambooth_sm.fidelity import load_encoders
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.training import DEFAULT_TRAIN_STEPS
from dreambooth_sm.live_samples import RemoteSamples, SyncedSamples
from dreambooth_sm.methods.full import FULL
from dreambooth_sm.models import BaseModel, check_base, load_base
from dreambooth_sm.objectives import Diffusion
from dreambooth_sm.plan import OUTPUTS_PER_IMAGE, Plan, detect_card, make_plan, smaller_plan
from dreambooth_sm.report import Reporter, format_metrics
from dreambooth_sm.results import REPORT_FILES, gather_facts, write_results
from dreambooth_sm.resume import (
    BASE,
    check_resumable,
    find_other_rates,
    fingerprint,
    first_that_fits,
    make_identity,
)
from dreambooth_sm.sagemaker import Contract
from dreambooth_sm.sampling import sampling_pipeline
from dreambooth_sm.selection import Examiner
from dreambooth_sm.space import Space
from dreambooth_sm.storage import S3Uri
from dreambooth_sm.stored.files import OutOfRange
from dreambooth_sm.training.checkpoint import Checkpoint, all_checkpoints, undamaged_checkpoints
from dreambooth_sm.training.loop import Schedule, Trainer, TrainingSet, make_schedule
from dreambooth_sm.training.remote_checkpoints import RemoteCheckpoints
from dreambooth_sm.validation import SAMPLES, Validator, take_over_pictures, validation_prompts

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def run(h: Hyperparameters, contract: Contract, *, report: Reporter, stop: threading.Event) -> Path | S3Uri:
    """Runs the whole job; with others, where several processes were started for it.

    Returns:
        where the trained pipeline lies: a directory, or an S3 location if one was asked for.

    Raises:
        UserError: bad input, before anything is downloaded where that is possible.
        StopRequested: ``stop`` was set; what was trained is in a checkpoint.
    """
    world = join()
    if not world.is_main:
        report = Reporter(open(os.devnull, "w"))  # noqa: PTH123, SIM115 - for as long as the process lives
    try:
        with contextlib.ExitStack() as background:
            return _run(h, contract, world, background, report=report, stop=stop)
    finally:
        leave()


def _run(
    h: Hyperparameters,
    contract: Contract,
    world: World,
    background: contextlib.ExitStack,
    *,
    report: Reporter,
    stop: threading.Event,
) -> Path | S3Uri:
    asked, h = h, localize(h, contract)
    with report.phase("check"):
        # Not collected: without the concepts there is little to check, and their file names places as well.
        h = localize(read_concepts(h), contract)
        problems = Problems()
        with problems.collected():
            plan = check(h, contract, world)
        with problems.collected():
            subjects = find_subjects(h, report.warn)
        with problems.collected():
            check_base(h)
        with problems.collected():
            check_output(h)
        with problems.collected():
            check_checkpoints(contract)
        with problems.collected():
            target = check_target(h) if world.is_main else None
        problems.raise_any()
    for line in plan.lines():
        report.say(f"plan: {line}")
    checkpoints = checkpoint_directory(h, contract)
    remote = remote_checkpoints(h, contract, target, world, report)
    found = find_checkpoints(h, checkpoints, remote, world, report)
    previous = next(found, None)
    seed = h.seed if h.seed is not None else (previous.identity["seed"] if previous else secrets.randbits(31))
    seed = world.first(seed)
    report.say(format_metrics(model_name=h.model_name))
    report.metrics(seed=seed, processes=world.size)
    identity = make_identity(h, asked, plan, subjects, seed, world)
    schedule = make_schedule(h, sum(len(s.pictures) for s in subjects), DEFAULT_TRAIN_STEPS, world.size)
    if previous:
        check_resumable(previous, identity, schedule)
    device = torch.device(plan.device)

    with report.phase("load_base"):
        # Host memory is short where cards are small: weights wait in the precision of their files, unless they are
        # drawn with as they are.
        on_host = torch.float32 if plan.device == "cpu" or plan.precision == "fp32" else None
        base = load_base(h, on_host)
        for remark in base.remarks:
            report.warn(remark)
        check_prompts(base, subjects, h)
        space = Space.needed(base, FULL.parameters(base, plan), h, plan, checkpoints)
        if warning := space.check(h.checkpoints_total_limit if h.save_steps else 1):
            report.warn(warning)
        identity[BASE] = fingerprint(base)
        previous = first_that_fits(previous, found, FULL.parameters(base, plan), report)
        if previous:
            check_resumable(previous, identity, schedule)
            if difference := find_other_rates(previous, h, schedule):
                report.warn(difference)
        # Before class images are made: encoders that can't be had end the job here. On the CPU: the card's memory is
        # planned for training.
        encoders = load_encoders(h.fidelity_encoders) if h.fidelity_encoders and world.is_main else None
    samples = Path(h.models_path) / SAMPLES
    if world.is_main:
        take_over_pictures(previous.pictures if previous else None, samples)
    if previous:
        report.go_on(previous.record, previous.step, samples)
    _stop_if_asked(stop, world)
    shown = Path(world.first(tempfile.mkdtemp(prefix="class-pictures-")))
    with report.phase("class_images"):
        subjects = make_class_images(base, subjects, h, plan, shown, report=report, stop=stop, world=world)
    validator = live = None
    if world.is_main and (prompts := validation_prompts(h, subjects)):
        live = live_samples(h, contract, target, background, report)
        with report.phase("validate_base"):
            validator = Validator(base, prompts, h, plan, samples, report)
            if live:
                live.send(report.samples.copy())
                validator.on_draw = live.send
            validator.draw(0)
        _free_memory()
    with report.phase("encode"):
        data = encode_training_set(base, subjects, h, plan, device=device, seed=seed)
    _stop_if_asked(stop, world)
    examiner = None
    if encoders:
        with report.phase("measure_base"):
            examiner = Examiner(base, subjects, encoders, h, plan, report)
    with report.phase("train"), remote or contextlib.nullcontext():
        on_save = remote.send if remote else None
        train(
            base,
            data,
            plan,
            h,
            schedule,
            identity,
            previous,
            checkpoints,
            on_save,
            keep_last=space.has_room_for_last,
            validator=validator,
            report=report,
            stop=stop,
            world=world,
        )
    del data
    _free_memory()
    if not world.is_main:
        return Path(h.models_path)
    if examiner:
        with report.phase("measure"):
            measure(examiner, h, schedule, identity, checkpoints)
    if validator:
        with report.phase("validate"):
            validator.draw(schedule.steps)
    with report.phase("save"), _with_checkpoint_named(checkpoints, identity, schedule.steps):
        directory = Path(h.models_path)
        written = save(base, h, shown, checkpoints)
        written |= {sample.path.relative_to(directory).as_posix() for sample in report.samples}
        for name in REPORT_FILES:
            make_way(directory, name)
        facts = gather_facts(base.name, subjects, h, plan, report, schedule.steps, directory)
        write_results(facts, subjects, directory)
        written |= set(REPORT_FILES)
        if checkpoints.is_relative_to(directory):  # the finished model stands for them
            discard_checkpoints(checkpoints, identity)
    if target is None:
        return directory
    with report.phase("upload"):
        background.close()  # pictures that still wait come with the model
        upload(directory, written, target, h, schedule.steps, contract, report)
        if remote:
            remote.clear()
    return target


def localize(h: Hyperparameters, contract: Contract) -> Hyperparameters:
    """Paths under ``/opt/ml`` as paths under the contract's base directory."""

    paths = h.names_where(lambda knob: knob.path)

    def move(values: dict[str, object]) -> dict[str, object]:
        return {k: contract.localize(v) for k, v in values.items() if k in paths and isinstance(v, str)}

    moved = move(h.model_dump(include=set(paths)))
    if h.inline_concepts:
        moved["concepts_list"] = tuple(c.model_copy(update=move(c.model_dump())) for c in h.inline_concepts)
    return h.model_copy(update=moved).fit_to_base()


def check(h: Hyperparameters, contract: Contract, world: World) -> Plan:
    """The plan for the card that is here.

    Raises:
        UserError: where the job can't run on these resources.
    """
    card = dataclasses.replace(detect_card(), count=world.size)
    if h.use_cpu:
        return make_plan(h, card)
    if not card.is_cpu:
        if missing := find_missing_kernels(card.name, card.capability, find_build()):
            raise UserError(missing)
        return make_plan(h, card)
    host = find_host()
    if contract.has_gpu_instance:
        reason = find_mismatch(host, find_build()) or "its card may be broken; start the job again"
        raise UserError(f"the instance is a {contract.instance_type}, and torch sees no GPU: {reason}")
    plan = make_plan(h, card)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if host and not hidden and (mismatch := find_mismatch(host, find_build())):
        plan = dataclasses.replace(plan, notes=(*plan.notes, f"on the CPU: {mismatch}"))
    return plan


def check_output(h: Hyperparameters) -> None:
    """Raises UserError unless the trained model can be written where it is to go: hours later would be too late."""
    directory = Path(h.models_path)
    for field in ("pretrained_model_name_or_path", "pretrained_vae_name_or_path"):
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


def check_checkpoints(contract: Contract) -> None:
    """Raises UserError unless checkpoints can be written to the directory that SageMaker syncs, where there is one."""
    directory = contract.checkpoint_directory
    if not directory.is_dir():
        return
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UserError(
            f"{directory}, which is for checkpoints, can't be written to: {error.strerror}; mount it writable, or "
            "leave it out"
        ) from None


def check_prompts(base: BaseModel, subjects: tuple[Subject, ...], h: Hyperparameters) -> None:
    """Raises UserError for prompts that are too long, before class images are made for them."""
    prompts = [prompt for s in subjects for prompt in (s.prompt, s.class_prompt, *s.prompts) if prompt]
    tokenize_for(tokenizers_in(base), prompts, max_tokens=h.max_token_length, pad=h.pad_tokens)


def check_target(h: Hyperparameters) -> S3Uri | None:
    """The S3 location that the model goes to, known to be writable; None to leave the model to SageMaker.

    The cache of class images has to be writable as well: later, its failures only cost time.
    """
    if h.class_cache is not None:
        storage.check_writable(S3Uri.parse(h.class_cache), h.s3_options)
    if h.upload_target is None:
        return None
    target = S3Uri.parse(h.upload_target)
    storage.check_writable(target, h.s3_options, client=s3_client(h, attempts=2, timeout=5))
    return target


def checkpoint_directory(h: Hyperparameters, contract: Contract) -> Path:
    """Where checkpoints outlive the container: the synced directory if the job has one, else the model directory,
    which SageMaker saves when a job is stopped."""
    synced = contract.checkpoint_directory
    return synced if synced.is_dir() else Path(h.models_path) / "checkpoints"


def remote_checkpoints(
    h: Hyperparameters, contract: Contract, target: S3Uri | None, world: World, report: Reporter
) -> RemoteCheckpoints | None:
    """Checkpoints beside the model in S3, unless SageMaker syncs them, or other hosts would need them as well."""
    if target is None or contract.checkpoint_directory.is_dir() or len(contract.hosts) > 1 or not world.is_main:
        return None
    return RemoteCheckpoints(target, h.s3_options, s3_client(h), report)


def live_samples(
    h: Hyperparameters,
    contract: Contract,
    target: S3Uri | None,
    background: contextlib.ExitStack,
    report: Reporter,
) -> RemoteSamples | SyncedSamples | None:
    """Where validation pictures go while the job runs: to the model's place in S3, or to the synced directory."""
    if target is not None:
        client = s3_client(h, attempts=2, timeout=10)
        return background.enter_context(RemoteSamples(target, h.s3_options, client, report))
    synced = contract.checkpoint_directory
    return SyncedSamples(synced) if synced.is_dir() else None


def find_checkpoints(
    h: Hyperparameters, checkpoints: Path, remote: RemoteCheckpoints | None, world: World, report: Reporter
) -> Iterator[Checkpoint]:
    """The checkpoints that the job may be resumed from, the newest first; none where it is to start again."""
    if h.resume_from_checkpoint == "no":
        return iter(())
    if remote:
        remote.fetch(checkpoints)
    world.first(None)  # the others wait for what was fetched
    return undamaged_checkpoints(checkpoints, report.warn)


def make_class_images(
    base: BaseModel,
    subjects: tuple[Subject, ...],
    h: Hyperparameters,
    plan: Plan,
    shown: Path,
    *,
    report: Reporter,
    stop: threading.Event,
    world: World,
) -> tuple[Subject, ...]:
    """Makes the class images that are missing, with the untrained base model, or finds those of earlier jobs.

    Args:
        shown: directory for pictures of some of them.
    """
    if h.prior == "output" or all(
        s.class_prompt is None or len(s.class_pictures) >= h.num_class_images for s in subjects
    ):
        return subjects
    images = ClassImages(
        sampling_pipeline(base, plan),
        batch_size=plan.sample_batch_size,
        guidance=h.sample_guidance_scale,
        remote=S3Uri.parse(h.class_cache) if h.class_cache else None,
        scratch=scratch_directory(h),
        shown=shown,
        options=h.s3_options,
        report=report,
        stop=stop,
        world=world,
    )
    completed: list[Subject] = []
    for subject, instances in zip(subjects, shapes_of(subjects, h), strict=True):
        wanted = max(h.num_class_images, len(set(instances)))  # each shape has batches, and needs one
        of_same_class = sum(len(s.class_pictures) for s in completed if s.class_prompt == subject.class_prompt)
        completed.append(images.complete(subject, class_shapes(instances, wanted), of_same_class))
    base.to("cpu")
    del images
    _free_memory()
    return tuple(completed)


def encode_training_set(
    base: BaseModel,
    subjects: tuple[Subject, ...],
    h: Hyperparameters,
    plan: Plan,
    *,
    device: torch.device,
    seed: int,
) -> TrainingSet:
    """Puts latents and prompts on the device, and takes the VAE and text encoder off it where they are done."""
    table = PromptTable(
        base.tokenizer, max_tokens=h.max_token_length, pad=h.pad_tokens, shuffle=h.shuffle_tags, seed=seed
    )
    shapes = shapes_of(subjects, h)
    instances = [
        Sample(path, table.rows(prompt), shape)
        for s, its in zip(subjects, shapes, strict=True)
        for path, prompt, shape in zip(s.pictures, s.prompts or [s.prompt] * len(s.pictures), its, strict=True)
    ]
    classes = [
        Sample(path, table.rows(s.class_prompt), shape)
        for s, its in zip(subjects, shapes, strict=True)
        if s.class_prompt
        for path, shape in zip(s.class_pictures, shapes_of_class_pictures(s, its), strict=True)
    ]
    # With fewer class pictures of the user's than shapes, some serve in more than one.
    missing = {sample.shape for sample in instances} - {sample.shape for sample in classes}
    own = [sample for sample in classes if not is_latents(sample.picture)]
    if classes:
        classes += [dataclasses.replace(own[0], shape=shape) for shape in sorted(missing)]
    pictures = [sample.picture for sample in (*instances, *classes)]
    trained_in = [sample.shape for sample in (*instances, *classes)]
    (empty,) = table.rows("") if h.caption_dropout else (0,)
    masks = [read_mask(sample.picture) for sample in instances] + [None] * len(classes)
    views = views_of(pictures, trained_in, masks, seed, random_crop=not h.center_crop, mirror=h.hflip)
    base.vae.to(device, torch.float32)
    latents = Latents(pictures, trained_in, views, base.vae, cached=plan.cache_latents)
    sizes = PictureSizes(pictures, trained_in, views) if base.is_xl else None
    make_dice = partial(
        Dice,
        views=len(views[0]),
        channels=base.unet.config.in_channels,
        latent_scale=base.latent_scale,
        timesteps=base.scheduler.config.num_train_timesteps,
        empty_prompt=empty,
        caption_dropout=h.caption_dropout,
    )
    if h.prior_preservation and h.prior == "output":
        dice = make_dice(instances, [], seed=mix(seed, len(instances)))
        for output in outputs_of_base(base, subjects, h, plan, dice, latents, sizes):
            instance = instances[output.instance]
            (subject,) = (s for s in subjects if instance.picture in s.pictures)
            prompt_rows = table.rows(str(subject.class_prompt))
            classes.append(Sample(instance.picture, prompt_rows, instance.shape, output.noise, output.timestep))
            latents.append(output.latents.to(device))
            if sizes:
                sizes.append(output.instance, output.view)
            masks.append(None)
            trained_in.append(instance.shape)
            views.append([View()])
    if plan.cache_latents:
        base.vae.to("cpu")
    if plan.train_text_encoder:
        prompts, pooled = table.ids().to(device), None
    else:
        for text_encoder in base.text_encoders:
            text_encoder.to(device, torch.float32)
        embeddings = table.embeddings(base)
        prompts, pooled = embeddings.states, embeddings.pooled
        for text_encoder in base.text_encoders:
            text_encoder.to("cpu")
    _free_memory()
    dice = make_dice(instances, classes, seed=seed)
    weights = None
    if h.background_weight is not None:
        weights = SubjectWeights(
            masks, trained_in, views, latent_scale=base.latent_scale, background=h.background_weight, device=device
        )
    return TrainingSet(dice, latents, prompts, weights, pooled, sizes)


def outputs_of_base(
    base: BaseModel,
    subjects: tuple[Subject, ...],
    h: Hyperparameters,
    plan: Plan,
    dice: Dice,
    latents: Latents,
    sizes: PictureSizes | None,
) -> list[Output]:
    """What the untrained base model says of the subjects' noised pictures under their class prompts."""
    pipeline = sampling_pipeline(base, plan)
    prompts = [str(subject.class_prompt) for subject in subjects for _ in subject.pictures]
    conditions = embed(pipeline, prompts, max_tokens=h.max_token_length, pad=h.pad_tokens)
    outputs = base_outputs(
        pipeline.unet,
        Diffusion.of(base.scheduler),
        dice,
        latents,
        lambda batch: dataclasses.replace(conditions.of(batch.samples), sizes=sizes(batch) if sizes else None),
        count=OUTPUTS_PER_IMAGE * h.num_class_images,
        batch_size=plan.sample_batch_size,
    )
    return list(outputs)


def train(
    base: BaseModel,
    data: TrainingSet,
    plan: Plan,
    h: Hyperparameters,
    schedule: Schedule,
    identity: dict[str, Any],
    previous: Checkpoint | None,
    checkpoints: Path,
    on_save: Callable[[Path], object] | None = None,
    *,
    keep_last: Callable[[], bool] = lambda: True,
    validator: Validator | None = None,
    report: Reporter,
    stop: threading.Event,
    world: World,
) -> None:
    """Trains ``base`` in place. Where the card runs out of memory all the same, goes on with the next smaller plan.

    Raises:
        UserError: where not even the smallest plan fits.
        StopRequested: ``stop`` was set; the steps done are in a checkpoint.
    """
    rescued: tuple[dict[str, Any], int] | None = None
    while True:
        trainer: Trainer | None = None
        try:
            device = torch.device(plan.device)
            trainer = Trainer(
                base, data, plan, h, schedule, device=device, identity=identity, report=report, world=world
            )
            trainer.on_save = on_save
            if rescued is not None:
                trainer.load_state(*rescued)
                rescued = None  # host memory is short where cards are small
            elif previous is not None:
                trainer.resume(previous)
                report.say(f"going on after step {previous.step}, from {previous.directory}")
            return trainer.train(checkpoints, stop, validator, keep_last)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        # Not inside the except clause: the exception's frames hold what has to be freed.
        smaller = smaller_plan(plan, h)
        if world.size > 1:
            raise UserError(f"out of memory on process {world.rank} ({reason}); set gradient_checkpointing=true")
        if smaller is None:
            raise UserError(f"the card has too little memory for the smallest plan there is: {reason}")
        if trainer is not None:
            rescued = (trainer.rescue(), trainer.step)
            trainer = None
        _free_memory()
        report.warn(f"out of memory ({reason}); going on after step {rescued[1] if rescued else 0} with a smaller plan")
        plan = smaller
        report.say(f"plan: {plan.lines()[0]}")


def measure(
    examiner: Examiner, h: Hyperparameters, schedule: Schedule, identity: dict[str, Any], checkpoints: Path
) -> None:
    """Says how well the model was trained; with ``select_best``, goes back to the best checkpoint before."""
    if h.select_best:
        own = [c for c in all_checkpoints(checkpoints) if c.identity == identity and c.step < schedule.steps]
        own = [c for c in own if c.is_undamaged()]
        candidate = examiner.choose(own, schedule.steps)
    else:
        candidate = examiner.examine(schedule.steps)
    examiner.say_verdict(candidate)


def scratch_directory(h: Hyperparameters) -> Path:
    """Where class images go that can't go elsewhere; beside the model, which has nothing in it before it is trained."""
    return Path(h.models_path).parent / "class_images"


def save(base: BaseModel, h: Hyperparameters, shown: Path, checkpoints: Path) -> set[str]:
    """Puts the trained model, in the format and precision that are asked for, into its directory.

    Args:
        shown: pictures of class images, which come with it.

    Returns:
        the names of the files that were written; what else lies in the directory is not the job's.

    Raises:
        UserError: where the weights are too large for the precision; the model is there in full precision then.
    """
    directory, too_large = Path(h.models_path), None
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
        fresh = Path(scratch) / "model"
        fresh.mkdir()
        try:
            export(base, h, fresh, DTYPES[h.export_precision])
        except OutOfRange as error:
            too_large = error
            shutil.rmtree(fresh)
            fresh.mkdir()
            export(base, h, fresh, None)
        for picture in sorted(shown.glob("*.png")):
            (fresh / SAMPLES).mkdir(exist_ok=True)
            shutil.copy2(picture, fresh / SAMPLES)
        written = {path.relative_to(fresh).as_posix() for path in fresh.rglob("*") if path.is_file()}
        for name in written:
            make_way(directory, name)
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).replace(directory / name)
    shutil.rmtree(shown, ignore_errors=True)
    if too_large:
        kept = f", and checkpoints in {checkpoints}" if all_checkpoints(checkpoints) else ""
        raise UserError(
            f"export_precision={h.export_precision} can't hold the trained model: {too_large}. If training made it "
            "worse, lower learning_rate; otherwise set export_precision to bf16 or fp32. What was trained is in "
            f"{directory}, in fp32{kept}"
        )
    return written


def export(base: BaseModel, h: Hyperparameters, directory: Path, dtype: torch.dtype | None) -> None:
    """Writes the model in the format that is asked for; ``dtype`` None leaves weights as they are."""
    if h.export != "single_file":
        base.save(directory, dtype)
    if h.export != "diffusers":
        base.save_single_file(
            directory / f"{h.model_name}.safetensors", dtype, resolution=h.resolution, trigger=h.instance_prompt
        )


def make_way(directory: Path, name: str) -> None:
    """Removes links on the way to a file of the job, which would otherwise be written to where they lead."""
    path = directory
    for segment in Path(name).parts:
        path /= segment
        if path.is_symlink():
            path.unlink()


def discard_checkpoints(root: Path, identity: dict[str, Any]) -> None:
    """Removes this job's checkpoints, and the directory if nothing else is in it."""
    own = [checkpoint.directory for checkpoint in all_checkpoints(root) if checkpoint.identity == identity]
    for directory in (*own, *root.glob(".partial-step-*"), *root.glob(".sending-step-*")):
        shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        root.rmdir()


def upload(
    directory: Path,
    written: set[str],
    target: S3Uri,
    h: Hyperparameters,
    step: int,
    contract: Contract,
    report: Reporter,
) -> None:
    """Sends the job's files to S3 and, once every object is verified, leaves SageMaker only a pointer to pack.

    Args:
        written: names of the files, relative to the directory; whatever else is in it stays, and stays here.
    """
    pointer = directory / "model_location.txt"
    pointer.unlink(missing_ok=True)  # of an earlier job in this directory
    manifest = storage.upload_directory(
        directory, target, h.s3_options, names=written, job=contract.job_name, step=step, client=s3_client(h)
    )
    report.metrics(uploaded=str(target), files=len(manifest.files), bytes=manifest.size)
    for name in written:
        (directory / name).unlink()
    folders = {folder for name in written for folder in Path(name).parents if folder != Path()}
    for folder in sorted(folders, reverse=True):
        with contextlib.suppress(OSError):  # something else is in it
            (directory / folder).rmdir()
    pointer.write_text(f"{target}\n")


@contextlib.contextmanager
def _with_checkpoint_named(checkpoints: Path, identity: dict[str, Any], step: int) -> Iterator[None]:
    """Adds to any error where what was trained is, if it is in a checkpoint of this job and step."""
    try:
        yield
    except Exception as error:
        for checkpoint in all_checkpoints(checkpoints):
            if checkpoint.identity == identity and checkpoint.step == step:
                error.add_note(f"what was trained is in {checkpoint.directory}; the same job is resumed from it")
        raise


def s3_client(h: Hyperparameters, **options: Any) -> S3Client:
    """A client of the server that the job uploads to."""
    return storage.s3_client(endpoint_url=h.s3_endpoint_url, addressing_style=h.s3_addressing_style, **options)


def _stop_if_asked(stop: threading.Event, world: World) -> None:
    if world.any(stop.is_set()):
        raise StopRequested("before training began; nothing had to be saved")


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
