"""An embedded SageMaker: training jobs that really run, on this machine, behind the API that boto3 and both SDKs speak.

moto answers for S3, CloudWatch Logs, IAM, STS, ECR and the rest of SageMaker; the training job operations are answered
here, in front of it, and run ``container/train.py`` as a process, or its image in a container.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_sm import __version__
from dreambooth_sm.embedded import REGION, Application, EmbeddedS3, embedded_s3
from launcher.clients import Clients, retrying
from launcher.local import ENTRYPOINT
from launcher.training import GRACE, Training

ACCOUNT = "123456789012"  # moto's
_REPOSITORY = _ROLE = "dreambooth-sm"  # the repository as build_and_push.sh names it
_TARGET = "SageMaker."
_QUOTAS = "ServiceQuotasV20190624.ListServiceQuotas"
_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")


class RequestError(Exception):
    """What the API refuses; ``code`` is the error's name."""

    def __init__(self, message: str, code: str = "ValidationException") -> None:
        super().__init__(message)
        self.code = code

    def answer(self) -> dict[str, str]:
        """As AWS's JSON protocol has it."""
        return {"__type": self.code, "message": str(self)}


class EmbeddedSageMaker:
    """Training jobs by name.

    Args:
        directory: where jobs lay out their ``/opt/ml`` trees.
        clients: makes those of S3 and CloudWatch Logs that a job uses.
        environment: of each job, over this process's own.
        entrypoint: program that jobs run as a process.
        grace: seconds between SIGTERM and SIGKILL.
    """

    def __init__(
        self,
        directory: Path,
        clients: Callable[[], Clients],
        environment: Mapping[str, str],
        *,
        entrypoint: Path = ENTRYPOINT,
        grace: float = GRACE,
    ) -> None:
        self.jobs: dict[str, Training] = {}
        self._directory = directory
        self._clients = clients
        self._environment = dict(environment)
        self._entrypoint = entrypoint
        self._grace = grace
        self._tags: dict[str, dict[str, str]] = {}
        self._operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "CreateTrainingJob": self.create,
            "DescribeTrainingJob": lambda request: self._find(request).describe(),
            "ListTrainingJobs": self._list,
            "StopTrainingJob": self._stop,
        }
        self._tag_operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "AddTags": self._add_tags,
            "DeleteTags": self._delete_tags,
            "ListTags": lambda request: {"Tags": _pairs(self._tags[request["ResourceArn"]])},
        }

    def answer(
        self, application: Application, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answers a WSGI request that concerns training jobs, and passes every other one on."""
        target = environ.get("HTTP_X_AMZ_TARGET", "")
        if target == _QUOTAS:
            return _respond(start_response, lambda request: {"Quotas": []}, {})  # a laptop has none
        if not target.startswith(_TARGET):
            return _pass_on(application, environ, start_response)
        operation = target.removeprefix(_TARGET)
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        request = json.loads(body or b"{}")
        own_tags = request.get("ResourceArn") in self._tags
        handler = self._tag_operations.get(operation) if own_tags else self._operations.get(operation)
        if handler is None:
            return _pass_on(application, environ | {"wsgi.input": io.BytesIO(body)}, start_response)
        return _respond(start_response, handler, request)

    def create(self, request: dict[str, Any], *, directory: Path | None = None) -> dict[str, Any]:
        """Starts a job.

        Args:
            request: of CreateTrainingJob. Besides ``s3://``, channels, output and checkpoints may be ``file://``
                locations; InstanceType ``local-container`` runs the image, any other a process.
            directory: for the job's ``/opt/ml`` tree, kept when the services end.

        Raises:
            RequestError: as SageMaker would answer, or for what only SageMaker can do.
        """
        _check(request)
        name = request["TrainingJobName"]
        arn = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/{name}"
        if name in self.jobs:
            raise RequestError(
                f"Job name must be unique within an AWS account and region, and a job with this name already exists "
                f"({arn})",
                "ResourceInUse",
            )
        job = Training(
            request,
            arn,
            directory or self._directory / name,
            clients=self._clients(),
            environment=self._environment,
            entrypoint=self._entrypoint,
            grace=self._grace,
        )
        self.jobs[name] = job
        self._tags[arn] = {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])}
        job.start()
        return {"TrainingJobArn": arn}

    def interrupt(self, name: str) -> None:
        """Takes a spot job's instance away: SIGTERM, then a start on a fresh one with its checkpoints.

        Raises:
            ValueError: it is no spot job, or does not run.
        """
        self.jobs[name].interrupt()

    def close(self) -> None:
        """Stops the jobs that still run, and waits for their end."""
        running = [job for job in self.jobs.values() if not job.ended]
        for job in running:
            job.stop()
        for job in running:
            job.join()

    def _find(self, request: dict[str, Any]) -> Training:
        try:
            return self.jobs[request["TrainingJobName"]]
        except KeyError:
            raise RequestError("Requested resource not found.") from None

    def _stop(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self._find(request).stop()
        except ValueError as error:
            raise RequestError(f"The request was rejected because {error}.") from None
        return {}

    def _list(self, request: dict[str, Any]) -> dict[str, Any]:
        jobs = [
            job.summary()
            for job in self.jobs.values()
            if request.get("NameContains", "") in job.name
            and request.get("StatusEquals", job.status) == job.status
            and request.get("CreationTimeAfter", 0) <= job.created <= request.get("CreationTimeBefore", float("inf"))
        ]
        keys = {"Name": "TrainingJobName", "Status": "TrainingJobStatus"}
        key = keys.get(request.get("SortBy", ""), "CreationTime")
        jobs.sort(key=lambda job: job[key], reverse=request.get("SortOrder", "Descending") == "Descending")
        start = int(request.get("NextToken", 0))
        end = start + request.get("MaxResults", 100)
        more = {"NextToken": str(end)} if end < len(jobs) else {}
        return {"TrainingJobSummaries": jobs[start:end], **more}

    def _add_tags(self, request: dict[str, Any]) -> dict[str, Any]:
        tags = self._tags[request["ResourceArn"]]
        tags.update({tag["Key"]: tag["Value"] for tag in request["Tags"]})
        return {"Tags": _pairs(tags)}

    def _delete_tags(self, request: dict[str, Any]) -> dict[str, Any]:
        for key in request["TagKeys"]:
            self._tags[request["ResourceArn"]].pop(key, None)
        return {}


def _pass_on(application: Application, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """What moto does not know becomes an error that clients don't try again, without a traceback."""
    try:
        return application(environ, start_response)
    except NotImplementedError as error:
        unknown = RequestError(f"not in the embedded services: {error}", "UnknownOperationException")
        return _send(start_response, "400 Bad Request", unknown.answer())


def _respond(
    start_response: Callable[..., Any], handler: Callable[[dict[str, Any]], dict[str, Any]], request: dict[str, Any]
) -> list[bytes]:
    try:
        return _send(start_response, "200 OK", handler(request))
    except RequestError as error:
        return _send(start_response, "400 Bad Request", error.answer())


def _send(start_response: Callable[..., Any], status: str, answer: dict[str, Any]) -> list[bytes]:
    body = json.dumps(answer).encode()
    start_response(status, [("Content-Type", "application/x-amz-json-1.1"), ("Content-Length", str(len(body)))])
    return [body]


def _check(request: dict[str, Any]) -> None:
    """Raises RequestError for what SageMaker refuses, and for what a laptop can't do."""
    import botocore.session
    from botocore.validate import ParamValidator

    shape = (
        botocore.session.get_session().get_service_model("sagemaker").operation_model("CreateTrainingJob").input_shape
    )
    assert shape is not None
    report = ParamValidator().validate(request, shape)
    problems = [report.generate_report()] if report.has_errors() else []
    if not problems:
        if not _NAME.fullmatch(request["TrainingJobName"]) or len(request["TrainingJobName"]) > 63:
            problems.append(f"TrainingJobName {request['TrainingJobName']!r}: at most 63 letters, digits and hyphens")
        problems += _beyond_a_laptop(request)
    if problems:
        raise RequestError("; ".join(problems))


def _beyond_a_laptop(request: dict[str, Any]) -> Iterator[str]:
    resources = request["ResourceConfig"]
    groups = resources.get("InstanceGroups") or [resources]
    if sum(group.get("InstanceCount", 1) for group in groups) != 1:
        yield "ResourceConfig: the embedded SageMaker runs jobs of one host; set InstanceCount to 1"
    for channel in request.get("InputDataConfig", []):
        source = channel["DataSource"].get("S3DataSource", {})
        if source.get("S3DataType", "S3Prefix") not in ("S3Prefix", "Converse") or "S3Uri" not in source:
            yield f"channel {channel['ChannelName']}: the embedded SageMaker reads S3 prefixes only"
        if channel.get("InputMode") == "Pipe":
            yield f"channel {channel['ChannelName']}: the embedded SageMaker has no Pipe mode"
    local = request.get("CheckpointConfig", {}).get("LocalPath", "/opt/ml/checkpoints")
    if not local.startswith("/opt/ml/"):
        yield f"CheckpointConfig.LocalPath {local}: the embedded SageMaker keeps checkpoints below /opt/ml"


def _pairs(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in tags.items()]


class EmbeddedClients(Clients):
    """Clients of embedded services, whatever the environment says.

    Args:
        server: the services' address and credentials.
        with_s3: S3 as well; False takes the S3 of the standard AWS settings.
    """

    def __init__(self, server: EmbeddedS3, *, with_s3: bool = True) -> None:
        super().__init__()
        self._server, self._with_s3 = server, with_s3

    def _make(self, service: str) -> Any:
        if service != "s3":
            session: Any = self._server.session()
            return session.client(service, endpoint_url=self._server.endpoint_url, config=retrying())
        return self._server.client() if self._with_s3 else super()._make(service)


@dataclass(frozen=True)
class EmbeddedServices(EmbeddedS3):
    """SageMaker, CloudWatch Logs, S3 and what else moto has, on one address of the loopback interface.

    Attributes:
        sagemaker: the training jobs.
        with_s3: whether jobs use this S3, or the one of the standard AWS settings.
    """

    sagemaker: EmbeddedSageMaker
    with_s3: bool

    @property
    def role(self) -> str:
        """ARN of the execution role that :meth:`set_up_account` makes."""
        return f"arn:aws:iam::{ACCOUNT}:role/{_ROLE}"

    def clients(self) -> Clients:
        """Clients of the services that jobs use."""
        return EmbeddedClients(self, with_s3=self.with_s3)

    def set_up_account(self) -> None:
        """Makes what an account needs for jobs: an execution role, this version's image, the SDKs' bucket."""
        clients = EmbeddedClients(self)
        trust = {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"digest": f"sha256:{hashlib.sha256(b'').hexdigest()}"},
            "layers": [],
        }
        image = {"repositoryName": _REPOSITORY, "imageTag": __version__, "imageManifest": json.dumps(manifest)}
        with _unless_there():
            clients("iam").create_role(RoleName=_ROLE, AssumeRolePolicyDocument=policy)
        with _unless_there():
            clients("ecr").create_repository(repositoryName=_REPOSITORY)
        with _unless_there():
            clients("ecr").put_image(**image)
        with _unless_there():
            clients("s3").create_bucket(Bucket=f"sagemaker-{REGION}-{ACCOUNT}")


