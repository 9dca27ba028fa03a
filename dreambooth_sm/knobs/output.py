"""Knobs for where the trained model goes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Literal

from dreambooth_sm.errors import UserError
from dreambooth_sm.knobs.declare import Alias, knob, rule
from dreambooth_sm.knobs.messages import short
from dreambooth_sm.knobs.model import ModelKnobs
from dreambooth_sm.printing import has_userinfo
from dreambooth_sm.storage import S3Options, S3Uri

DEFAULT_MODELS_PATH = "/opt/ml/model"


class OutputKnobs(ModelKnobs):
    """The trained model: its name, its files, and how they leave the instance."""

    group = "Output"

    model_name: str = knob(
        "aws-trained-dreambooth-model",
        "Name of the trained model, as the log gives it.",
        resume="free",
        per_subject=True,
    )
    models_path: str = knob(
        DEFAULT_MODELS_PATH,
        "Directory in the container that the trained pipeline is written to.",
        resume="free",
        path=True,
    )
    export: Literal["diffusers", "single_file", "adapter", "merged", "both"] = knob(
        "diffusers",
        "What the trained model is written as. With method=full: a diffusers directory, one `.safetensors` file in the "
        "original layout for WebUI and ComfyUI (single_file), or both. With method=lora or pivotal: files of the "
        "adapter, a diffusers directory of the base model with the adapter in it (merged), or both.",
        resume="free",
        methods=("full", "lora", "pivotal"),
    )
    export_precision: Literal["fp16", "bf16", "fp32"] = knob(
        "fp16",
        "Precision of the trained weights' files.",
        resume="free",
    )
    manual_upload_model_path: str | None = knob(
        None,
        "`s3://bucket/prefix`: upload the pipeline directory there, recursively, and leave nothing for "
        "SageMaker to pack. Also accepted as `manul_upload_model_path`.",
        resume="free",
        aliases=(Alias("manul_upload_model_path"),),
    )
    output_mode: Literal["auto", "direct", "uncompressed", "archive"] = knob(
        "auto",
        "How the model leaves the instance. direct: the job uploads it to manual_upload_model_path; uncompressed, "
        "archive: the job leaves it in models_path, and SageMaker uploads it as files or as model.tar.gz, whichever "
        "the job's output configuration says. auto: direct if there is a manual_upload_model_path.",
        resume="free",
    )
    s3_kms_key_id: str | None = knob(
        None, "Id or ARN of the KMS key that encrypts what the job uploads.", resume="free"
    )
    s3_encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = knob(
        None,
        "Encryption of what the job uploads: AES256 with S3's own keys, the others with s3_kms_key_id or the account's "
        "key; None: with a key aws:kms, otherwise the bucket's.",
        resume="free",
    )
    s3_acl: (
        Literal["private", "bucket-owner-full-control", "bucket-owner-read", "authenticated-read", "public-read"] | None
    ) = knob(None, "Canned ACL of what the job uploads.", resume="free")
    s3_tags: str | None = knob(None, "Tags of what the job uploads, at most 10: `team=toys,stage=test`.", resume="free")
    s3_storage_class: (
        Literal["STANDARD", "STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER_IR", "REDUCED_REDUNDANCY"]
        | None
    ) = knob(None, "Storage class of what the job uploads; None: the bucket's.", resume="free")
    s3_requester_pays: bool = knob(False, "Pay for requests to buckets whose requesters pay.", resume="free")
    s3_endpoint_url: str | None = knob(
        None,
        "S3-compatible server that the job uploads to: `https://minio.example:9000`; None: AWS.",
        resume="free",
    )
    s3_addressing_style: Literal["auto", "path", "virtual"] | None = knob(
        None,
        "Where the bucket's name is in the addresses of that server: in the path, or, as Alibaba's and Tencent's want "
        "it, in the host's name (virtual); None: as the AWS settings say, or in the path.",
        resume="free",
    )

    @property
    def s3_options(self) -> S3Options:
        """How the job writes to S3."""
        return S3Options(
            kms_key=self.s3_kms_key_id,
            acl=self.s3_acl,
            tags=dict(_read_tags(self.s3_tags)) if self.s3_tags else {},
            storage_class=self.s3_storage_class,
            requester_pays=self.s3_requester_pays,
            encryption=self.s3_encryption,
        )

    @property
    def upload_target(self) -> str | None:
        """Where the job itself uploads the model to; None where that is left to SageMaker."""
        return self.manual_upload_model_path if self.output_mode in ("auto", "direct") else None

    @rule("manual_upload_model_path", "output_mode")
    def _way_out(self) -> Iterator[str]:
        if self.output_mode == "direct" and self.manual_upload_model_path is None:
            yield (
                "output_mode=direct needs manual_upload_model_path; set it to s3://bucket/prefix, or leave "
                "output_mode out"
            )
        if self.output_mode in ("uncompressed", "archive") and self.manual_upload_model_path is not None:
            yield (
                f"output_mode={self.output_mode} leaves the upload to SageMaker; leave manual_upload_model_path out, "
                "or set output_mode=direct"
            )

    @rule("manual_upload_model_path")
    def _upload_goes_to_s3(self) -> Iterator[str]:
        yield from refused_location("manual_upload_model_path", self.manual_upload_model_path)

    @rule("s3_encryption", "s3_kms_key_id")
    def _key_serves_the_encryption(self) -> Iterator[str]:
        if self.s3_encryption == "AES256" and self.s3_kms_key_id is not None:
            yield (
                "s3_encryption=AES256 encrypts with S3's own keys; leave s3_kms_key_id out, or set "
                "s3_encryption=aws:kms"
            )

    @rule("s3_tags")
    def _tags_are_s3s(self) -> Iterator[str]:
        if self.s3_tags is None:
            return
        try:
            _read_tags(self.s3_tags)
        except ValueError:
            text = short(self.s3_tags)
            yield f"s3_tags: {text} is not valid; set at most 10 different tags as team=toys,stage=test"

    @rule("s3_endpoint_url")
    def _server_is_an_address(self) -> Iterator[str]:
        url = self.s3_endpoint_url
        if url is not None and not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", url):
            yield f"s3_endpoint_url: {short(url)} is not an address; set https://host:port"
        if url is not None and has_userinfo(url):
            yield (
                "s3_endpoint_url holds a user's name or password, which job descriptions and logs would show; set "
                "https://host:port, and give credentials by the job's role or as AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY"
            )

    @rule("model_name", "export")
    def _name_can_be_a_files(self) -> Iterator[str]:
        if self.export not in ("diffusers", "merged") and not can_be_a_files_name(self.model_name):
            yield (
                f"model_name={short(self.model_name)} names the file that export={self.export} writes, and can't be a "
                "file's name"
            )

    @rule("models_path", "pretrained_model_name_or_path")
    def _base_is_not_written_over(self) -> Iterator[str]:
        if PurePosixPath(self.pretrained_model_name_or_path) == PurePosixPath(self.models_path):
            yield (
                f"models_path and pretrained_model_name_or_path are the same directory, {self.models_path}: the "
                "trained model would be written over the base model; give each its own"
            )


def can_be_a_files_name(name: str) -> bool:
    return bool(re.fullmatch(r"[^/\0]{1,200}", name))


def refused_location(name: str, uri: str | None) -> Iterator[str]:
    """Says in a line why a knob's value is not a location in S3; nothing for None."""
    try:
        S3Uri.parse(uri or "s3://none")
    except UserError as error:
        yield f"{name}: {error}; set s3://bucket/prefix"


def _read_tags(text: str) -> list[tuple[str, str]]:
    """``a=1,b=2`` as pairs.

    Raises:
        ValueError: for anything that S3 would refuse.
    """
    items = [item.partition("=") for item in text.split(",")]
    pairs = [(name.strip(), value.strip()) for name, _, value in items]
    names = [name for name, _ in pairs]
    allowed = all(
        re.fullmatch(r"[\w\s+\-=._:/@]{1,128}", name) and re.fullmatch(r"[\w\s+\-=._:/@]{0,256}", value)
        for name, value in pairs
    )
    if not allowed or len(set(names)) < len(names) or len(pairs) > 10 or any(n.startswith("aws:") for n in names):
        raise ValueError(text)
    return pairs
