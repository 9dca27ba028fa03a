"""The execution role's policy: what the job asks of S3 is allowed, and nothing that it does not ask."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from dreambooth_sm.storage import (
    S3Options,
    S3Uri,
    UploadError,
    check_writable,
    delete_directory,
    download_directory,
    s3_client,
    upload_directory,
    verify,
)
from launcher.aws.iam import execution_role_policy
from launcher.local.s3 import EmbeddedS3
from tests.helpers.s3_proxy import Answer, Request, s3_proxy

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/using-with-s3-policy-actions.html
RIGHTS = {
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "DeleteObject": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
}
PART = 5 * 2**20


def needed(request: Request) -> list[tuple[str, str, str | None]]:
    """Actions, each with its resource and the prefix that is listed."""
    bucket = f"arn:aws:s3:::{request.bucket}"
    if request.operation == "ListObjectsV2":
        return [("s3:ListBucket", bucket, request.query["prefix"][0])]
    actions = [RIGHTS[request.operation]]
    if "x-amz-tagging" in request.headers:
        actions.append("s3:PutObjectTagging")
    if "x-amz-acl" in request.headers:
        actions.append("s3:PutObjectAcl")
    return [(action, f"{bucket}/{request.key}", None) for action in actions]


def allows(policy: dict[str, Any], action: str, resource: str, listed: str | None) -> bool:
    for statement in policy["Statement"]:
        places = statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
        prefixes = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix", ["*"])
        if (
            action in statement["Action"]
            and any(fnmatchcase(resource, place) for place in places)
            and (listed is None or any(fnmatchcase(listed, prefix) for prefix in prefixes))
        ):
            return True
    return False


@pytest.mark.parametrize(
    "options",
    [S3Options(), S3Options(acl="bucket-owner-full-control", tags={"team": "toys"})],
    ids=["plain", "options"],
)
def test_the_policy_allows_what_is_asked_and_no_more(
    s3: EmbeddedS3, target: S3Uri, tmp_path: Path, options: S3Options
) -> None:
    asked: list[tuple[str, str, str | None]] = []
    model = tmp_path / "model"
    model.mkdir()
    (model / "large").write_bytes(bytes(PART + 1))
    (model / "small").write_text("1")

    def fail(request: Request) -> Answer | None:
        asked.extend(needed(request))
        return Answer.error(400, "EntityTooLarge") if request.operation == "UploadPart" else None

    with (
        s3_proxy(s3.endpoint_url, lambda request: asked.extend(needed(request))) as address,
        s3_proxy(s3.endpoint_url, fail) as full,
    ):
        client = s3_client(s3.session(), endpoint_url=address)
        check_writable(target, options, client=client)
        for content in ("2", "3"):
            (model / "small").write_text(content)
            upload_directory(model, target, options, part_size=PART, client=client)
        (model / "large").write_bytes(bytes(PART + 2))
        with pytest.raises(UploadError):  # one that has to be given up
            upload_directory(model, target, options, part_size=PART, client=s3_client(s3.session(), endpoint_url=full))
        (model / "large").write_bytes(bytes(PART + 1))
        upload_directory(model, target, options, part_size=PART, client=client)
        verify(target, options, client=client)
        download_directory(target, tmp_path / "copy", options, client=client)
        delete_directory(target, options, client=client)

    policy = execution_role_policy(target, options)
    assert [request for request in asked if not allows(policy, *request)] == []
    granted = {a for s in policy["Statement"] for a in s["Action"] if a.startswith("s3:")}
    assert granted == {action for action, *_ in asked}
    # Not beside the prefix, and not another bucket.
    assert not allows(policy, "s3:PutObject", f"arn:aws:s3:::{target.bucket}/jobs/duck2/x", None)
    assert not allows(policy, "s3:GetObject", f"arn:aws:s3:::{target.bucket}2/jobs/duck/x", None)
    assert not allows(policy, "s3:ListBucket", f"arn:aws:s3:::{target.bucket}", "jobs/")


def test_inputs_are_read_only() -> None:
    policy = execution_role_policy(inputs=[S3Uri("pictures", "zwx"), S3Uri("models")])
    assert allows(policy, "s3:GetObject", "arn:aws:s3:::pictures/zwx/1.jpg", None)
    assert allows(policy, "s3:ListBucket", "arn:aws:s3:::models", "")
    assert not any("s3:PutObject" in statement["Action"] for statement in policy["Statement"])


def test_access_points_keys_and_images_are_named() -> None:
    point = "arn:aws:s3:us-west-2:123456789012:accesspoint/models"
    key = "arn:aws:kms:us-west-2:123456789012:key/1"
    repository = "arn:aws:ecr:us-west-2:123456789012:repository/dreambooth-sm"
    policy = execution_role_policy(S3Uri(point, "toys"), S3Options(kms_key=key), image_repository=repository)
    assert allows(policy, "s3:PutObject", f"{point}/object/toys/unet/config.json", None)
    assert allows(policy, "s3:ListBucket", point, "toys/")
    assert allows(policy, "kms:GenerateDataKey", key, None)
    assert allows(policy, "ecr:BatchGetImage", repository, None)
