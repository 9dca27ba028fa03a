"""An S3 server inside this process: for the demo, the launcher's local mode and the tests. No AWS account."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import s3_client

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client

REGION = "us-east-1"
_KEY, _SECRET = "embedded", "embedded-secret"
# A WSGI application.
Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


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
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> S3Client:
        """A client of this server, whatever the environment says."""
        return s3_client(self.session(), endpoint_url=self.endpoint_url)

    def session(self) -> Session:
        """A session with this server's credentials, whatever the environment says."""
        import boto3.session

        return boto3.session.Session(_KEY, _SECRET, region_name=REGION)


@contextmanager
def embedded_s3(front: Callable[[Application], Application] | None = None) -> Iterator[EmbeddedS3]:
    """Runs an S3 server on a free port until the block ends.

    Objects are kept in memory until this process ends; two servers of one process show the same buckets.

    Args:
        front: puts an application of its own in front of the server's.

    Raises:
        UserError: moto is not installed.

    Example:
        >>> with embedded_s3() as s3:
        ...     s3.client().create_bucket(Bucket="models")["Location"]
        '/models'
    """
    try:
        from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server
    except ImportError as error:
        raise UserError(f"the embedded S3 server needs moto ({error}): pip install 'dreambooth-sm[demo]'") from error

    log = logging.getLogger("werkzeug")
    level = log.level
    log.setLevel(logging.ERROR)
    application = DomainDispatcherApplication(create_backend_app)
    if front:
        application = front(application)
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield EmbeddedS3(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        log.setLevel(level)
