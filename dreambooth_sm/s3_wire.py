"""The requests that carry objects, at a tenth of what botocore's own machinery takes for each.

botocore still says where a bucket is reached, in which region, as whom, and with which time-outs and tries; whatever is
rare (lists, starts and ends of multipart uploads, deletions) goes through it. Here a request is signed (Signature
Version 4), sent over a connection that is kept open, and tried again; bodies come from files and go to files without
being held in memory.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import os
import random
import re
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import SplitResult, quote, unquote, urlsplit
from uuid import uuid4

from dreambooth_sm.errors import UserError
from dreambooth_sm.http_answer import Answer

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# Stays in a core's cache between being received, summed up and written.
CHUNK = 2**18
_LONGEST_PAUSE = 20.0
_TRANSIENT_STATUS = {429, 500, 502, 503, 504}
# What S3 answers where the bucket is in another region.
_ELSEWHERE = {"301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
# BadDigest: a body that was damaged on its way.
_TRANSIENT_CODES = {"BadDigest", "InternalError", "RequestTimeout", "SlowDown", "XAmzContentChecksumMismatch"}

T = TypeVar("T")
Headers = Mapping[str, str]


@dataclass(frozen=True)
class Span:
    """Bytes ``first`` to ``first + size`` of a file, as a body: sent by the kernel where it can."""

    file: BinaryIO
    first: int
    size: int

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes, in this thread's `chunk_buffer`.

        Raises:
            OSError: the file ends early.
        """
        buffer, left = chunk_buffer(), self.size
        self.file.seek(self.first)
        while left and (count := self.file.readinto(buffer[:left])):  # type: ignore[attr-defined]
            yield buffer[:count]
            left -= count
        if left:
            raise OSError(f"{self.file.name}: the file ends early")


Body = bytes | Span


_making = threading.Lock()
_wire = lru_cache(maxsize=16)(lambda client, bucket: Wire(client, bucket))


def wire(client: S3Client, bucket: str) -> Wire:
    """The wire to a bucket; the same for the same client, so that its connections are used again.

    Raises:
        UserError: the bucket's requests are not signed with Signature Version 4.
        botocore.exceptions.BotoCoreError: there are no credentials, or the settings are of no use.
    """
    with _making:
        return _wire(client, bucket)


