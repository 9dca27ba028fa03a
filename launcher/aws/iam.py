"""The least rights of the two roles that a job needs: the notebook's (or person's) that starts it, and its own.

``dreambooth-launcher iam BUCKET`` prints them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dreambooth_sm.storage import PROBE_NAME, S3Options, S3Uri
from launcher.aws.images import REPOSITORY

Policy = dict[str, Any]

_LOG_GROUP, _ENDPOINT_LOGS = "log-group:/aws/sagemaker/TrainingJobs", "log-group:/aws/sagemaker/Endpoints/"
# Of MLflow's operations, those that tell of a run.
_MLFLOW = (
    *("AccessUI", "CreateExperiment", "CreateRun", "GetExperiment", "GetExperimentByName", "GetRun"),
    *("ListArtifacts", "LogBatch", "LogMetric", "LogParam", "SearchExperiments", "SetTag", "UpdateRun"),
)
_DOING = ("Create", "Describe", "Delete")


def notebook_policy(
    bucket: str, *, account: str = "*", region: str = "*", role: str = "dreambooth-sm", partition: str = "aws"
) -> Policy:
    """Makes the policy of the launcher: to look, to put pictures into the bucket, to start a job and to follow it.

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
    searches = f"arn:{partition}:sagemaker:{region}:{account}:hyper-parameter-tuning-job/*"
    tuning = [f"sagemaker:{do}HyperParameterTuningJob" for do in ("Create", "Describe", "Stop", "ListTrainingJobsFor")]
    batch = f"arn:{partition}:batch:{region}:{account}"
    pictures = f"arn:{partition}:s3:::{bucket}"
    return _policy(
        _allow("FindObjects", ["s3:ListBucket"], pictures),
        _allow("ReadAndWriteObjects", ["s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"], f"{pictures}/*"),
        _allow("RemoveWhatTriedTheUpload", ["s3:DeleteObject"], f"{pictures}/*{PROBE_NAME}"),
        _allow("TrySubjectsAgain", ["s3:DeleteObject"], f"{pictures}/*/fleets/*/outcomes/*"),
        _allow("StartAndStopJobs", [f"sagemaker:{action}" for action in sagemaker], jobs),
        _allow("StartAndStopSearches", [*tuning, "sagemaker:AddTags"], searches),
        # These can't be limited to a resource.
        _allow("ListJobs", ["sagemaker:ListTrainingJobs", "servicequotas:ListServiceQuotas"], "*"),
        _allow("LookAtQueues", ["batch:DescribeJobQueues", "batch:ListServiceJobs"], "*"),
        _allow(
            "SubmitToQueues", ["batch:SubmitServiceJob", "batch:TagResource", "batch:TerminateServiceJob"], f"{batch}:*"
        ),
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


def endpoint_policy(*, account: str = "*", region: str = "*", partition: str = "aws") -> Policy:
    """Makes what the launcher needs beside :func:`notebook_policy` for endpoints: to make, ask, scale and delete them.

    Args:
        account, region, partition: as for :func:`notebook_policy`.
    """
    here = f"arn:{partition}:%s:{region}:{account}:%s"
    made = [here % ("sagemaker", f"{kind}/*") for kind in ("model", "endpoint-config", "endpoint")]
    actions = [f"sagemaker:{do}{kind}" for kind in ("Model", "EndpointConfig", "Endpoint") for do in _DOING]
    asking = [
        "UpdateEndpoint",
        "InvokeEndpoint",
        "InvokeEndpointAsync",
        "InvokeEndpointWithResponseStream",
        "AddTags",
        "ListTags",
    ]
    scaling = ["RegisterScalableTarget", "DeregisterScalableTarget", "DescribeScalableTargets"]
    scaling += ["PutScalingPolicy", "DescribeScalingPolicies"]
    logs = [here % ("logs", f"{_ENDPOINT_LOGS}*")]
    alarms = [here % ("cloudwatch", "alarm:dreambooth-sm-*")]
    linked = f"arn:{partition}:iam::{account}:role/aws-service-role/sagemaker.application-autoscaling.amazonaws.com/*"
    return _policy(
        _allow("MakeAskAndDelete", [*actions, *(f"sagemaker:{each}" for each in asking)], made),
        # These can't be limited to a resource.
        _allow("ListWhatWasMade", ["sagemaker:ListModels", "sagemaker:ListEndpointConfigs"], "*"),
        _allow("Scale", [f"application-autoscaling:{each}" for each in scaling], "*"),
        _allow(
            "WakeFromZero", [f"cloudwatch:{do}" for do in ("PutMetricAlarm", "DeleteAlarms", "TagResource")], alarms
        ),
        _allow("LetAutoScalingAct", ["iam:CreateServiceLinkedRole"], linked),
        _allow("ReadEndpointLogs", ["logs:DescribeLogStreams", "logs:GetLogEvents"], logs),
    )


def registry_policy(*, account: str = "*", region: str = "*", partition: str = "aws") -> Policy:
    """Makes what the launcher needs beside :func:`notebook_policy` for the registry: to add versions and to decide on
    them. Deploying them is :func:`endpoint_policy`'s.

    Args:
        account, region, partition: as for :func:`notebook_policy`.
    """
    here = f"arn:{partition}:sagemaker:{region}:{account}"
    groups, packages, jobs = (f"{here}:{kind}/*" for kind in ("model-package-group", "model-package", "training-job"))
    versions = [f"sagemaker:{do}ModelPackage" for do in ("Create", "Describe", "Update")]
    making = ["sagemaker:CreateModelPackageGroup", "sagemaker:DescribeModelPackageGroup", "sagemaker:AddTags"]
    return _policy(
        _allow("MakeGroups", making, groups),
        _allow("AddAndDecide", versions, [packages, groups]),
        _allow("ReadTagsOfJobs", ["sagemaker:ListTags"], jobs),
    )


def pipeline_policy(*, account: str = "*", region: str = "*", partition: str = "aws") -> Policy:
    """Makes what the launcher needs beside :func:`notebook_policy` for pipelines: to make, run, follow and
    delete them.

    Args:
        account, region, partition: as for :func:`notebook_policy`.
    """
    here = f"arn:{partition}:sagemaker:{region}:{account}"
    making = ["CreatePipeline", "UpdatePipeline", "DeletePipeline", "DescribePipeline", "AddTags", "ListTags"]
    running = ["StartPipelineExecution", "ListPipelineExecutions"]
    following = ["DescribePipelineExecution", "ListPipelineExecutionSteps", "StopPipelineExecution"]
    groups = ["CreateModelPackageGroup", "DescribeModelPackageGroup", "AddTags"]
    return _policy(
        _allow("MakeAndRunPipelines", [f"sagemaker:{each}" for each in (*making, *running)], f"{here}:pipeline/*"),
        _allow("FollowExecutions", [f"sagemaker:{each}" for each in following], f"{here}:pipeline/*"),
        _allow("MakeTheirGroups", [f"sagemaker:{each}" for each in groups], f"{here}:model-package-group/*"),
    )


def pipeline_role_policy(
    *, account: str = "*", region: str = "*", role: str = "dreambooth-sm", partition: str = "aws"
) -> Policy:
    """Makes what the execution role needs beside :func:`execution_policy` where pipelines run by it: to start their
    jobs, and to register what they have trained.

    Args:
        account, region, role, partition: as for :func:`notebook_policy`.
    """
    here = f"arn:{partition}:sagemaker:{region}:{account}"
    kinds = ("TrainingJob", "ProcessingJob")
    jobs = [f"sagemaker:{do}{kind}" for kind in kinds for do in ("Create", "Describe", "Stop")]
    places = [f"{here}:training-job/pipelines-*", f"{here}:processing-job/pipelines-*"]
    versions = ["CreateModelPackage", "DescribeModelPackage", "DescribeModelPackageGroup"]
    packages = [f"{here}:model-package-group/*", f"{here}:model-package/*"]
    logs = f"arn:{partition}:logs:{region}:{account}:log-group:/aws/sagemaker/ProcessingJobs*"
    return _policy(
        _allow("RunSteps", [*jobs, "sagemaker:AddTags"], places),
        _allow("RegisterModels", [f"sagemaker:{each}" for each in versions], packages),
        _allow(
            "WriteLogs",
            ["logs:CreateLogGroup", "logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents"],
            logs,
        ),
        {
            **_allow("GiveItToSteps", ["iam:PassRole"], f"arn:{partition}:iam::{account}:role/{role}"),
            "Condition": {"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}},
        },
    )


def events_policy(*, account: str = "*", region: str = "*", partition: str = "aws") -> Policy:
    """Makes what :func:`launcher.notify` needs, for what its names begin with alone.

    Args:
        account, region, partition: as for :func:`notebook_policy`.
    """
    here = f"arn:{partition}:%s:{region}:{account}:%s"
    kinds = ("rule", "connection", "api-destination")
    made = [here % ("events", f"{kind}/dreambooth-sm-*") for kind in kinds]
    ruling = ["PutRule", "DeleteRule", "PutTargets", "RemoveTargets", "ListTargetsByRule", "TagResource"]
    calling = [f"{do}{kind}" for kind in ("Connection", "ApiDestination") for do in ("Create", "Update", "Delete")]
    topics = ["CreateTopic", "GetTopicAttributes", "SetTopicAttributes", "Subscribe", "TagResource", "DeleteTopic"]
    role = f"arn:{partition}:iam::{account}:role/dreambooth-sm-*"
    roles = ["CreateRole", "TagRole", "UpdateAssumeRolePolicy", "PutRolePolicy", "DeleteRolePolicy", "DeleteRole"]
    linked = f"arn:{partition}:iam::{account}:role/aws-service-role/apidestinations.events.amazonaws.com/*"
    keys = ["CreateSecret", "UpdateSecret", "DeleteSecret", "GetSecretValue", "PutSecretValue"]
    return _policy(
        _allow("MakeRules", [f"events:{each}" for each in (*ruling, *calling)], made),
        _allow("MakeTopics", [f"sns:{each}" for each in topics], here % ("sns", "dreambooth-sm-*")),
        _allow("MakeRolesOfWebhooks", [f"iam:{each}" for each in roles], role),
        {
            **_allow("GiveThemToEventBridgeAlone", ["iam:PassRole"], role),
            "Condition": {"StringEquals": {"iam:PassedToService": "events.amazonaws.com"}},
        },
        _allow("LetEventBridgeCall", ["iam:CreateServiceLinkedRole"], linked),
        # EventBridge keeps a webhook's header as a secret, in the name of whoever makes the connection.
        _allow(
            "KeepKeysOfWebhooks",
            [f"secretsmanager:{each}" for each in keys],
            here % ("secretsmanager", "secret:events!connection/dreambooth-sm-*"),
        ),
    )


def execution_policy(
    bucket: str,
    *,
    account: str = "*",
    region: str = "*",
    partition: str = "aws",
    secrets: Sequence[str] = (),
    mlflow: str | None = None,
) -> Policy:
    """Makes the policy of the job itself: its image, its data and results in the bucket, its log and metrics.

    Args:
        bucket, account, region, partition: as for :func:`notebook_policy`.
        secrets: names of the secrets that ``hf_token_secret`` and ``tracker_secret`` name.
        mlflow: ARN of the server that SageMaker manages and ``mlflow_tracking_uri`` names.
    """
    repository = f"arn:{partition}:ecr:{region}:{account}:repository/{REPOSITORY}"
    policy = execution_role_policy(S3Uri(bucket), image_repository=repository, partition=partition)
    metrics = {
        **_allow("WriteMetrics", ["cloudwatch:PutMetricData"], "*"),
        "Condition": {"StringEquals": {"cloudwatch:namespace": "/aws/sagemaker/TrainingJobs"}},
    }
    more = []
    if secrets:
        # Secrets Manager adds six characters to a secret's name.
        here = f"arn:{partition}:secretsmanager:{region}:{account}:secret"
        names = [f"{here}:{secret}-??????" for secret in secrets]
        more.append(_allow("ReadSecrets", ["secretsmanager:GetSecretValue"], names))
    if mlflow:
        more.append(_allow("TellMLflow", [f"sagemaker-mlflow:{action}" for action in _MLFLOW], mlflow))
    return _policy(*policy["Statement"], metrics, *more)


def execution_role_policy(
    output: S3Uri | None = None,
    options: S3Options = S3Options(),  # noqa: B008 - frozen
    *,
    inputs: Iterable[S3Uri] = (),
    checkpoints: S3Uri | None = None,
    class_cache: S3Uri | None = None,
    image_repository: str | None = None,
    partition: str = "aws",
) -> Policy:
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

    Examples:
        >>> import json
        >>> policy = execution_role_policy(S3Uri("models", "toys"), inputs=[S3Uri("pictures", "zwx")])
        >>> json.dumps(policy)  # doctest: +SKIP
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
        [f"arn:{partition}:logs:*:*:{group}*" for group in (_LOG_GROUP, _ENDPOINT_LOGS)],
    )
    return {"Version": "2012-10-17", "Statement": statements}


def trust_policy() -> Policy:
    """Makes the policy by which SageMaker, and nobody else, may take on the execution role."""
    return _policy({"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"})


def _allow(sid: str, actions: list[str], resource: str | list[str]) -> dict[str, Any]:
    return {"Sid": sid, "Effect": "Allow", "Action": actions, "Resource": resource}


def _policy(*statements: dict[str, Any]) -> Policy:
    return {"Version": "2012-10-17", "Statement": list(statements)}
