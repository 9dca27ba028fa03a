"""The objects of S3 in an input channel: by a folder, by the start of their keys, or by a manifest that names them.

https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_S3DataSource.html
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass

from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import S3Uri

FOLDER, PREFIX, MANIFEST = "folder", "prefix", "manifest"
# Base models in one file, as WebUI and Civitai have them.
SINGLE_FILES = (".safetensors", ".ckpt")


@dataclass(frozen=True)
class Channel:
    """A location in S3 as one channel takes it.

    Attributes:
        uri: of the folder, the start of the keys (one whole key is one as well), or the manifest.
        kind: ``folder``, ``prefix`` or ``manifest``.
        objects: names of the objects that it holds; None where nobody has looked.
    """

    uri: S3Uri
    kind: str = FOLDER
    objects: tuple[str, ...] | None = None

    @classmethod
    def at(cls, uri: S3Uri) -> Channel:
        """A folder, or one file of a base model, by its name."""
        return cls(uri, PREFIX if uri.prefix.lower().endswith(SINGLE_FILES) else FOLDER)

    @property
    def uris(self) -> list[S3Uri] | None:
        """Where the objects lie."""
        if self.objects is None:
            return None
        return [self.uri / name if self.kind == FOLDER else S3Uri(self.uri.bucket, name) for name in self.objects]

    @property
    def data_source(self) -> dict[str, str]:
        """As CreateTrainingJob's S3DataSource."""
        # A folder without its slash would take in `pictures-2` beside `pictures`.
        location = f"{self.uri}/" if self.kind == FOLDER else str(self.uri)
        data_type = "ManifestFile" if self.kind == MANIFEST else "S3Prefix"
        return {"S3DataType": data_type, "S3Uri": location, "S3DataDistributionType": "FullyReplicated"}


def write_manifest(objects: Sequence[S3Uri]) -> bytes:
    """A manifest of objects of one bucket, their names relative to the folder that holds them all.

    Examples:
        >>> write_manifest([S3Uri("b", "toys/1.jpg"), S3Uri("b", "toys/2.jpg")])
        b'[{"prefix": "s3://b/toys/"}, "1.jpg", "2.jpg"]'
    """
    folder = posixpath.commonpath([posixpath.dirname(uri.prefix) for uri in objects])
    start = f"{folder}/" if folder else ""
    names = [uri.prefix.removeprefix(start) for uri in objects]
    return json.dumps([{"prefix": f"s3://{objects[0].bucket}/{start}"}, *names], ensure_ascii=False).encode()


def read_manifest(body: bytes, name: str) -> list[tuple[S3Uri, str]]:
    """The objects of a manifest, each with the name that its file gets.

    Args:
        name: of the manifest, for errors.

    Raises:
        UserError: it is not a manifest as SageMaker defines it.

    Examples:
        >>> read_manifest(b'[{"prefix": "s3://b/toys/"}, "cat/1.jpg"]', "m")
        [(S3Uri(bucket='b', prefix='toys/cat/1.jpg'), 'cat/1.jpg')]
    """
    expected = '[{"prefix": "s3://bucket/folder/"}, "1.jpg", "2.jpg", ...]'
    try:
        start, *names = json.loads(body.decode("utf-8-sig"))
        prefix = start["prefix"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{name} is not a manifest: a manifest is {expected}") from None
    wrong = [each for each in names if not isinstance(each, str) or not each]
    if wrong or not names or not isinstance(prefix, str):
        raise UserError(f"{name} is not a manifest: {str([*wrong, prefix][0])[:60]!r} in it; a manifest is {expected}")
    return [(S3Uri.parse(f"{prefix}{each}"), each) for each in names]
