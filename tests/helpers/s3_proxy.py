"""A way to an S3 server on which a test sees, and changes, what passes."""

from __future__ import annotations

import http.client
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest

from launcher.local.s3 import EmbeddedS3


@dataclass
class Request:
    """As a client sent it; ``headers`` by their lower-case names."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query, keep_blank_values=True)

    @property
    def bucket(self) -> str:
        return unquote(urlsplit(self.target).path).split("/", 2)[1]

    @property
    def key(self) -> str:
        return unquote(urlsplit(self.target).path).split("/", 2)[-1] if self.operation != "ListObjectsV2" else ""

    @property
    def operation(self) -> str:
        """What S3's API calls it."""
        if "uploads" in self.query:
            return "CreateMultipartUpload"
        if "uploadId" in self.query:
            names = {"PUT": "UploadPart", "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}
            return names[self.method]
        if "list-type" in self.query:
            return "ListObjectsV2"
        return f"{self.method.capitalize()}Object"


@dataclass
class Answer:
    """What a client gets.

    Attributes:
        cut: bytes of the body after which the connection is reset; None to send all of it; -1 to send nothing at all.
        hang_up: whether the connection is closed afterwards, unannounced.
    """

    status: int
    headers: dict[str, str]
    body: bytes = b""
    cut: int | None = None
    hang_up: bool = False

    @classmethod
    def error(cls, status: int, code: str) -> Answer:
        body = f"<Error><Code>{code}</Code><Message>as arranged</Message></Error>".encode()
        return cls(status, {"content-type": "application/xml"}, body)


RESET = Answer(0, {}, cut=-1)
Before = Callable[[Request], Answer | None]
After = Callable[[Request, Answer], None]


@contextmanager
def s3_proxy(
    server: str | EmbeddedS3,
    before: Before = lambda request: None,
    after: After = lambda request, answer: None,
    tls: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
) -> Iterator[str]:
    """Runs a proxy in front of a server; its address.

    Args:
        server: its address; or an embedded one, whose requests are signed again where ``before`` changed them.
        before: sees each request, may change it, and answers it in the server's place unless it returns None.
        after: sees, and may change, each answer of the server.
        tls: to be reached by HTTPS.
        host: to listen at, an address of version 4 or 6.
    """
    upstream = urlsplit(server if isinstance(server, str) else server.endpoint_url).netloc

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_request(self) -> None:
            parts = urlsplit(self.path)
            target = f"{parts.path}?{parts.query}" if parts.query else parts.path
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, target, headers, self.rfile.read(int(headers.get("content-length") or 0)))
            came = deepcopy(request)
            answer = before(request)
            if isinstance(server, EmbeddedS3) and request != came:
                sign_again(request, server)
            if answer is None:
                answer = self.ask(request)
                after(request, answer)
            self.give(answer)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request  # noqa: N815

        def ask(self, request: Request) -> Answer:
            connection = http.client.HTTPConnection(upstream)
            connection.request(request.method, request.target, request.body, request.headers)
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            answer = Answer(response.status, headers, response.read())
            connection.close()
            return answer

        def give(self, answer: Answer) -> None:
            if answer.cut == -1:
                return self.reset()
            self.send_response_only(answer.status)
            for name, value in answer.headers.items():
                if name not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = str(len(answer.body))
            self.send_header(
                "Content-Length", answer.headers.get("content-length", "0") if self.command == "HEAD" else length
            )
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body[: answer.cut])
            if answer.cut is not None:
                self.reset()
            self.close_connection |= answer.hang_up

        def reset(self) -> None:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def get_request(self) -> tuple[socket.socket, object]:
            connection, address = super().get_request()
            return (tls.wrap_socket(connection, server_side=True) if tls else connection), address

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that went away

    with Server((host, 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
        try:
            name = f"[{host}]" if ":" in host else host
            yield f"{'https' if tls else 'http'}://{name}:{proxy.server_address[1]}"
        finally:
            proxy.shutdown()


def sign_again(request: Request, server: EmbeddedS3) -> None:
    """Signs what a test has changed, in the client's place."""
    kept = {n: v for n, v in request.headers.items() if n not in ("authorization", "x-amz-date")}
    unsigned = AWSRequest(request.method, f"http://{kept['host']}{request.target}", kept, request.body)
    unsigned.context["payload_signing_enabled"] = False
    S3SigV4Auth(server.session().get_credentials(), "s3", "us-east-1").add_auth(unsigned)
    request.headers = {name.lower(): value for name, value in unsigned.headers.items()}
