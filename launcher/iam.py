"""The least rights of the two roles that a job needs: the notebook's (or person's) that starts it, and its own.

``dreambooth-launcher iam BUCKET`` prints them.
"""

from __future__ import annotations

from typing import Any

from launcher.account import REPOSITORY
from launcher.training_request import WORKSPACE

Policy = dict[str, Any]

_LOG_GROUP = "log-group:/aws/sagemaker/TrainingJobs"


def notebook_policy(
    bucket: str, *, account: str = "*", region: str = "*", role: str = "dreambooth-sm", partition: str = "aws"
) -> Policy:
    """What the launcher needs: to look, to put pictures into the bucket, to start a job and to follow it.

    Args:
        bucket: that pictures, checkpoints and models lie in.
        account: number of the account; ``*``: any.
        region: that jobs run in; ``*``: any.
        role: name of the execution role, with its path if it has one.
        partition: ``aws``, ``aws-cn`` or ``aws-us-gov``.
    """
    role_arn = f"arn:{partition}:iam::{account}:role/{role}"
    jobs = f"arn:{partition}:sagemaker:{region}:{account}:training-job/*"
    logs = f"arn:{partition}:logs:{region}:{account}:{_LOG_GROUP}*"
    sagemaker = ["CreateTrainingJob", "DescribeTrainingJob", "StopTrainingJob", "AddTags"]
    return _policy(
        *_bucket(bucket, partition),
        _allow("StartAndStopJobs", [f"sagemaker:{action}" for action in sagemaker], jobs),
        # These can't be limited to a resource.
        _allow("ListJobs", ["sagemaker:ListTrainingJobs", "servicequotas:ListServiceQuotas"], "*"),
        _allow("ReadLogs", ["logs:DescribeLogStreams", "logs:GetLogEvents", "logs:FilterLogEvents"], logs),
        _allow(
            "FindImage",
            ["ecr:DescribeRepositories", "ecr:DescribeImages"],
            f"arn:{partition}:ecr:{region}:{account}:repository/{REPOSITORY}",
        ),
        _allow("LookAtRole", ["iam:GetRole"], role_arn),
        {
            **_allow("GiveRoleToSageMakerAlone", ["iam:PassRole"], role_arn),
            "Condition": {"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}},
        },
    )


def execution_policy(bucket: str, *, account: str = "*", region: str = "*", partition: str = "aws") -> Policy:
    """What the job itself needs: its image, its data and results in the bucket, its log and metrics.

    Args:
        bucket, account, region, partition: as for :func:`notebook_policy`.
    """
    pull = ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
    log = ["logs:CreateLogGroup", "logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents"]
    return _policy(
        *_bucket(bucket, partition),
        _allow("PullImage", pull, f"arn:{partition}:ecr:{region}:{account}:repository/{REPOSITORY}"),
        _allow("LogInToRegistry", ["ecr:GetAuthorizationToken"], "*"),
        _allow("WriteLog", log, f"arn:{partition}:logs:{region}:{account}:{_LOG_GROUP}*"),
        {
            **_allow("WriteMetrics", ["cloudwatch:PutMetricData"], "*"),
            "Condition": {"StringEquals": {"cloudwatch:namespace": "/aws/sagemaker/TrainingJobs"}},
        },
    )


def trust_policy() -> Policy:
    """Who may take on the execution role: SageMaker, and nobody else."""
    return _policy({"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"})


def _bucket(bucket: str, partition: str) -> list[dict[str, Any]]:
    """Reading and writing a bucket's objects; nothing of the bucket's own settings. Only a job's own prefix may be
    deleted from: checkpoints are."""
    arn = f"arn:{partition}:s3:::{bucket}"
    return [
        _allow("FindObjects", ["s3:ListBucket", "s3:GetBucketLocation"], arn),
        _allow("ReadAndWriteObjects", ["s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"], f"{arn}/*"),
        _allow("RemoveCheckpoints", ["s3:DeleteObject"], f"{arn}/{WORKSPACE}/checkpoints/*"),
    ]


def _allow(sid: str, actions: list[str], resource: str) -> dict[str, Any]:
    return {"Sid": sid, "Effect": "Allow", "Action": actions, "Resource": resource}


def _policy(*statements: dict[str, Any]) -> Policy:
    return {"Version": "2012-10-17", "Statement": list(statements)}
