"""Sources of base models: local paths and channels, S3, the model hub. What comes of each is a local path."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dreambooth_sm import storage, toybox, warm_pool
from dreambooth_sm.aws_secrets import read_secret
from dreambooth_sm.errors import UserError
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.hub_ranges import fetch_large
from dreambooth_sm.private_directory import make_private
from dreambooth_sm.storage import S3Uri

# Names that stand for another: the id that notebooks still carry, whose model moved, and models that come with us.
RENAMED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    **{name: str(directory) for name, directory in toybox.SHIPPED.items()},
}
_CACHE = "dreambooth-sm-models"
# Models that the image was built with (the Dockerfile's BASE_MODEL), as directories named by their hub ids.
BAKED = Path("/opt/base-models")
_INDEX = "model_index.json"
_PARTS = tuple(dict.fromkeys(part for family in FAMILIES.values() for part in family.facts.parts))
_WEIGHTS_FOLDERS = (*_PARTS, "")
_OTHER_FILES = re.compile(
    rf"(model_index|(({'|'.join(_PARTS)})/)?config)\.json|(tokenizer(_\d)?|scheduler|feature_extractor)/.+"
)
_PREFERRED_VARIANT = "fp16"


def is_s3(name: str) -> bool:
    return name.startswith("s3://")


def is_local(name: str) -> bool:
    """Paths are told from hub ids (``owner/name``) by their look, so that a missing channel is never looked up. The
    name of a model that comes with us is not a path, whatever lies here."""
    return not is_s3(name) and name not in RENAMED and (name.startswith(("/", ".", "~")) or Path(name).exists())


def cache_directory() -> Path:
    """A directory of this user's own: on the warm pool's disk where there is one, or else among temporary files.

    Raises:
        UserError: where somebody else could have put models there.
    """
    if (disk := warm_pool.disk()) is not None:
        return make_private(disk / _CACHE, "base models", warm_pool.VARIABLE)
    return make_private(Path(tempfile.gettempdir()) / f"{_CACHE}-{os.getuid()}", "base models", "TMPDIR")


def fetch(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    token_secret: str | None = None,
    without: str | None = None,
) -> Path:
    """Brings a model to this machine's disk.

    Args:
        name: local path, ``s3://`` prefix or object, or hub id, which the image itself may hold.
        revision, variant: of a hub id, then fetched from the hub; fp16 files are preferred where no variant is named.
        token_secret: name of the AWS secret with the hub's token; the environment's ``HF_TOKEN`` if left out.
        without: a part whose weights are not needed, and not fetched from the hub.

    Returns:
        a directory or a file.

    Raises:
        UserError: there is no such model, or it can't be reached from here.
        DownloadError: a transfer failed in spite of retries.
    """
    if is_local(name):
        return Path(name)
    if revision is None and variant is None and not is_s3(name) and (BAKED / name).is_dir():
        return BAKED / name
    if warm_pool.disk():
        warm_pool.bound(cache_directory())
    if is_s3(name):
        found = _from_s3(S3Uri.parse(name))
    else:
        found = _from_hub(name, revision, variant, read_token(token_secret), without)
    return use(found)


def use(found: Path) -> Path:
    """Keeps what was fetched from other processes of this host that make room on a warm pool's disk."""
    if warm_pool.disk():
        warm_pool.bound(cache_directory(), found)
    return found


def check_s3(uri: S3Uri) -> None:
    """Raises UserError where nothing lies at an S3 location that a base model is to come from."""
    _find(uri)


def read_token(secret: str | None) -> str | None:
    """The model hub's token from AWS Secrets Manager: a text, or JSON with the key ``HF_TOKEN``. None for no secret.

    Raises:
        UserError: where the secret can't be read.
    """
    return read_secret("hf_token_secret", secret, ["HF_TOKEN"], "a token")["HF_TOKEN"] if secret is not None else None


