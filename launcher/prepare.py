"""From options to an order: a job that has been described, and checked as far as it can be before it starts."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from dreambooth_sm import toybox
from dreambooth_sm.data.captions import read_dataset_info
from dreambooth_sm.data.check import ClassFindings, Findings, check_class_folder, check_folder, printable
from dreambooth_sm.data.folder import list_pictures
from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.families import find_family
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.printing import redact
from dreambooth_sm.storage import S3Options, S3Uri
from launcher.aws.account import Account
from launcher.aws.clients import Clients
from launcher.aws.lookup import MANIFEST_FILE, Listed, Lookup, pictures_in, s3_text
from launcher.channels import MANIFEST, PREFIX, SINGLE_FILES, Channel
from launcher.estimates import Estimate, choose_instance, estimate_on
from launcher.instances import INSTANCES, find_instance
from launcher.local.program import CONTAINER
from launcher.options import Images, split_options
from launcher.resources import Resources
from launcher.staging import Files, all_files, digest, lay_out_files, picture_files, stage
from launcher.training_request import (
    CHANNELS,
    CLASS_IMAGES_CHANNEL,
    CONCEPTS_FILE,
    CONFIG_CHANNEL,
    IMAGES_CHANNEL,
    MODEL_CHANNEL,
    find_secrets,
    move_long_values,
    refused_resources,
    training_job,
    uploads_by_itself,
)

LOCAL = "local"
ON_THIS_MACHINE = (LOCAL, CONTAINER)
# What an estimate takes for granted where the pictures are not on this machine.
_USUAL_PICTURES = 5
# What a request holds where there is no account to ask, or where the account had no answer.
_STANDINS = {"role": "arn:aws:iam::000000000000:role/unknown", "image_uri": "unknown", "bucket": "unknown"}


@dataclass(frozen=True)
class Order:
    """A job that has been checked and has only to be sent.

    Attributes:
        request: for ``create_training_job``.
        files: what has to be in S3 before, by its place there.
        options: how they are written there.
        warnings: what is odd about the pictures, and what could not be checked.
        new_bucket: that has to be made before, if any.
    """

    request: dict[str, Any]
    estimate: Estimate
    files: Mapping[S3Uri, Files]
    options: S3Options
    warnings: tuple[str, ...] = ()
    new_bucket: str | None = None

    def lines(self) -> list[str]:
        """What will be done, for people."""
        lines = [f"job: {self.request['TrainingJobName']}", *self.estimate.lines()]
        if self.new_bucket:
            lines.append(f"bucket: {self.new_bucket} is missing; a job that starts makes it")
        lines += [f"files: {len(files)} for {place}" for place, files in self.files.items()]
        return [*lines, *(f"warning: {warning}" for warning in self.warnings)]

    def stage(self, account: Account, say: Callable[[str], None]) -> None:
        """Makes a bucket that is missing, and sends the files that are not in S3 yet."""
        if bucket := account.make_bucket():
            say(f"bucket: made {bucket}")
        for place, files in self.files.items():
            sent = stage(files, place, account.clients("s3"), self.options)
            say(f"files: {len(files)} {'sent to' if sent else 'already in'} {place}")


@dataclass
class Draft:
    """What is known of a job while it is being described: as much as could be read of its options.

    Attributes:
        sources: channels to what they hold in S3, or to files of this machine.
        pictures: how many there are of the subject.
        problems, warnings: what was found so far.
    """

    hyperparameters: Hyperparameters | None = None
    resources: Resources = field(default_factory=Resources)
    sources: dict[str, Channel | Listed | Files] = field(default_factory=dict)
    pictures: int = _USUAL_PICTURES
    problems: Problems = field(default_factory=Problems)
    warnings: list[str] = field(default_factory=list)

    @property
    def writing(self) -> S3Options:
        """How files for the job are sent: as the job itself writes, with the key for its model."""
        options = self.hyperparameters.s3_options if self.hyperparameters else S3Options()
        if options.kms_key is None and options.encryption in (None, "aws:kms", "aws:kms:dsse"):
            return replace(options, kms_key=self.resources.kms)
        return options

    def raise_any(self) -> None:
        """Raises UserError with everything that was found, without secrets."""
        self.problems.found = [redact(problem) for problem in self.problems.found]
        self.problems.raise_any()


def read_local(options: Mapping[str, Any]) -> Draft:
    """What a job of this machine needs, checked.

    Raises:
        UserError: with everything that was found.
    """
    draft = _read(options, Lookup(lambda: Clients()("s3")))
    resources, fitting = draft.resources, {"instance_type", "output"}
    if resources.instance_type == CONTAINER:
        fitting.add("image_uri")
        if resources.image_uri is None:
            draft.problems.found.append("image_uri is missing; name the image that Docker has to run")
    draft.problems.found += [
        f"{name} is for jobs on SageMaker; leave it out with instance_type={resources.instance_type!r}"
        for name in sorted(resources.model_fields_set - fitting)
    ]
    draft.raise_any()
    return draft


def describe(
    options: Mapping[str, Any],
    account: Account | None,
    *,
    thorough: bool = True,
    directory: str | Path | None = None,
) -> Order:
    """Checks everything that can be checked, and describes the job.

    Args:
        account: where to look for what was not given; None: nowhere.
        thorough: ask the account as well whether the job could start.
        directory: of a local job, which this is not.

    Raises:
        UserError: with everything that was found.
    """
    draft = _read(options, _lookup(account, thorough=thorough))
    if directory is not None:
        draft.problems.found.append("directory is for local jobs; leave it out, or set instance_type='local'")
    chosen = _choose_instance(draft)
    h, resources = draft.hyperparameters, draft.resources
    if chosen is not None:
        resources = resources.model_copy(update={"instance_type": chosen.instance.name})
    if resources.instance_type in INSTANCES or chosen is not None:
        resources = _complete(resources, draft, account)
        if account is not None and thorough:
            _check_account(account, resources, draft)
    if h is None or chosen is None:
        # What is wrong with the rest of the request is worth knowing at once as well.
        known = {"name": "unknown", **_STANDINS}
        given = {name: text for name, text in known.items() if not getattr(resources, name)}
        if resources.role and not resources.role.startswith("arn:"):
            given["role"] = _STANDINS["role"]
        if resources.instance_type == "auto":
            given["instance_type"] = next(iter(INSTANCES))
        whole = resources.model_copy(update=given)
        draft.problems.found += refused_resources(whole, {IMAGES_CHANNEL: whole.workspace})
        draft.raise_any()
    assert h is not None
    assert chosen is not None
    h, concepts = move_long_values(h)
    if concepts is not None:
        draft.sources[CONFIG_CHANNEL] = {CONCEPTS_FILE: concepts.encode()}
    channels: dict[str, Channel] = {}
    files: dict[S3Uri, Files] = {}
    for name, source in draft.sources.items():
        if isinstance(source, Channel):
            channels[name] = source
            continue
        sent = source.files if isinstance(source, Listed) else source
        if odd := [file for file in sent if not _is_utf8(file)]:
            draft.problems.found += [
                f"the name of {printable(file)} is not UTF-8, as names in S3 are; rename it" for file in odd
            ]
            continue
        # A digest reads everything, gigabytes of a base model perhaps: not for an estimate.
        place = resources.workspace / name / (digest(sent) if account else "unsent")
        files[place] = sent
        channels[name] = Channel(place / MANIFEST_FILE, MANIFEST) if isinstance(source, Listed) else Channel(place)
    request: dict[str, Any] = {}
    with draft.problems.collected():
        request = training_job(h, resources, channels or {IMAGES_CHANNEL: Channel(resources.workspace / "unknown")})
    draft.problems.found += find_secrets(request, os.environ)
    draft.raise_any()
    warnings = (*draft.warnings, *(account.warnings if account else ()))
    return Order(request, chosen, files, draft.writing, warnings, account.missing_bucket if account else None)


def _lookup(account: Account | None, *, thorough: bool) -> Lookup:
    if account is None:
        return Lookup()
    clients = account.clients
    return Lookup(lambda: clients("s3")) if thorough else Lookup(clients.for_a_look, strict=False)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_account(account: Account, resources: Resources, draft: Draft) -> None:
    """Whether the job could start, where everything that it needs was found."""
    if any(getattr(resources, name) == standin for name, standin in _STANDINS.items()):
        return
    with draft.problems.collected():
        account.check(resources, draft.writing)


def _read(options: Mapping[str, Any], look: Lookup) -> Draft:
    """Reads options as far as they can be read, and looks at what they name in S3."""
    draft = Draft()
    data, given, values = split_options(options, draft.problems)
    if "instance_data_dir" in values:
        draft.problems.found.append("instance_data_dir: the pictures are `images`; leave instance_data_dir out")
    draft.resources = Resources.read(given, draft.problems)
    if (output := draft.resources.output) is not None:
        try:
            S3Uri.parse(output)
        except UserError as error:
            draft.problems.found += [f"output: {problem}" for problem in error.problems]
            draft.resources = draft.resources.model_copy(update={"output": None})
        else:
            left_to_sagemaker = values.get("output_mode") in ("uncompressed", "archive")
            if draft.resources.instance_type in ON_THIS_MACHINE:
                values = {"manual_upload_model_path": output, **values}
            elif uploads_by_itself(draft.resources) and not left_to_sagemaker:
                kms = {"s3_kms_key_id": draft.resources.kms} if draft.resources.kms is not None else {}
                values = {"manual_upload_model_path": output, **kms, **values}
    for name, channel in (("images", IMAGES_CHANNEL), ("class_images", CLASS_IMAGES_CHANNEL)):
        if name in data:
            with draft.problems.collected():
                draft.sources[channel] = _find_pictures(name, data[name], look)
                directory = "instance_data_dir" if name == "images" else "class_data_dir"
                values[directory] = f"{CHANNELS}/{channel}"
    if "base_model" in data:
        with draft.problems.collected():
            source, values["pretrained_model_name_or_path"] = _read_base_model(data["base_model"], look)
            if source is not None:
                draft.sources[MODEL_CHANNEL] = source
                if find_family(str(Path(data["base_model"]).expanduser())) == "sdxl":
                    values.setdefault("base_architecture", "sdxl")  # the channel's name does not say it
    folder = data.get("images")
    here = isinstance(folder, str | Path) and not s3_text(folder) and IMAGES_CHANNEL in draft.sources
    beside = Path(str(folder)) if here else None
    with draft.problems.collected():
        draft.hyperparameters = Hyperparameters.parse(
            values, dataset_info=lambda directory: read_dataset_info(beside) if beside else {}
        )
    if isinstance(draft.sources.get(MODEL_CHANNEL), Mapping):
        with draft.problems.collected():
            _check_base_model(Path(data["base_model"]).expanduser(), draft)
    for channel in (IMAGES_CHANNEL, CLASS_IMAGES_CHANNEL):
        pictures = draft.sources.get(channel)
        if isinstance(pictures, Channel | Listed):
            if channel == IMAGES_CHANNEL and pictures.objects is not None:
                draft.pictures = pictures_in(pictures.objects) or _USUAL_PICTURES
        elif pictures is not None:
            images = data["images" if channel == IMAGES_CHANNEL else "class_images"]
            _check_pictures(channel, images, pictures, draft, base=str(data.get("base_model", "")) or None)
    return draft


def _find_pictures(name: str, images: Images, look: Lookup) -> Channel | Listed | Files:
    """Where pictures lie: in S3, or in which files.

    Raises:
        UserError: there are none.
    """
    each = [images] if isinstance(images, str | Path) else list(images)
    texts = [text for text in map(s3_text, each) if text]
    if texts and len(texts) < len(each):
        raise UserError(f"{name}: some are in S3 and some on this machine; name pictures of one place")
    if texts:
        with _about(name):
            found = look.find(texts)
            if found.objects is not None and not pictures_in(found.objects) and not look.have_headers(found):
                raise UserError(f"{', '.join(texts)[:200]}: there are {len(found.objects)} objects, and no pictures")
            return found
    if not isinstance(images, str | Path):
        if not images:
            raise UserError(f"{name} is empty; name 4 to 20 pictures")
        return picture_files([Path(image) for image in images])
    if not Path(images).is_dir():
        raise UserError(f"{name}: {images} is not a folder; name a folder with 4 to 20 pictures, or s3://bucket/prefix")
    if not list_pictures(Path(images)):
        raise UserError(f"{name}: {images} holds no pictures; put 4 to 20 JPEG or PNG pictures there")
    return picture_files(Path(images))


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Problems of one option, named after it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {problem}" for problem in error.problems) from None


def _check_pictures(channel: str, images: Images, files: Files, draft: Draft, base: str | None) -> None:
    """What the container will find in the pictures, and what is odd about them.

    Args:
        base: the base model, where it lies now.
    """
    h = draft.hyperparameters or Hyperparameters()
    with tempfile.TemporaryDirectory(prefix="dreambooth-sm-") as scratch:
        directory = Path(images) if isinstance(images, str | Path) else Path(scratch)
        if directory == Path(scratch):
            lay_out_files(files, directory)
        findings: Findings | ClassFindings
        if channel == IMAGES_CHANNEL:
            findings = check_folder(directory, h, name="images", base=base)
            draft.pictures = len(findings.pictures) or _USUAL_PICTURES
        elif h.prior_preservation and h.prior == "images":
            findings = check_class_folder(directory, h, name="class_images")
        else:
            return
        draft.problems.found += [text.replace(f"{scratch}/", "") for text in findings.errors]
        draft.warnings += [text.replace(f"{scratch}/", "") for text in findings.warnings]


def _read_base_model(base_model: str | Path, look: Lookup) -> tuple[Channel | Files | None, str]:
    """The channel that a base model needs, if any, and how the job calls it.

    Raises:
        UserError: it is a path, and there is nothing.
    """
    text, path = str(base_model), Path(base_model).expanduser()
    inside = f"{CHANNELS}/{MODEL_CHANNEL}"
    if location := s3_text(base_model):
        with _about("base_model"):
            found = look.find([location])
            if not isinstance(found, Channel) or found.kind == MANIFEST:
                raise UserError(f"{location} is a manifest; name the folder or the file of the model")
            if found.kind == PREFIX and found.objects and found.uri.prefix not in found.objects:
                raise UserError(f"there is nothing below {location}/, only beside it: {found.objects[0]}")
        return found, f"{inside}/{PurePosixPath(found.uri.prefix).name}" if found.kind == PREFIX else inside
    if text == toybox.NAME:
        return None, text
    if path.is_dir():
        return all_files(path), inside
    if path.is_file() and path.name.lower().endswith((*SINGLE_FILES, ".tar.gz", ".tgz", ".tar")):
        return {path.name: path}, f"{inside}/{path.name}"
    if isinstance(base_model, Path) or text.startswith(("/", ".", "~")):
        raise UserError(f"base_model: {base_model} is not a directory; name a hub id or a diffusers directory")
    return None, text


def _check_base_model(path: Path, draft: Draft) -> None:
    """What the job will say of a base model of this machine, before it is sent to S3.

    A job of this machine says it itself in seconds; and a VAE that replaces the model's is not here.

    Raises:
        UserError: for a model that can't be trained.
    """
    h = draft.hyperparameters
    if h is None or h.pretrained_vae_name_or_path or draft.resources.instance_type in ON_THIS_MACHINE:
        return
    try:
        from dreambooth_sm.models import check_base  # imports torch
    except ImportError:
        draft.warnings.append("base_model: not looked into before the job: torch and diffusers are not installed here")
        return
    field = "pretrained_model_name_or_path"
    try:
        check_base(h.model_copy(update={field: str(path.resolve())}))
    except UserError as error:
        raise UserError(problem.replace(field, "base_model") for problem in error.problems) from None


def _choose_instance(draft: Draft) -> Estimate | None:
    """What the job needs on its instance type; None where there is a problem."""
    h, resources = draft.hyperparameters, draft.resources
    with draft.problems.collected():
        if h is None:
            if resources.instance_type != "auto":
                find_instance(resources.instance_type)
            return None
        count, limit = resources.instance_count, resources.max_minutes
        if resources.instance_type == "auto":
            instance = choose_instance(h, max_minutes=limit, instance_count=count, pictures=draft.pictures)
        else:
            instance = find_instance(resources.instance_type)
        chosen = estimate_on(h, instance, instance_count=count, pictures=draft.pictures)
        if limit is not None and chosen.minutes is not None and chosen.minutes > limit:
            raise UserError(
                f"max_minutes={limit}: the job is expected to take about {chosen.minutes:.0f} minutes on "
                f"{instance.name}; allow more, train fewer steps, or choose instance_type='auto'"
            )
        return chosen
    return None


def _complete(resources: Resources, draft: Draft, account: Account | None) -> Resources:
    """Resources with the role, image, bucket and name that the job will have."""
    found: dict[str, str] = {}
    if resources.bucket is None and resources.output is not None:
        found["bucket"] = S3Uri.parse(resources.output).bucket
    look: dict[str, Callable[[], str]] = {}
    if account is not None:
        look = {"role": account.find_role, "image_uri": account.find_image, "bucket": account.find_bucket}
    for name, standin in _STANDINS.items():
        if getattr(resources, name) is None and name not in found:
            found[name] = standin
            if name in look:
                with draft.problems.collected():
                    found[name] = look[name]()
    if resources.role is not None and not resources.role.startswith("arn:"):
        found["role"] = _STANDINS["role"]
        if account is not None:
            with draft.problems.collected():
                found["role"] = account.complete_role(resources.role)
    if resources.name is None:
        found["name"] = f"dreambooth-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return resources.model_copy(update=found)
