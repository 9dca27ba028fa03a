"""A ``model.tar.gz``, as SageMaker packs a model, into a directory: whole, or not at all."""

from __future__ import annotations

import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import S3Options, S3Uri, download_object

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def unpack(source: str, directory: Path, client: S3Client, options: S3Options) -> Path:
    """Fetches an archive, verified, and puts its files into a directory once all of them could be read.

    Args:
        source: ``s3://bucket/key``, or a file of this machine.

    Returns:
        the directory.

    Raises:
        UserError: there is no such object or file, or it is not a whole archive of files.
        TransferError: what came is not what lies in S3.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".unpacking-") as scratch:
        archive, fresh = Path(source), Path(scratch) / "files"
        if source.startswith("s3://"):
            archive = Path(scratch) / "archive"
            download_object(S3Uri.parse(source), archive, options, client=client)
        fresh.mkdir()
        try:
            _extract(archive, fresh)
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            reason = str(error).partition("\n")[0].rstrip(": ")
            raise UserError(
                f"{source}: it can't be unpacked as a whole tar archive ({reason}): where it is cut off or damaged, "
                "run the job again"
            ) from error
        names = [path.relative_to(fresh) for path in sorted(fresh.rglob("*")) if path.is_file()]
        if not names:
            raise UserError(f"{source}: the archive holds no files: the job wrote no model")
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).replace(directory / name)
    return directory


def _extract(archive: Path, directory: Path) -> None:
    # Python 3.11 has filters from 3.11.4 on only; nothing but files that lie below the directory is wanted.
    safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archive, mode="r:*") as tar:
        for member in tar:
            inside = (directory / member.name).resolve().is_relative_to(directory.resolve())
            if member.isfile() and inside:
                tar.extract(member, directory, **safely)
