"""Generated class images, kept as latents for the next steps and for the next jobs.

One file a picture: the sampler's scaled latents in half precision, 33 KB at 512 pixels. Its name holds the digest of
everything that determines the picture, so that a picture is either the right one or not there; a file that is damaged,
or is not what latents are, counts as missing. Writers of the same file write the same content, each in one piece: jobs
may share a cache at any time. Whoever can write to a cache can choose what its jobs train on, within these bounds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import safetensors
import safetensors.torch
import torch
from botocore.exceptions import BotoCoreError, ClientError

from dreambooth_sm.data.folder import shortened
from dreambooth_sm.errors import UserError
from dreambooth_sm.report import Reporter
from dreambooth_sm.storage import S3Options, S3Uri, TransferError, get_object, put_object, s3_client

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SUFFIX = ".safetensors"
# Beside the latents themselves a file has a header, of some 200 bytes.
_MOST_HEADER = 4096
# Scaled latents have a deviation of about 1, and the noise that the sampler starts from one of 15.
_LARGEST = 1000.0
# Requests to S3 at a time.
_WORKERS = 16

T = TypeVar("T")
LatentShape = tuple[int, int, int]  # channels, height and width


@dataclass(frozen=True)
class Recipe:
    """Everything that determines generated pictures, but for each one's number.

    Attributes:
        weights: digest of what of the base model the pictures depend on.
        sampler: the noise scheduler's settings, the solver, and the software that runs them.
        size: width and height in pixels.
        guided: noise levels between which guidance acts.
    """

    weights: str
    sampler: str
    prompt: str
    steps: int
    guidance: float
    guided: tuple[float, float]
    size: tuple[int, int]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def name(self, number: int) -> str:
        """File name of a picture."""
        return f"class-{self.digest[:20]}-{number:06d}{SUFFIX}"


class ClassCache:
    """Pictures of earlier jobs: in a directory, and in S3 behind it.

    Failures of S3 and files that are not what they should be cost time, never the job: they are warned of, and the
    pictures made again.
    """

    def __init__(
        self,
        directory: Path,
        remote: S3Uri | None,
        report: Reporter,
        options: S3Options = S3Options(),  # noqa: B008 - frozen
    ) -> None:
        self.directory, self._remote, self._report, self._options = directory, remote, report, options

    def find(self, wanted: Mapping[str, LatentShape]) -> dict[str, bytes]:
        """The content of those files that are there and whole; what S3 alone has is put into the directory.

        Args:
            wanted: names of files, with the shape of their latents.
        """
        found = self._whole({name: _read(self.directory / name, most(shape)) for name, shape in wanted.items()}, wanted)
        lacking = {name: most(shape) for name, shape in wanted.items() if name not in found}
        fetched = self._whole(self._fetch(lacking), wanted)
        for name, content in fetched.items():
            self.write(name, content)
        return found | fetched

    def holds(self, name: str, content: bytes) -> bool:
        """Whether the directory has just this file."""
        return _read(self.directory / name, len(content)) == content

    def write(self, name: str, content: bytes) -> Path:
        """Puts a file into the directory; it appears there whole or not at all."""
        path = self.directory / name
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(content)
        return partial.rename(path)

    def share(self, files: Mapping[str, bytes]) -> None:
        """Puts files into S3 as well."""
        if self._remote is not None and files:
            remote, client = self._remote, s3_client()
            self._in_parallel(lambda name: put_object(remote / name, files[name], self._options, client=client), files)

    def _fetch(self, sizes: Mapping[str, int]) -> dict[str, bytes | None]:
        if self._remote is None or not sizes:
            return {}
        remote, client = self._remote, s3_client()

        def fetch(name: str) -> bytes | None:
            if _is_larger(remote / name, sizes[name], client, self._options):
                return b""
            return get_object(remote / name, self._options, client=client)

        return self._in_parallel(fetch, sizes)

    def _whole(self, files: Mapping[str, bytes | None], shapes: Mapping[str, LatentShape]) -> dict[str, bytes]:
        there = {name: content for name, content in files.items() if content is not None}
        whole = {name: content for name, content in there.items() if unpack(content, shapes[name]) is not None}
        if odd := sorted(there.keys() - whole.keys()):
            self._report.warn(f"class_cache: damaged, or not what it should be, and made again: {shortened(odd)}")
        return whole

    def _in_parallel(self, act: Callable[[str], T], names: Iterable[str]) -> dict[str, T]:
        with ThreadPoolExecutor(_WORKERS) as pool:
            try:
                return dict(zip(names, pool.map(act, names), strict=True))
            except (TransferError, UserError) as error:
                pool.shutdown(cancel_futures=True)
                self._report.warn(f"class_cache: {error}; continuing without it")
                return {}


def pack(latents: torch.Tensor) -> bytes:
    """Scaled latents ``(4, h, w)`` as the content of a file."""
    tensor = latents.detach().to("cpu", torch.float16).contiguous()
    return safetensors.torch.save({"latents": tensor}, {"sha256": _digest(tensor)})


def most(shape: LatentShape) -> int:
    """Bytes that a file with latents of a shape has at most."""
    return 2 * math.prod(shape) + _MOST_HEADER


def unpack(content: bytes, shape: LatentShape | None = None) -> torch.Tensor | None:
    """Scaled latents ``(4, h, w)``, float32; None where the content is damaged, or is not what latents are.

    Args:
        shape: that they have to have.
    """
    try:
        tensor = safetensors.torch.load(content)["latents"]
        length = int.from_bytes(content[:8], "little")
        expected = json.loads(content[8 : 8 + length])["__metadata__"]["sha256"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if tensor.dtype != torch.float16 or (shape is not None and tuple(tensor.shape) != shape):
        return None
    whole = _digest(tensor) == expected and bool((tensor.abs() <= _LARGEST).all())  # nothing compares with NaN
    return tensor.float() if whole else None


def read_latents(path: Path) -> torch.Tensor:
    """Scaled latents ``(4, h, w)``, float32, of a file that is known to be whole."""
    latents = unpack(path.read_bytes())
    assert latents is not None, f"{path} was whole when the job began"
    return latents


def is_latents(path: Path) -> bool:
    """Whether a class image is kept as latents, not as a picture."""
    return path.suffix == SUFFIX


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def _read(path: Path, most: int) -> bytes | None:
    """A file's content, cut where it is too much; None where there is none."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return file.read(most + 1)
    except OSError:
        return None


def _is_larger(uri: S3Uri, most: int, client: S3Client, options: S3Options) -> bool:
    """Whether an object is there and has more bytes: it is not worth its memory."""
    try:
        return client.head_object(Bucket=uri.bucket, Key=uri.prefix, **options.reading())["ContentLength"] > most
    except (ClientError, BotoCoreError):
        return False  # whoever reads it says what is wrong