def _find(uri: S3Uri) -> tuple[S3Uri, dict[str, str]]:
    """Finds what to download of an S3 location, and its objects' ETags: the object, or the prefix or the one prefix
    below it at which a pipeline lies, or else all that is below."""
    storage.list_objects(uri)  # explains what is wrong with the bucket
    pages = storage.s3_client().get_paginator("list_objects_v2").paginate(Bucket=uri.bucket, Prefix=uri.prefix)
    found = {item["Key"]: item["ETag"] for page in pages for item in page.get("Contents", [])}
    if uri.prefix and uri.prefix in found:
        return uri, {uri.prefix: found[uri.prefix]}
    below = f"{uri.prefix}/" if uri.prefix else ""
    found = {key.removeprefix(below): etag for key, etag in found.items() if key.startswith(below)}
    if not found:
        raise UserError(f"{uri}: there is no such object, and there is nothing below this prefix: check bucket and key")
    pipelines = sorted(key.rpartition("/")[0] for key in found if f"/{key}".endswith(f"/{_INDEX}"))
    nearest = [each for each in pipelines if each.count("/") == min(each.count("/") for each in pipelines)]
    if not pipelines or "" in pipelines or "config.json" in found:
        return uri, found
    if len(nearest) > 1:
        raise UserError(
            f"{uri}: there are several models below this prefix; name one of them, such as {uri / nearest[0]}"
        )
    return uri / nearest[0], {key: etag for key, etag in found.items() if key.startswith(f"{nearest[0]}/")}


def _from_s3(uri: S3Uri) -> Path:
    """Downloads a prefix or an object once, for all processes of this host and later jobs of its warm pool."""
    uri, objects = _find(uri)
    single = [*objects] == [uri.prefix]
    identity = hashlib.sha256(json.dumps([str(uri), sorted(objects.items())]).encode()).hexdigest()[:16]
    directory = cache_directory() / identity
    whole = directory / uri.prefix.rpartition("/")[2] if single else directory
    with locked(cache_directory() / f"{identity}.lock"):
        if not directory.is_dir():
            partial = directory.with_suffix(warm_pool.UNFINISHED)
            shutil.rmtree(partial, ignore_errors=True)
            if single:
                partial.mkdir(parents=True)
                storage.download_object(uri, partial / whole.name)
            else:
                storage.download_directory(uri, partial)
            partial.rename(directory)
    return whole


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process of this host at a time."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def needed_files(names: Sequence[str], variant: str | None, without: str | None = None) -> list[str]:
    """Those of a repository's files that a job needs: one format and one variant of each part's weights.

    Args:
        variant: such as ``fp16``, which is preferred as well; parts that do not have it come without it.
        without: a part whose weights are not needed.

    Raises:
        UserError: where no file is of the variant that was asked for.
    """
    chosen = [name for name in names if _OTHER_FILES.fullmatch(name)]
    tags = [*([rf"\.{re.escape(variant)}"] if variant else []), rf"\.{_PREFERRED_VARIANT}", ""]
    for folder in _WEIGHTS_FOLDERS:
        if folder == without:
            continue
        stem = (f"{folder}/" if folder else "") + "(diffusion_pytorch_model|model|pytorch_model)"
        found = [
            [name for name in names if re.fullmatch(rf"{stem}{tag}(-\d+-of-\d+)?\.{suffix}", name)]
            for suffix in ("safetensors", "bin")
            for tag in tags
        ]
        chosen += next((files for files in found if files), [])
    if variant and not any(f".{variant}." in f"{name.replace('-', '.')}" for name in chosen):
        raise UserError(f"variant={variant}: the repository has no files of it; leave variant out")
    return chosen


def _from_hub(name: str, revision: str | None, variant: str | None, token: str | None, without: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    cache = cache_directory() / "hub" if warm_pool.disk() else None
    try:
        try:
            info = HfApi(token=token).model_info(name, revision=revision)
        except Exception:  # no network, or none wanted: what an earlier job fetched will do
            for marker in ("model_index.json", "config.json"):
                with contextlib.suppress(Exception):
                    kept = hf_hub_download(name, marker, revision=revision, cache_dir=cache, local_files_only=True)
                    return Path(kept).parent
            raise
        files = needed_files([file.rfilename for file in info.siblings or []], variant, without)
        if not files:
            raise UserError(f"{name}: the repository holds no diffusers model; name one that does")
        if info.sha:
            weights = [file for file in files if file.endswith((".safetensors", ".bin"))]
            fetch_large(name, weights, info.sha, token, cache)
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=files, token=token, cache_dir=cache, max_workers=8
            )
        )
    except UserError:
        raise
    except Exception as error:  # what the hub's client raises comes from several libraries
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{name} can't be loaded from the model hub ({reason}); check the id and revision, and that the job may "
            "reach the network and the model (HF_TOKEN or hf_token_secret), or pass the model as a channel"
        ) from error
