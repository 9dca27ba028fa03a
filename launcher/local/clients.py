"""Clients of the embedded services."""

from __future__ import annotations

from typing import Any

from launcher.aws.clients import Clients, retrying
from launcher.local.s3 import REGION, EmbeddedS3


class EmbeddedClients(Clients):
    """Clients of embedded services, whatever the environment says.

    Args:
        server: the services' address and credentials.
        with_s3: S3 as well; False takes the S3 of the standard AWS settings.
        region: that requests are signed for.
    """

    def __init__(self, server: EmbeddedS3, *, with_s3: bool = True, region: str = REGION) -> None:
        super().__init__()
        self._server, self._with_s3, self._region = server, with_s3, region

    def _make(self, service: str) -> Any:
        from botocore.config import Config

        if service != "s3":
            session: Any = self._server.session(self._region)
            config = retrying(service).merge(Config(proxies={}))  # this machine is not behind a proxy
            return session.client(service, endpoint_url=self._server.endpoint_url, config=config)
        return self._server.client(self._region) if self._with_s3 else super()._make(service)

    def for_a_look(self) -> Any:
        return self("s3")
