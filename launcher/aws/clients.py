"""Clients of AWS services, real or embedded, made when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import s3_client

if TYPE_CHECKING:
    from boto3.session import Session
    from botocore.config import Config
    from mypy_boto3_s3 import S3Client

# Polling meets CloudWatch's and SageMaker's request limits sooner or later: botocore waits and tries again, alike for
# all services.
_ATTEMPTS = 10
_CONNECT_S, _READ_S = 10, 60
# SageMaker gives an invocation 60 seconds, and asks clients to wait longer.
_INVOCATION_S = 70


def retrying(service: str) -> Config:
    """Configures how every client tries again, but for that of S3, which has the same figures and more.

    What is asked of an endpoint is drawn once, however long that takes.
    """
    from botocore.config import Config

    if service == "sagemaker-runtime":
        return Config(retries={"total_max_attempts": 1}, connect_timeout=_CONNECT_S, read_timeout=_INVOCATION_S)
    return Config(
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        connect_timeout=_CONNECT_S,
        read_timeout=_READ_S,
    )


class Clients:
    """``clients("sagemaker")`` is a boto3 client that retries what is throttled; the same one each time.

    Args:
        session: where credentials and region come from; default: the standard AWS settings.
    """

    def __init__(self, session: Session | None = None) -> None:
        self._session = session
        self._clients: dict[str, Any] = {}

    def __call__(self, service: str) -> Any:
        """Raises UserError where the AWS settings name no region, or a profile that does not exist."""
        if service not in self._clients:
            self._clients[service] = self._make(service)
        return self._clients[service]

    def for_a_look(self) -> S3Client:
        """A client of S3 for a first look, which soon gives up."""
        return s3_client(self._session, attempts=2, timeout=5)

    def is_local(self, service: str) -> bool:
        """Whether the service runs on this machine."""
        return urlsplit(self(service).meta.endpoint_url).hostname in ("127.0.0.1", "localhost", "::1")

    def _make(self, service: str) -> Any:
        import boto3.session
        from botocore.exceptions import BotoCoreError, NoRegionError

        try:
            session: Any = self._session or boto3.session.Session()
            if service == "s3":
                return s3_client(session, attempts=_ATTEMPTS, timeout=_READ_S)
            return session.client(service, config=retrying(service))
        except NoRegionError:
            raise UserError("no AWS region is set: set AWS_DEFAULT_REGION, such as us-west-2") from None
        except (BotoCoreError, ValueError) as error:
            raise UserError(f"the AWS settings do not work: {error}") from error
