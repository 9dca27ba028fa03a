"""An S3 server inside this process: for the demo, the launcher's local mode and the tests. No AWS account."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import s3_client

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_KEY, _SECRET, _REGION = "embedded", "embedded-secret", "us-east-1"


@dataclass(frozen=True)
class EmbeddedS3:
    """A running server; `endpoint_url` is its address on the loopback interface."""

    endpoint_url: str

    def environment(self) -> dict[str, str]:
        """The variables that make boto3 in another process (or in this one) use this server and no other."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_DEFAULT_REGION": _REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> S3Client:
        """A client of this server, whatever the environment says."""
        import boto3.session

        session = boto3.session.Session(_KEY, _SECRET, region_name=_REGION)
        return s3_client(session, endpoint_url=self.endpoint_url)


@contextmanager
def embedded_s3() -> Iterator[EmbeddedS3]:
    """Runs an S3 server on a free port until the block ends.

    Objects are kept in memory until this process ends; two servers of one process show the same buckets.

    Raises:
        UserError: moto is not installed.

    Example:
        >>> with embedded_s3() as s3:
        ...     s3.client().create_bucket(Bucket="models")["Location"]
        '/models'
    """
    try:
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        raise UserError(f"the embedded S3 server needs moto ({error}): pip install 'dreambooth-sm[demo]'") from error

    log = logging.getLogger("werkzeug")
    level = log.level
    log.setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield EmbeddedS3("http://{}:{}".format(*server.get_host_and_port()))
    finally:
        server.stop()
        log.setLevel(level)
