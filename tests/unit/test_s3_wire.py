"""Signatures: what botocore makes of the same requests."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from unittest.mock import patch
from urllib.parse import quote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_sm.s3_wire import sign

NOW = datetime(2026, 11, 25, 12, 34, 56, tzinfo=UTC)
words = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
keys = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(
    st.sampled_from(["GET", "HEAD", "PUT"]),
    keys,
    st.dictionaries(st.sampled_from(["partNumber", "uploadId"]), words),
    st.dictionaries(st.sampled_from(["range", "x-amz-acl", "x-amz-tagging", "x-amz-checksum-crc64nvme"]), words),
    st.none() | words,
    st.sampled_from(["us-east-1", "eu-central-1"]),
)
def test_requests_are_signed_as_botocore_signs_them(
    method: str, key: str, query: dict[str, str], headers: dict[str, str], token: str | None, region: str
) -> None:
    host, path = "models.s3.amazonaws.com", "/" + quote(key, safe="/-_.~")
    asked = "&".join(f"{name}={quote(query[name], safe='')}" for name in sorted(query))
    credentials = Credentials("AKIDEXAMPLE", "secret/key", token)
    ours = sign(method, host, path, asked, headers, credentials, region, NOW)

    request = AWSRequest(method, f"https://{host}{path}{'?' + asked if asked else ''}", headers=headers)
    request.context["client_config"] = Config(s3={"payload_signing_enabled": False})
    with patch("botocore.auth.get_current_datetime", return_value=NOW.replace(tzinfo=None)):
        S3SigV4Auth(credentials, "s3", region).add_auth(request)
    assert ours["authorization"] == request.headers["Authorization"]
    assert ours["x-amz-date"] == request.headers["X-Amz-Date"]
    assert ours.get("x-amz-security-token") == token


def test_credentials_are_asked_for_anew_for_each_request() -> None:
    """They may have been renewed since."""
    names = iter(["first", "second"])
    renewed = SimpleNamespace(get_frozen_credentials=lambda: Credentials(next(names), "s").get_frozen_credentials())
    for name in ("first", "second"):
        assert f"Credential={name}/" in sign("GET", "h", "/k", "", {}, renewed, "us-east-1", NOW)["authorization"]
