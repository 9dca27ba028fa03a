"""From options to a draft: what a job is made of, read and checked, pictures and base model included."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from dreambooth_sm import toybox
from dreambooth_sm.data.captions import read_dataset_info
from dreambooth_sm.data.check import ClassFindings, Findings, check_class_folder, check_folder
from dreambooth_sm.data.folder import list_pictures
from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.families import DEFAULT
from dreambooth_sm.families.find import find_family
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.model import distilled_problems, licence_problems, other_kind_problems
from dreambooth_sm.printing import redact
from dreambooth_sm.storage import S3Options, S3Uri
from launcher.aws.lookup import Listed, Lookup, pictures_in, s3_text
from launcher.channels import MANIFEST, PREFIX, SINGLE_FILES, Channel
from launcher.local.program import CONTAINER
from launcher.options import Images, split_options
from launcher.resources import Resources
from launcher.staging import Files, all_files, lay_out_files, picture_files
from launcher.training_request import (
    CHANNELS,
    CLASS_IMAGES_CHANNEL,
    IMAGES_CHANNEL,
    MODEL_CHANNEL,
    uploads_by_itself,
)

LOCAL = "local"
ON_THIS_MACHINE = (LOCAL, CONTAINER)
# What an estimate takes for granted where the pictures are not on this machine.
_USUAL_PICTURES = 5


@dataclass
class Draft:
    """All that is known of a job while it is being described: as much as could be read of its options.

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


def read_draft(options: Mapping[str, Any], look: Lookup) -> Draft:
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
    if data.get("base_model") == toybox.FLOW_NAME and draft.resources.instance_type != LOCAL:
        data["base_model"] = toybox.FLOW_BASE  # which the image does not have
    if "base_model" in data:
        with draft.problems.collected():
            source, values["pretrained_model_name_or_path"] = _read_base_model(data["base_model"], look)
            if source is not None:
                draft.sources[MODEL_CHANNEL] = source
                family = find_family(str(Path(data["base_model"]).expanduser()))
                if family != DEFAULT:
                    values.setdefault("base_architecture", family)  # the channel's name does not say it
    folder = data.get("images")
    here = isinstance(folder, str | Path) and not s3_text(folder) and IMAGES_CHANNEL in draft.sources
    beside = Path(str(folder)) if here else None
    with draft.problems.collected():
        draft.hyperparameters = Hyperparameters.parse(
            values, dataset_info=lambda directory: read_dataset_info(beside) if beside else {}
        )
    draft.problems.found += _left_here(draft)
    if (h := draft.hyperparameters) and MODEL_CHANNEL in draft.sources:
        # Its channel has another name.
        facts, name = h.facts, str(data["base_model"])
        draft.problems.found += [] if h.train_distilled else distilled_problems("base_model", name, facts)
        draft.problems.found += other_kind_problems("base_model", name, facts)
        draft.problems.found += licence_problems("base_model", name, facts, h.accept_license)
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
    """Finds where pictures lie: in S3, or in which files.

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
    """Checks what the container will find in the pictures, and what is odd about them.

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
    if text in toybox.SHIPPED:
        return None, text
    if path.is_dir():
        return all_files(path), inside
    if path.is_file() and path.name.lower().endswith((*SINGLE_FILES, ".tar.gz", ".tgz", ".tar")):
        return {path.name: path}, f"{inside}/{path.name}"
    if isinstance(base_model, Path) or text.startswith(("/", ".", "~")):
        raise UserError(f"base_model: {base_model} is not a directory; name a hub id or a diffusers directory")
    return None, text


def _left_here(draft: Draft) -> Iterator[str]:
    """Finds parts of the base model that lie on this machine, and the job elsewhere."""
    if draft.hyperparameters is None or draft.resources.instance_type in ON_THIS_MACHINE:
        return
    for name in ("pretrained_vae_name_or_path", "pretrained_parts_name_or_path"):
        value = getattr(draft.hyperparameters, name)
        if value and value.startswith(("/", ".", "~")) and Path(value).expanduser().exists():
            yield f"{name}: {value} is on this machine, where the job can't see it; name a hub id or s3://bucket/prefix"


def _check_base_model(path: Path, draft: Draft) -> None:
    """Checks a base model of this machine as the job will, before it is sent to S3.

    A job of this machine says it itself in seconds; and what replaces or completes the model's parts is not here.

    Raises:
        UserError: for a model that can't be trained.
    """
    h = draft.hyperparameters
    if h is None or h.pretrained_vae_name_or_path or draft.resources.instance_type in ON_THIS_MACHINE:
        return
    try:
        from dreambooth_sm.models import check_base, open_denoiser  # imports torch
    except ImportError:
        draft.warnings.append("base_model: not looked into before the job: torch and diffusers are not installed here")
        return
    if h.pretrained_parts_name_or_path:
        with _about("base_model"):
            open_denoiser(path)
        return
    field = "pretrained_model_name_or_path"
    try:
        check_base(h.model_copy(update={field: str(path.resolve())}))
    except UserError as error:
        raise UserError(problem.replace(field, "base_model") for problem in error.problems) from None
