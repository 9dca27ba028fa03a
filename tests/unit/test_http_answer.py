"""Answers to HTTP requests: read as `http.client` reads them, and never taken for whole when they are not."""

from __future__ import annotations

import http.client
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dreambooth_sm.http_answer import Answer

names = st.sampled_from(["ETag", "x-amz-checksum-crc64nvme", "Content-Range", "Server"])
values = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
bodies = st.binary(max_size=300)


def message(body: bytes, framing: str, headers: dict[str, str], status: str = "200 OK", version: str = "1.1") -> bytes:
    lines = [f"HTTP/{version} {status}", *(f"{name}:  {value}" for name, value in headers.items())]
    if framing == "length":
        lines.append(f"Content-Length: {len(body)}")
    if framing == "chunks":
        lines.append("transfer-encoding: chunked")
        pieces = [body[first : first + 70] for first in range(0, len(body), 70)]
        body = (
            b"".join(b"%X;name=value\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nTrailer: 1\r\n\r\n"
        )
    return "\r\n".join([*lines, "", ""]).encode() + body


def read_with_http_client(content: bytes, method: str) -> http.client.HTTPResponse:
    sock: Any = SimpleNamespace(makefile=lambda mode: BytesIO(content))
    response = http.client.HTTPResponse(sock, method=method)
    response.begin()
    return response


@given(
    st.sampled_from(["GET", "HEAD"]),
    bodies,
    st.sampled_from(["length", "chunks", "end"]),
    st.dictionaries(names, values),
    st.sampled_from(["200 OK", "206 Partial Content", "204 No Content", "404 Not Found", "503"]),
    st.sampled_from(["1.1", "1.0"]),
    st.sampled_from([{}, {"Connection": "close"}, {"Connection": "Keep-Alive"}]),
)
def test_it_is_what_http_client_reads(
    method: str,
    body: bytes,
    framing: str,
    headers: dict[str, str],
    status: str,
    version: str,
    connection: dict[str, str],
) -> None:
    assume(not (framing == "chunks" and status.startswith("204")))  # RFC 9112 forbids it
    content = message(body, framing, headers | connection, status, version)
    theirs, ours = read_with_http_client(content, method), Answer(BytesIO(content), method)
    assert (ours.status, ours.reason) == (theirs.status, theirs.reason)
    assert ours.headers == {name.lower(): value for name, value in theirs.getheaders()}
    assert ours.length == theirs.length
    stays = not theirs.will_close
    assert ours.read() == theirs.read()
    if framing != "end":
        assert ours.is_reusable == stays


@given(bodies, bodies, st.sampled_from(["length", "chunks"]))
def test_the_next_answer_follows(first: bytes, second: bytes, framing: str) -> None:
    stream = BytesIO(b"HTTP/1.1 100 Continue\r\n\r\n" + message(first, framing, {}) + message(second, framing, {}))
    for body in (first, second):
        answer = Answer(stream, "GET")
        assert answer.is_reusable == (framing == "length" and not body)
        assert answer.read() == body
        assert answer.is_reusable


@given(bodies, st.sampled_from(["length", "chunks"]), st.data())
def test_one_that_breaks_off_is_never_whole(body: bytes, framing: str, data: st.DataObject) -> None:
    content = message(body, framing, {"ETag": "1"})
    cut = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises((OSError, http.client.HTTPException)):
        Answer(BytesIO(content[:cut]), "GET").read()


@pytest.mark.parametrize(
    "content",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 two hundred\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno header\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000 + b"\r\n",
        b"HTTP/1.1 200 " + b"O" * 100_000,
    ],
)
def test_what_is_no_answer_is_refused(content: bytes) -> None:
    with pytest.raises(http.client.HTTPException):
        Answer(BytesIO(content), "GET").read()
