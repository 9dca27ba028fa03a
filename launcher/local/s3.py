"""An S3 server inside this process: for the demo, the launcher's local mode and the tests. No AWS account.

It listens on the loopback interface alone, and to nobody who does not have the key that it makes up when it starts.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import s3_client
from launcher.local.signatures import Application, guarded

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client

REGION = "us-east-1"


@dataclass(frozen=True)
class EmbeddedS3:
    """A running server, which answers to requests that are signed with its key.

    Attributes:
        endpoint_url: its address on the loopback interface.
        access_key, secret_key: its own, made up when it started.
    """

    endpoint_url: str
    access_key: str
    secret_key: str = field(repr=False)

    def environment(self, region: str = REGION) -> dict[str, str]:
        """The variables that make boto3 in another process (or in this one) use this server and no other."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": region,
            "AWS_REGION": region,
            "AWS_EC2_METADATA_DISABLED": "true",
            # The settings of an account have no say here.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self, region: str = REGION) -> S3Client:
        """A client of this server, whatever the environment says."""
        return s3_client(self.session(region), endpoint_url=self.endpoint_url)

    def session(self, region: str = REGION) -> Session:
        """A session with this server's credentials, whatever the environment says."""
        import boto3.session

        return boto3.session.Session(self.access_key, self.secret_key, region_name=region)


@contextmanager
def embedded_s3(front: Callable[[Application], Application] | None = None) -> Iterator[EmbeddedS3]:
    """Runs an S3 server on a free port until the block ends.

    Objects are kept in memory until this process ends; two servers of one process show the same buckets.

    Args:
        front: puts an application of its own in front of the server's.

    Raises:
        UserError: moto is not installed.

    Examples:
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
    # As long as AWS's, and not to be taken for one.
    access_key, secret_key = f"EMBEDDED{secrets.token_hex(6).upper()}", secrets.token_urlsafe(30)
    application = guarded(application, lambda key: secret_key if key == access_key else _assumed_secret(key))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield EmbeddedS3(f"http://127.0.0.1:{server.server_port}", access_key, secret_key)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        log.setLevel(level)


def _assumed_secret(access_key: str) -> str | None:
    """The secret of a key that moto's own IAM and STS handed out, to somebody with this server's key."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.iam.models import iam_backends
    from moto.sts.models import sts_backends

    for role in sts_backends[DEFAULT_ACCOUNT_ID]["aws"].assumed_roles:
        if role.access_key_id == access_key:
            return str(role.secret_access_key)
    for user in iam_backends[DEFAULT_ACCOUNT_ID]["aws"].users.values():
        for key in user.access_keys:
            if key.access_key_id == access_key:
                return str(key.secret_access_key)
    return None