@contextmanager
def _unless_there() -> Iterator[None]:
    """moto keeps what it made until this process ends."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        if "Already" not in error.response["Error"]["Code"]:
            raise


@contextmanager
def embedded_services(
    *, with_s3: bool = True, entrypoint: Path = ENTRYPOINT, grace: float = GRACE
) -> Iterator[EmbeddedServices]:
    """Runs the services until the block ends, which stops the jobs that still run.

    Args:
        with_s3: False lets jobs use the S3 of the standard AWS settings, credentials and all.
        entrypoint: program that jobs run as a process, in the place of the image's.
        grace: seconds between a job's SIGTERM and SIGKILL.

    Raises:
        UserError: moto is not installed.

    Example:
        >>> with embedded_services() as services:
        ...     services.clients()("sagemaker").list_training_jobs()["TrainingJobSummaries"]
        []
    """
    sagemaker: EmbeddedSageMaker

    def front(application: Application) -> Application:
        return lambda environ, start_response: sagemaker.answer(application, environ, start_response)

    with tempfile.TemporaryDirectory(prefix="dreambooth-sm-") as directory, embedded_s3(front) as server:
        sagemaker = EmbeddedSageMaker(
            Path(directory),
            lambda: EmbeddedClients(server, with_s3=with_s3),
            server.environment() if with_s3 else {},
            entrypoint=entrypoint,
            grace=grace,
        )
        try:
            yield EmbeddedServices(server.endpoint_url, sagemaker, with_s3)
        finally:
            sagemaker.close()
