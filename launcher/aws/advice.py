"""Advice on the failures that people meet, by what AWS or the job said."""

from __future__ import annotations

import re

RENEW = "renew your credentials (`aws sso login`, `aws configure`, or set AWS_PROFILE)"
SET_CLOCK = "set this machine's clock: AWS takes requests of the last few minutes only"
LATER = "try again in a few minutes"
CHECK_NETWORK = "check the network, the proxy and AWS_ENDPOINT_URL"

# The first that is found counts: what is more special stands first.
_ADVICE: tuple[tuple[str, str], ...] = (
    (
        r"out of memory|OutOfMemory|too little memory|instance type with more memory|exit code:? 137\b",
        "choose an instance with more memory, such as ml.g5.2xlarge, or lower train_batch_size or resolution; "
        "`dreambooth-sm plan` prints what each card holds",
    ),
    (
        r"exit code:? (?:139|134|135)\b|SIGSEGV|Segmentation fault",
        "a library crashed: run the image as build_and_push.sh builds it, on another instance type such as "
        "ml.g5.xlarge; a damaged base model or picture can be the cause as well: the log says what was read",
    ),
    (
        r"No space left on device|Errno 28|[Dd]isk (?:is )?full|disk quota",
        "give the job a larger volume (volume_gb); where the instance type has disks of its own, take a larger size",
    ),
    (
        r"ResourceLimitExceeded|account-level service limit",
        "ask for a higher quota of this instance type in the Service Quotas console (Amazon SageMaker, 'for training "
        "job usage', and 'for spot training job usage' with spot), or choose another instance type",
    ),
    (
        r"CapacityError|Insufficient capacity|InsufficientInstanceCapacity|InsufficientCapacity|MaxWaitTimeExceeded",
        "no such instance is free now: try again later, leave spot out, or choose another instance type or region",
    ),
    (
        r"MaxRuntimeExceeded",
        "the job reached its maximal run time: give it more minutes; with a checkpoint location it is resumed where it "
        "stopped",
    ),
    (
        r"InternalServerError|InternalFailure|InternalError\b",
        "a fault of AWS's own: start the job again; max_retry_attempts=3 lets SageMaker do that by itself",
    ),
    (
        r"ExpiredToken|[Tt]oken (?:included in the request )?(?:is|has) (?:expired|invalid)|InvalidClientTokenId"
        r"|UnrecognizedClient|Unable to locate credentials|[Cc]redentials .*expired",
        RENEW,
    ),
    (
        r"Signature (?:expired|not yet current)|RequestTimeTooSkewed|RequestExpired"
        r"|difference between the request time and the current time",
        SET_CLOCK,
    ),
    (r"Throttl|Rate exceeded|SlowDown|TooManyRequests|ServiceUnavailable", LATER),
    (
        r"PassRole",
        "allow iam:PassRole on the execution role to your own credentials (`dreambooth-launcher iam` prints the "
        "policy), or set a role that you may pass",
    ),
    (
        r"(?i)(?:could not|cannot|unable to|can't) assume (?:the )?role|assume the role|sts:AssumeRole",
        "let sagemaker.amazonaws.com do sts:AssumeRole in the role's trust policy (see `dreambooth-launcher iam`)",
    ),
    (
        r"ResourceInUse|[Jj]ob name must be unique",
        "set another name, or leave name out",
    ),
    (
        r"gated repo|GatedRepo|awaiting a review from the repo authors|Access to model .* is restricted",
        "accept the model's licence on its page on the hub, keep a token that may read it in AWS Secrets Manager and "
        "name it with hf_token_secret, or pass the model as a directory or s3:// prefix",
    ),
    (
        r"(?i)cannot ?pull|repository .* does not exist|image .* (?:not found|does not exist)|ImageNotFound"
        r"|RepositoryNotFound|manifest unknown|ecr:(?:BatchGetImage|GetDownload|GetAuthorization)",
        "push the image with ./build_and_push.sh in the job's region, and allow the execution role to pull it",
    ),
    (
        r"(?i)kms:\w+|KMSAccessDenied|KMS\.?\w*Exception|kms key",
        "allow kms:GenerateDataKey, kms:Decrypt and, for a volume, kms:CreateGrant on this key to the execution role "
        "and to your own credentials",
    ),
    (
        r"AccessDenied|access denied|not authorized to perform|\b403\b.*Forbidden",
        "allow the action that the message names to the job's execution role, for this bucket, key or image",
    ),
    (
        r"No S3 objects found|NoSuchBucket|bucket does not exist|NoSuchKey|key does not exist|\(404\)"
        r"|there is nothing below|there is no such object",
        "correct the s3:// location: the bucket has to be in the job's region, with files below the prefix",
    ),
    (
        r"(?i)instance type \S+ (?:is )?not (?:supported|available)|unsupported instance type",
        "choose another instance type or region",
    ),
    (
        r"(?i)could not connect to the endpoint|connect timeout|network is unreachable|failed to establish a new conn"
        r"|connect to proxy",
        CHECK_NETWORK + "; in a VPC, the subnets need a way to S3, such as a gateway endpoint",
    ),
)


def advice_for(text: str) -> str | None:
    """Says what to do about a failure; None where nothing is known.

    Args:
        text: what SageMaker, boto3 or the job said.

    Examples:
        >>> advice_for("ThrottlingException: Rate exceeded")
        'try again in a few minutes'
    """
    return next((advice for pattern, advice in _ADVICE if re.search(pattern, text)), None)
