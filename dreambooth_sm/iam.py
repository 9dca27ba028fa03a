"""The least rights that a training job needs, as IAM policies.

Examples:
    >>> import json
    >>> from dreambooth_sm.storage import S3Uri
    >>> policy = execution_role_policy(S3Uri("models", "toys"), inputs=[S3Uri("pictures", "zwx")])
    >>> json.dumps(policy)  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dreambooth_sm.storage import S3Options, S3Uri


def execution_role_policy(
    output: S3Uri | None = None,
    options: S3Options = S3Options(),  # noqa: B008 - frozen
    *,
    inputs: Iterable[S3Uri] = (),
    checkpoints: S3Uri | None = None,
    class_cache: S3Uri | None = None,
    image_repository: str | None = None,
    partition: str = "aws",
) -> dict[str, Any]:
    """The policy of a SageMaker execution role: read the inputs, write and verify the output, pull the image, log.

    Args:
        output: prefix that the job uploads its model to, or that SageMaker is given as ``S3OutputPath``.
        options: how the job writes; tags, an ACL and a KMS key need rights of their own. A KMS key that is given as
            an id or an alias is not a resource that a policy can name: give its ARN.
        inputs: prefixes of the channels.
        checkpoints: prefix that SageMaker syncs ``/opt/ml/checkpoints`` with (``CheckpointConfig.S3Uri``).
        class_cache: prefix of the hyperparameter of this name.
        image_repository: ARN of the image's repository in ECR; left out, no right to pull is given, as public images
            and tests need none.
        partition: ``aws``, ``aws-cn`` or ``aws-us-gov``.

    Returns:
        the policy document, for ``json.dumps``.
    """
    statements: list[dict[str, Any]] = []

    def allow(actions: list[str], resources: str | list[str], **condition: Any) -> None:
        statements.append({"Effect": "Allow", "Action": actions, "Resource": resources, **condition})

    def bucket(uri: S3Uri) -> str:
        return uri.bucket if uri.bucket.startswith("arn:") else f"arn:{partition}:s3:::{uri.bucket}"

    def objects(uri: S3Uri) -> str:
        # An access point's objects lie below "/object".
        return f"{bucket(uri)}{'/object' if uri.bucket.startswith('arn:') else ''}/{(uri / '*').prefix}"

    writing = ["s3:PutObject", "s3:GetObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    if options.tags:
        writing.append("s3:PutObjectTagging")
    if options.acl:
        writing.append("s3:PutObjectAcl")
    written = [uri for uri in (output, checkpoints, class_cache) if uri is not None]
    read = list(inputs)
    for actions, places in ((["s3:GetObject"], read), (writing, written)):
        if places:
            allow(actions, [objects(uri) for uri in places])
    for uri in dict.fromkeys([*read, *written]):
        below = {"Condition": {"StringLike": {"s3:prefix": [uri.prefix, (uri / "*").prefix]}}} if uri.prefix else {}
        allow(["s3:ListBucket"], bucket(uri), **below)
    if options.kms_key:
        allow(["kms:GenerateDataKey", "kms:Decrypt"], options.kms_key)
    if image_repository:
        allow(["ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer", "ecr:BatchCheckLayerAvailability"], image_repository)
        allow(["ecr:GetAuthorizationToken"], "*")
    allow(
        ["logs:CreateLogGroup", "logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents"],
        f"arn:{partition}:logs:*:*:log-group:/aws/sagemaker/TrainingJobs*",
    )
    return {"Version": "2012-10-17", "Statement": statements}
