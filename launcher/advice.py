"""What to do about the failures that people meet, by what AWS or the job said."""

from __future__ import annotations

import re

_ADVICE: tuple[tuple[str, str], ...] = (
    (
        r"out of memory|OutOfMemory|too little memory|instance type with more memory|exit code: 137",
        "choose an instance with more memory, such as ml.g5.2xlarge, or lower train_batch_size or resolution; "
        "`dreambooth-sm plan` prints what each card holds",
    ),
    (
        r"ResourceLimitExceeded|account-level service limit",
        "ask for a higher quota of this instance type in the Service Quotas console (Amazon SageMaker, 'for training "
        "job usage', and 'for spot training job usage' with spot), or choose another instance type",
    ),
    (
        r"CapacityError|Insufficient capacity|InsufficientInstanceCapacity|MaxWaitTimeExceeded",
        "no such instance is free now: try again later, leave spot out, or choose another instance type or region",
    ),
    (
        r"MaxRuntimeExceeded",
        "the job reached its maximal run time: give it more minutes; with a checkpoint location it goes on where it "
        "stopped",
    ),
    (
        r"gated repo|GatedRepo|awaiting a review from the repo authors|Access to model .* is restricted",
        "accept the model's licence on its page on the hub, keep a token that may read it in AWS Secrets Manager and "
        "name it with hf_token_secret, or pass the model as a directory or s3:// prefix",
    ),
    (
        r"(?i)cannot pull|repository .* does not exist|requested image .* not found|ecr:(?:BatchGetImage|GetDownload)",
        "push the image with ./build_and_push.sh in the job's region, and allow the execution role to pull it",
    ),
    (
        r"AccessDenied|access denied|not authorized to perform|\b403\b.*Forbidden",
        "allow the action that the message names to the job's execution role, for this bucket, key or image",
    ),
    (
        r"No S3 objects found|NoSuchBucket|bucket does not exist",
        "correct the s3:// location: the bucket has to be in the job's region, with files below the prefix",
    ),
    (r"No space left on device", "give the job a larger volume"),
)


def advice_for(text: str) -> str | None:
    """What to do about a failure, or None where nothing is known.

    Args:
        text: what SageMaker, boto3 or the job said.

    Example:
        >>> advice_for("No space left on device")
        'give the job a larger volume'
    """
    return next((advice for pattern, advice in _ADVICE if re.search(pattern, text)), None)