class Wire:
    """Sends requests for the objects of one bucket; may be used by several threads at a time.

    Args:
        client: whose endpoint, credentials, time-outs and number of tries are used.
        bucket: its name, or the ARN of an access point.
    """

    def __init__(self, client: S3Client, bucket: str) -> None:
        self._client: Any = client
        self._bucket = bucket
        config: Any = client.meta.config
        self._user_agent = config.user_agent
        self._timeouts = config.connect_timeout, config.read_timeout
        self._tries = (config.retries or {}).get("total_max_attempts", 8)
        # Where it goes, and connections there that wait for the next request.
        self._way: tuple[Place, list[Connection]] = (_locate(client, bucket), [])

    def put(self, key: str, body: Body, headers: Headers, query: Headers | None = None) -> Headers:
        """Writes an object, or a part of one; the answer's headers.

        Raises:
            botocore.exceptions.ClientError: S3 refused it.
            botocore.exceptions.HTTPClientError: it was not reached, or answered nothing of use, in all tries.
        """
        return self._send("PUT", key, body, headers, query or {}, _headers)

    def head(self, key: str, headers: Headers) -> Headers:
        """The headers of an object. Raises as :meth:`put` does; with the status as code, since there is no body."""
        return self._send("HEAD", key, b"", headers, {}, _headers)

    def get(self, key: str, headers: Headers, receive: Callable[[Answer], T]) -> T:
        """Reads an object.

        Args:
            receive: reads the answer's body and makes the result of it; called again in the next try when it raises
                OSError or HTTPException.

        Raises:
            as :meth:`put` does.
        """
        return self._send("GET", key, b"", headers, {}, receive)

    def _send(
        self,
        method: str,
        key: str,
        body: Body,
        headers: Headers,
        query: Headers,
        receive: Callable[[Answer], T],
    ) -> T:
        from botocore.exceptions import ClientError, HTTPClientError

        failure: Exception
        for number in range(1, self._tries + 1):
            place, idle = self._way
            try:
                return self._try(place, idle, method, key, body, headers, query, receive)
            except ClientError as error:
                failure = error
                if error.response["Error"]["Code"] in _ELSEWHERE and self._moves_from(place):
                    continue
                if not _is_transient(error):
                    raise
            except (OSError, http.client.HTTPException) as error:
                failure = HTTPClientError(error=f"{type(error).__name__}: {error}")
            if number < self._tries:
                time.sleep(min(_LONGEST_PAUSE, 2 ** (number - 1) * random.random()))
        raise failure

    def _try(
        self,
        place: Place,
        idle: list[Connection],
        method: str,
        key: str,
        body: Body,
        headers: Headers,
        query: Headers,
        receive: Callable[[Answer], T],
    ) -> T:
        path = quote(f"{place.base}/{key}", safe="/-_.~")
        asked = "&".join(f"{quote(name, safe='')}={quote(query[name], safe='')}" for name in sorted(query))
        credentials = self._client._get_credentials()
        signed = sign(method, place.host, path, asked, headers, credentials, place.region, datetime.now(UTC))
        size = body.size if isinstance(body, Span) else len(body)
        lines = [f"{method} {place.origin}{path}{'?' + asked if asked else ''} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in signed.items()]
        lines += [f"user-agent: {self._user_agent}", *([f"content-length: {size}"] if method == "PUT" else []), "", ""]
        head = "\r\n".join(lines).encode()
        connection, answer, reusable = self._exchange(place, idle, method, head, body)
        try:
            result = receive(answer) if answer.status < 300 else _refused(method, answer)
        except BaseException:
            connection.close()
            raise
        if reusable and answer.is_reusable:
            idle.append(connection)
        else:
            connection.close()
        if isinstance(result, Exception):
            raise result
        return result

    def _exchange(
        self, place: Place, idle: list[Connection], method: str, head: bytes, body: Body
    ) -> tuple[Connection, Answer, bool]:
        """The connection, the answer, and whether the whole request was sent for it."""
        while True:
            try:
                connection, fresh = idle.pop(), False
            except IndexError:
                connection, fresh = self._connect(place), True
            try:
                # The other end may answer, with a refusal, before it has everything, and take no more.
                whole = False
                with suppress(BrokenPipeError, ConnectionResetError):
                    _send_all(connection.sock, head, body)
                    whole = True
                return connection, Answer(connection.stream, method), whole
            except (OSError, http.client.HTTPException):
                connection.close()
                # One that was kept open may have been closed at the other end meanwhile.
                if fresh:
                    raise

    def _moves_from(self, place: Place) -> bool:
        """Finds out where the bucket is, as botocore does when it is told that it is in another region."""
        from botocore.exceptions import ClientError

        if self._way[0] == place:
            with suppress(ClientError):
                self._client.head_bucket(Bucket=self._bucket)
            self._way = _locate(self._client, self._bucket), []
        return self._way[0] != place

    def _connect(self, place: Place) -> Connection:
        target, proxy = urlsplit(place.url), place.proxy
        connect, read = self._timeouts
        host, port = (proxy.hostname, proxy.port) if proxy else (target.hostname, target.port)
        assert host
        if place.tls:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=connect, context=place.tls
            )
            if proxy:
                secret = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}".encode()
                permit = {"Proxy-Authorization": f"Basic {b64encode(secret).decode()}"} if proxy.username else {}
                assert target.hostname
                connection.set_tunnel(target.hostname, target.port, permit)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=connect)
        connection.connect()
        connection.sock.settimeout(read)
        return Connection(connection.sock, connection.sock.makefile("rb"))


@dataclass(frozen=True)
class Connection:
    """One that is kept open.

    Attributes:
        sock: to send.
        stream: of what is received; it holds what was read ahead.
    """

    sock: socket.socket
    stream: BinaryIO

    def close(self) -> None:
        self.stream.close()
        self.sock.close()


@dataclass(frozen=True)
class Place:
    """Where requests for a bucket go.

    Attributes:
        url: of the bucket, without a slash at its end.
        region: for which requests are signed.
        host: as in the header of this name.
        base: what comes before a key: the bucket, where it is not in the host's name.
        proxy: on the way there.
        tls: for HTTPS.
    """

    url: str
    region: str
    host: str
    base: str
    proxy: SplitResult | None
    tls: ssl.SSLContext | None = field(compare=False)

    @property
    def origin(self) -> str:
        """What a proxy of plain HTTP wants before the path."""
        return f"http://{self.host}" if self.proxy and not self.tls else ""


def _locate(client: Any, bucket: str) -> Place:
    import botocore.session
    from botocore.httpsession import get_cert_path
    from botocore.utils import get_environ_proxies

    url, authorization = _botocores_request(client, bucket)
    scope = re.search(r"Credential=[^,]*/\d{8}/([^/]+)/s3/aws4_request", authorization)
    if not authorization.startswith("AWS4-HMAC-SHA256") or not scope:
        raise UserError(f"s3://{bucket}: its requests are not signed with Signature Version 4: name another bucket")
    url = url.rpartition("/")[0]
    parts = urlsplit(url)
    standard = {"http": 80, "https": 443}[parts.scheme]
    proxy = (client.meta.config.proxies or get_environ_proxies(url)).get(parts.scheme)
    tls = None
    if parts.scheme == "https":
        # AWS_CA_BUNDLE, the profile's ca_bundle, or the certificates that come with botocore.
        bundle = botocore.session.get_session().get_config_variable("ca_bundle")
        tls = ssl.create_default_context(cafile=get_cert_path(bundle or True))
    return Place(
        url=url,
        region=scope.group(1),
        host=f"{parts.hostname}{f':{parts.port}' if parts.port not in (None, standard) else ''}",
        base=unquote(parts.path),
        proxy=urlsplit(proxy if "://" in proxy else f"//{proxy}") if proxy else None,
        tls=tls,
    )


