"""The ``/opt/ml`` tree of a job, laid out and filled as SageMaker does before it starts a container.

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo.html
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import S3Uri, download_directory, get_object, list_objects, s3_client
from launcher.channels import read_manifest
from launcher.staging import link_or_copy

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def lay_out(
    base: Path,
    hyperparameters: Mapping[str, str],
    channels: Mapping[str, str | Mapping[str, Any]],
    *,
    s3: S3Client | None = None,
) -> None:
    """Writes the ``/opt/ml`` tree of one job below ``base``, as SageMaker does before it starts a container.

    Args:
        channels: names to S3DataSources, or to ``s3://`` or ``file://`` locations or local folders.
        s3: where ``s3://`` locations lie; default: the standard AWS settings.

    Raises:
        UserError, TransferError: a channel can't be read.
    """
    config = base / "input" / "config"
    (base / "output" / "failure").unlink(missing_ok=True)
    for folder in (config, base / "model", base / "output", base / "checkpoints", base / "input" / "data"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, source in channels.items():
        target = base / "input" / "data" / name
        shutil.rmtree(target, ignore_errors=True)  # of an earlier job in this tree
        described = {"S3Uri": source} if isinstance(source, str) else source
        location = described["S3Uri"]
        if location.startswith("s3://") or described.get("S3DataType") == "ManifestFile":
            fetch_channel(described, target, s3 or s3_client())
        else:
            shutil.copytree(unquote(location.removeprefix("file://")), target, copy_function=_hard_link_or_copy)
    files: dict[str, object] = {
        "hyperparameters.json": dict(hyperparameters),
        "inputdataconfig.json": {
            name: {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
            for name in channels
        },
        "resourceconfig.json": {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "lo"},
    }
    for name, content in files.items():
        (config / name).write_text(json.dumps(content, indent=1))


def _hard_link_or_copy(source: str, target: str) -> None:
    """A base model is gigabytes, and the tree has to outlive where its files came from."""
    link_or_copy(source, target, os.link)


def fetch_channel(source: Mapping[str, Any], target: Path, s3: S3Client) -> None:
    """Downloads what an S3DataSource names, as SageMaker does before it starts a container.

    Raises:
        UserError, TransferError: there is nothing, or it can't be read.
    """
    location = source["S3Uri"]
    if source.get("S3DataType") == "ManifestFile":
        for uri, name in read_manifest(_read_manifest(location, s3), location):
            _download(uri, _below(target, name), s3)
        return
    uri = S3Uri.parse(location)
    folder = list_objects(uri, client=s3)
    if folder or not uri.prefix:
        download_directory(uri, target, client=s3)
    if location.endswith("/") or not uri.prefix:
        return
    beside = uri.prefix.rpartition("/")[0]
    others = [key for key in _keys_from(uri, s3) if not key.startswith(f"{uri.prefix}/") and not key.endswith("/")]
    if not others and not folder:
        raise UserError(f"{uri}: there is nothing below this prefix: check the bucket and the prefix")
    for key in others:
        _download(S3Uri(uri.bucket, key), _below(target, key.removeprefix(beside).lstrip("/")), s3)


def _keys_from(uri: S3Uri, s3: S3Client) -> list[str]:
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=uri.bucket, Prefix=uri.prefix)
    return [item["Key"] for page in pages for item in page.get("Contents", [])]


def _read_manifest(location: str, s3: S3Client) -> bytes:
    if location.startswith("file://"):
        return Path(unquote(urlsplit(location).path)).read_bytes()
    body = get_object(S3Uri.parse(location), client=s3)
    if body is None:
        raise UserError(f"{location}: there is no such object: check the bucket and the key")
    return body


def _below(target: Path, name: str) -> Path:
    path = target / name
    if not path.resolve().is_relative_to(target.resolve()):
        raise UserError(f"{name!r} in a manifest leads out of the channel")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _download(uri: S3Uri, path: Path, s3: S3Client) -> None:
    try:
        s3.download_file(uri.bucket, uri.prefix, str(path))
    except s3.exceptions.ClientError as error:
        raise UserError(f"{uri}: there is no such object, or it can't be read: {error}") from error
