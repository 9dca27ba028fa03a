"""Checks who may talk to an embedded server: a program that signs its requests with the server's key, and no web page.

https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-authenticating-requests.html
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import json
import re
import time
from calendar import timegm
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, unquote_plus
from xml.sax.saxutils import escape

# A WSGI application.
Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
# The secret of an access key; None for one that is not known.
Secrets = Callable[[str], str | None]
# Where the region that a request is signed for is left in its environ.
REGION_KEY = "dreambooth_sm.region"

_ALGORITHM = "AWS4-HMAC-SHA256"
_EMPTY = hashlib.sha256(b"").hexdigest()
# Seconds that clocks may differ, and the longest life of a presigned address.
_SKEW, _LONGEST = 15 * 60, 7 * 86400
# What a refused client has sent is read up to here, so that it sees the refusal and not a broken connection.
_DRAINED = 2**24
_LOOPBACK = re.compile(r"(?:127\.0\.0\.1|\[::1\]|(?:[\w.-]+\.)?localhost)(?::\d+)?", re.ASCII | re.IGNORECASE)
_AUTHORIZATION = re.compile(
    rf"{_ALGORITHM}\s+Credential=(?P<credential>[^,\s]+),\s*SignedHeaders=(?P<headers>[^,\s]+),\s*"
    r"Signature=(?P<signature>[0-9a-f]{64})"
)
# What of a query is part of what version 2 signs.
_SUBRESOURCES = re.compile(
    r"acl|cors|delete|lifecycle|location|logging|notification|partNumber|policy|requestPayment|response-[a-z-]+|restore"
    r"|tagging|torrent|uploadId|uploads|versionId|versioning|versions|website"
)
# Each fault, as S3 names it and as the other services do.
_CODES = {
    "unsigned": ("AccessDenied", "MissingAuthenticationTokenException"),
    "malformed": ("AuthorizationHeaderMalformed", "IncompleteSignatureException"),
    "unknown key": ("InvalidAccessKeyId", "UnrecognizedClientException"),
    "mismatch": ("SignatureDoesNotMatch", "InvalidSignatureException"),
    "skew": ("RequestTimeTooSkewed", "InvalidSignatureException"),
    "expired": ("AccessDenied", "InvalidSignatureException"),
    "body": ("XAmzContentSHA256Mismatch", "InvalidSignatureException"),
    "browser": ("AccessDenied", "AccessDeniedException"),
}


class Refused(Exception):  # noqa: N818
    """A request that is not let through; ``kind`` is one of the faults."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def guarded(application: Application, secret_of: Secrets) -> Application:
    """Lets only requests through that are signed with a known key and come from no web page.

    A page of any site can make a browser send requests to this machine, under this machine's name (which ``Origin``
    tells) or under its own (``Host``). Answers carry no CORS headers.
    """

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            _check_sender(environ)
            environ[REGION_KEY] = authenticate(environ, secret_of)
        except Refused as error:
            return _refuse(environ, start_response, error)

        def without_cors(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            kept = [(name, value) for name, value in headers if not name.lower().startswith("access-control-")]
            return start_response(status, kept, *rest)

        return application(environ, without_cors)

    return answer


def authenticate(environ: dict[str, Any], secret_of: Secrets) -> str:
    """Verifies the signature of a WSGI request, and that its body is the one that was signed.

    Signatures of version 4 in the header or in the address, with the body's checksum, signed chunks or an unsigned
    body; and S3's addresses of version 2, which boto3 still makes in some regions. The body is left in the environ.

    Returns:
        the region that the request is signed for.

    Raises:
        Refused: for what a server of AWS would refuse.
    """
    path, _, query = _target(environ).partition("?")
    pairs = [(unquote(name), unquote_plus(value)) for name, _, value in (p.partition("=") for p in query.split("&"))]
    parameters = dict(pairs)
    if "AWSAccessKeyId" in parameters and "Authorization" not in parameters:
        _verify_version_2(environ, path, parameters, secret_of)
        return "us-east-1"
    signature = _signature(environ, parameters)
    secret = _secret(secret_of, signature.access_key)
    _check_time(signature, parameters)
    signed = {_environ_key(name) for name in signature.headers}
    unsigned = [name for name in _amz_headers(environ) if _environ_key(name) not in signed]
    if "host" not in signature.headers or unsigned:
        raise Refused("mismatch", f"headers that have to be signed and are not: {', '.join(unsigned) or 'host'}")
    presigned = "X-Amz-Signature" in parameters
    declared = environ.get("HTTP_X_AMZ_CONTENT_SHA256") or ("UNSIGNED-PAYLOAD" if presigned else None)
    if declared is None:  # only S3 has it declared
        declared = hashlib.sha256(_body(environ)).hexdigest()
    canonical = "\n".join(
        [
            environ["REQUEST_METHOD"],
            _canonical_path(path, signature.service),
            "&".join(sorted(f"{_quoted(n)}={_quoted(v)}" for n, v in pairs if n and n != "X-Amz-Signature")),
            *(f"{name}:{' '.join(_header(environ, name).split())}" for name in signature.headers),
            "",
            ";".join(signature.headers),
            declared,
        ]
    )
    key = signature.key(secret)
    expected = signature.of(key, _ALGORITHM, _digest(canonical))
    if not hmac.compare_digest(expected, signature.value):
        raise Refused("mismatch", "the signature does not match: check key and secret, and what changed on the way")
    if declared.startswith("STREAMING-AWS4-HMAC-SHA256-PAYLOAD"):
        _verify_chunks(_body(environ), signature, key)
    elif re.fullmatch(r"[0-9a-f]{64}", declared) and hashlib.sha256(_body(environ)).hexdigest() != declared:
        raise Refused("body", "the body is not the one that was signed")
    elif not re.fullmatch(r"[0-9a-f]{64}|UNSIGNED-PAYLOAD|STREAMING-UNSIGNED-PAYLOAD-TRAILER", declared):
        raise Refused("malformed", f"x-amz-content-sha256 is not a checksum: {declared}")
    return signature.region


@dataclass(frozen=True)
class _Signature:
    """A request's signature, as it states it."""

    access_key: str
    date: str
    region: str
    service: str
    time: str
    headers: tuple[str, ...]
    value: str

    @property
    def scope(self) -> str:
        return f"{self.date}/{self.region}/{self.service}/aws4_request"

    def key(self, secret: str) -> bytes:
        key = f"AWS4{secret}".encode()
        for part in (self.date, self.region, self.service, "aws4_request"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        return key

    def of(self, key: bytes, algorithm: str, *what: str) -> str:
        """The signature of what follows algorithm, time and scope."""
        text = "\n".join([algorithm, self.time, self.scope, *what])
        return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _signature(environ: dict[str, Any], parameters: dict[str, str]) -> _Signature:
    if header := environ.get("HTTP_AUTHORIZATION"):
        found = _AUTHORIZATION.fullmatch(header)
        if not found:
            raise Refused("malformed", f"Authorization is not of {_ALGORITHM}")
        credential, headers, value = found["credential"], found["headers"], found["signature"]
        stamp = environ.get("HTTP_X_AMZ_DATE", "")
    elif "X-Amz-Signature" in parameters:
        names = ("X-Amz-Credential", "X-Amz-SignedHeaders", "X-Amz-Signature", "X-Amz-Date")
        credential, headers, value, stamp = (parameters.get(name, "") for name in names)
    else:
        raise Refused("unsigned", "requests to the embedded services have to be signed with their key")
    access_key, *scope = credential.split("/")
    if len(scope) != 4 or scope[-1] != "aws4_request" or stamp[:9] != f"{scope[0]}T":
        raise Refused("malformed", "Credential is not KEY/DATE/REGION/SERVICE/aws4_request with the date of X-Amz-Date")
    date, region, service, _ = scope
    if not re.fullmatch(r"[a-z0-9-]+", region):
        raise Refused("malformed", f"{region!r} is not a region")
    return _Signature(access_key, date, region, service, stamp, tuple(headers.split(";")), value)


def _check_time(signature: _Signature, parameters: dict[str, str]) -> None:
    try:
        made = timegm(time.strptime(signature.time, "%Y%m%dT%H%M%SZ"))
        expires = int(parameters["X-Amz-Expires"]) if "X-Amz-Signature" in parameters else None
    except (KeyError, ValueError):
        raise Refused("malformed", "X-Amz-Date or X-Amz-Expires is not valid") from None
    now = time.time()
    if made > now + _SKEW or (expires is None and made < now - _SKEW):
        raise Refused("skew", f"signed at {signature.time}, more than {_SKEW // 60} minutes off this machine's clock")
    if expires is not None and not 0 < expires <= _LONGEST:
        raise Refused("malformed", f"X-Amz-Expires is not between 1 and {_LONGEST}")
    if expires is not None and now > made + expires:
        raise Refused("expired", "Request has expired")


def _verify_version_2(environ: dict[str, Any], path: str, parameters: dict[str, str], secret_of: Secrets) -> None:
    secret = _secret(secret_of, parameters["AWSAccessKeyId"])
    expires = parameters.get("Expires", "")
    signed = {name: " ".join(_header(environ, name).split()) for name in _amz_headers(environ)}
    signed |= {name.lower(): value for name, value in parameters.items() if name.lower().startswith("x-amz-")}
    resources = [f"{n}={v}" if v else n for n, v in sorted(parameters.items()) if _SUBRESOURCES.fullmatch(n)]
    text = "\n".join(
        [
            environ["REQUEST_METHOD"],
            environ.get("HTTP_CONTENT_MD5", ""),
            environ.get("CONTENT_TYPE", ""),
            expires,
            *(f"{name}:{signed[name]}" for name in sorted(signed)),
            _encoded(path) + ("?" if resources else "") + "&".join(resources),
        ]
    )
    expected = base64.b64encode(hmac.new(secret.encode(), text.encode(), hashlib.sha1).digest()).decode()
    if not hmac.compare_digest(expected.encode(), parameters.get("Signature", "").encode()):
        raise Refused("mismatch", "the signature does not match: check key and secret, and what changed on the way")
    if not expires.isdecimal() or int(expires) < time.time():
        raise Refused("expired", "Request has expired")


def _verify_chunks(body: bytes, signature: _Signature, key: bytes) -> None:
    """Each chunk's signature covers the one before; trailers come last, with one of their own."""
    stream, previous = io.BytesIO(body), signature.value
    while True:
        head = re.fullmatch(rb"([0-9a-fA-F]{1,8});chunk-signature=([0-9a-f]{64})\r\n", stream.readline(200))
        if not head:
            raise Refused("body", "the chunks of the body are malformed")
        chunk = stream.read(int(head[1], 16))
        digest = hashlib.sha256(chunk).hexdigest()
        expected = signature.of(key, f"{_ALGORITHM}-PAYLOAD", previous, _EMPTY, digest)
        if not hmac.compare_digest(expected.encode(), head[2]):
            raise Refused("mismatch", "the signature of a chunk does not match")
        previous = expected
        if not chunk:
            break
        if stream.read(2) != b"\r\n":
            raise Refused("body", "the chunks of the body are malformed")
    trailers = dict(line.split(":", 1) for line in stream.read().decode("latin-1").split("\r\n") if ":" in line)
    given = trailers.pop("x-amz-trailer-signature", None)
    if trailers:
        text = "".join(f"{name.lower().strip()}:{value.strip()}\n" for name, value in sorted(trailers.items()))
        expected = signature.of(key, f"{_ALGORITHM}-TRAILER", previous, _digest(text))
        if not hmac.compare_digest(expected, (given or "").strip()):
            raise Refused("mismatch", "the signature of the trailing headers does not match")


def _check_sender(environ: dict[str, Any]) -> None:
    if not _LOOPBACK.fullmatch(environ.get("HTTP_HOST", "")):
        raise Refused("browser", "the embedded services answer to 127.0.0.1 and localhost only")
    if "HTTP_ORIGIN" in environ:
        raise Refused("browser", "the embedded services answer to no web page")


def _secret(secret_of: Secrets, access_key: str) -> str:
    secret = secret_of(access_key)
    if secret is None:
        raise Refused("unknown key", "the access key is not that of these embedded services")
    return secret


def _body(environ: dict[str, Any]) -> bytes:
    """The whole body, left in the environ for whoever reads it next."""
    stream = environ["wsgi.input"]
    if environ.get("wsgi.input_terminated"):  # comes in chunks of HTTP
        content: bytes = stream.read()
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        environ["wsgi.input_terminated"] = False
        environ["CONTENT_LENGTH"] = str(len(content))
    elif isinstance(stream, io.BytesIO):
        return stream.getvalue()
    else:
        content = bytes(stream.read(int(environ.get("CONTENT_LENGTH") or 0)))
    environ["wsgi.input"] = io.BytesIO(content)
    return content


def _target(environ: dict[str, Any]) -> str:
    """Path and query as they were sent."""
    return re.sub(r"^https?://[^/?]*", "", environ["RAW_URI"])


def _canonical_path(path: str, service: str) -> str:
    return _encoded(path) if service == "s3" else quote(_encoded(path), safe="/-_.~")


def _encoded(path: str) -> str:
    return quote(unquote(path), safe="/-_.~") or "/"


def _quoted(text: str) -> str:
    return quote(text, safe="-_.~")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _header(environ: dict[str, Any], name: str) -> str:
    return str(environ.get(_environ_key(name), "")).encode("latin-1", "replace").decode("utf-8", "replace")


def _environ_key(name: str) -> str:
    key = name.upper().replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"


def _amz_headers(environ: dict[str, Any]) -> Iterator[str]:
    yield from (
        name.removeprefix("HTTP_").lower().replace("_", "-") for name in environ if name.startswith("HTTP_X_AMZ_")
    )


def _refuse(environ: dict[str, Any], start_response: Callable[..., Any], error: Refused) -> list[bytes]:
    """As the protocol that the client speaks has it."""
    if not environ.get("wsgi.input_terminated"):
        environ["wsgi.input"].read(min(int(environ.get("CONTENT_LENGTH") or 0), _DRAINED))
    target, form = environ.get("HTTP_X_AMZ_TARGET"), "form-urlencoded" in environ.get("CONTENT_TYPE", "")
    code = _CODES[error.kind][bool(target or form)]
    if target:
        kind, body = "application/x-amz-json-1.1", json.dumps({"__type": code, "message": str(error)})
    else:
        body = f"<Error><Code>{code}</Code><Message>{escape(str(error))}</Message></Error>"
        kind, body = "application/xml", f"<ErrorResponse>{body}</ErrorResponse>" if form else body
    headers = [("Content-Type", kind), ("Content-Length", str(len(body.encode()))), ("X-Amzn-Errortype", code)]
    start_response("403 Forbidden", headers)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body.encode()]