def _botocores_request(client: Any, bucket: str) -> tuple[str, str]:
    """The URL and the authorization with which botocore would ask for an object; nothing is sent."""
    from botocore.awsrequest import AWSResponse
    from urllib3 import HTTPResponse

    key, requests = f"probe-{uuid4().hex}", []

    def keep(request: Any, **_: object) -> AWSResponse | None:
        if not request.url.endswith(key):
            return None  # of another thread
        requests.append(request)
        headers: Any = {}
        return AWSResponse(request.url, 200, headers, HTTPResponse(BytesIO(), preload_content=False))

    client.meta.events.register_first("before-send.s3.HeadObject", keep)
    try:
        client.head_object(Bucket=bucket, Key=key)
    finally:
        client.meta.events.unregister("before-send.s3.HeadObject", keep)
    return requests[0].url, str(requests[0].headers["Authorization"], "ascii")


def sign(
    method: str,
    host: str,
    path: str,
    query: str,
    headers: Headers,
    credentials: Any,
    region: str,
    now: datetime,
) -> dict[str, str]:
    """The headers of a request to S3 with its signature, by AWS Signature Version 4; the body is not signed.

    Args:
        path, query: percent-encoded, the query's fields in order.
        headers: in lower case.
        credentials: botocore's; refreshed by it when they are about to expire.

    Raises:
        botocore.exceptions.NoCredentialsError: there are none.
    """
    from botocore.exceptions import NoCredentialsError

    if credentials is None:
        raise NoCredentialsError
    keys = credentials.get_frozen_credentials()
    moment = now.strftime("%Y%m%dT%H%M%SZ")
    signed = {"host": host, "x-amz-content-sha256": "UNSIGNED-PAYLOAD", "x-amz-date": moment}
    signed |= {name: " ".join(value.split()) for name, value in headers.items()}
    if keys.token:
        signed["x-amz-security-token"] = keys.token
    names = sorted(signed)
    listed = ";".join(names)
    canonical = [method, path, query, *(f"{name}:{signed[name]}" for name in names), "", listed, "UNSIGNED-PAYLOAD"]
    scope = f"{moment[:8]}/{region}/s3/aws4_request"
    digest = hashlib.sha256("\n".join(canonical).encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{digest}"
    signature = hmac.digest(_signing_key(keys.secret_key, moment[:8], region), text.encode(), "sha256").hex()
    credential = f"Credential={keys.access_key}/{scope}"
    signed["authorization"] = f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={listed}, Signature={signature}"
    return signed


@lru_cache(maxsize=4)
def _signing_key(secret: str, date: str, region: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in (date, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def _send_all(sock: socket.socket, head: bytes, body: Body) -> None:
    if isinstance(body, bytes):
        sock.sendall(head + body)
        return
    sock.sendall(head)
    if isinstance(sock, ssl.SSLSocket) or not hasattr(os, "sendfile"):
        for chunk in body.chunks():
            sock.sendall(chunk)
    elif sock.sendfile(body.file, body.first, body.size) != body.size:
        raise OSError(f"{body.file.name}: the file ends early")


_local = threading.local()


def chunk_buffer() -> memoryview:
    """CHUNK bytes of memory that belong to this thread."""
    if not hasattr(_local, "buffer"):
        _local.buffer = memoryview(bytearray(CHUNK))
    return _local.buffer


def _headers(answer: Answer) -> Headers:
    answer.read()
    return answer.headers


def _refused(method: str, answer: Answer) -> Exception:
    """What botocore would raise for such an answer."""
    from xml.etree import ElementTree

    from botocore.exceptions import ClientError

    code, message = str(answer.status), answer.reason
    with suppress(ElementTree.ParseError):
        root = ElementTree.fromstring(answer.read())
        code, message = (root.findtext(name) or default for name, default in (("Code", code), ("Message", message)))
    facts: Any = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": answer.status}}
    return ClientError(facts, {"PUT": "PutObject", "GET": "GetObject", "HEAD": "HeadObject"}[method])


def _is_transient(error: Any) -> bool:
    facts = error.response
    return (
        facts["ResponseMetadata"]["HTTPStatusCode"] in _TRANSIENT_STATUS or facts["Error"]["Code"] in _TRANSIENT_CODES
    )
