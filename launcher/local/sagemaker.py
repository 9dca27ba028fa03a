"""An embedded SageMaker: training jobs and endpoints that really run, and a registry, on this machine, behind the API
that boto3 and both SDKs speak.

moto answers for S3, CloudWatch Logs, IAM, STS, ECR and the rest of SageMaker; the operations of training jobs are
answered here, in front of it, and run ``container/train.py`` as a process, or its image in a container; those of
endpoints by :mod:`launcher.local.hosting`, those of tuning jobs by :mod:`launcher.local.tuning`, those of pipelines by
:mod:`launcher.local.pipelines`.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from launcher.local.answers import Operation, RequestError, arn_of, check_shape, pairs, respond, send
from launcher.local.clients import EmbeddedClients
from launcher.local.environment import loader_variables, own_credentials, own_settings, own_tokens
from launcher.local.events import EmbeddedEvents
from launcher.local.hosting import EmbeddedHosting
from launcher.local.pipelines import EmbeddedPipelines, Platform
from launcher.local.processing import EmbeddedProcessing
from launcher.local.program import CONTAINER, ENTRYPOINT
from launcher.local.registry import EmbeddedRegistry
from launcher.local.s3 import REGION, EmbeddedS3
from launcher.local.signatures import REGION_KEY, Application
from launcher.local.training_job import GRACE, TrainingJob
from launcher.local.tuning import EmbeddedTuning
from launcher.local.warm_pools import EmbeddedWarmPools

_TARGET = "SageMaker."
_QUOTAS = "ServiceQuotasV20190624.ListServiceQuotas"
_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")


class EmbeddedSageMaker:
    """Training jobs, each of the region that its request is signed for.

    Args:
        directory: where jobs lay out their ``/opt/ml`` trees.
        server: that jobs keep their logs on, and their files where ``with_s3``.
        with_s3: False lets jobs use this process's AWS settings.
        entrypoint: program that jobs run as a process.
        grace: seconds between SIGTERM and SIGKILL.

    Attributes:
        jobs: by their ARN.
        tuning: the tuning jobs.
    """

    def __init__(
        self,
        directory: Path,
        server: EmbeddedS3,
        *,
        with_s3: bool = True,
        entrypoint: Path = ENTRYPOINT,
        grace: float = GRACE,
    ) -> None:
        self.jobs: dict[str, TrainingJob] = {}
        self._directory = directory
        self._server = server
        self._with_s3 = with_s3
        self._entrypoint = entrypoint
        self._grace = grace
        self._tags: dict[str, dict[str, str]] = {}
        self._events = EmbeddedEvents(server)
        self._warm_pools = EmbeddedWarmPools(directory / "warm-pools")
        self._operations: dict[str, Operation] = {
            "CreateTrainingJob": lambda request, region: self.create(request, region=region),
            "DescribeTrainingJob": lambda request, region: self._find(request, region).describe(),
            "ListTrainingJobs": self._list,
            "StopTrainingJob": self._stop,
        }
        self._hosting = EmbeddedHosting(
            directory / "endpoints",
            server,
            with_s3=with_s3,
            environment=lambda region: self._environment(region, in_container=False, own=False),
            tags=self._tags,
        )
        self.tuning = EmbeddedTuning(self.start, self._tags)
        self._operations |= self._hosting.operations | self.tuning.operations
        registry = EmbeddedRegistry(self._tags)

        def clients(region: str) -> EmbeddedClients:
            return EmbeddedClients(server, with_s3=with_s3, region=region)

        self._processing = EmbeddedProcessing(
            directory / "processing",
            clients,
            lambda region: self._environment(region, in_container=False, own=False),
            self._tags,
        )
        platform = Platform(
            lambda request, region: self.start(request, region=region),
            self._processing.begin,
            registry.operations,
            clients,
        )
        self._pipelines = EmbeddedPipelines(platform, self._tags)
        self._operations |= registry.operations | self._processing.operations | self._pipelines.operations
        self._tag_operations: dict[str, Operation] = {
            "AddTags": self._add_tags,
            "DeleteTags": self._delete_tags,
            "ListTags": lambda request, region: {"Tags": pairs(self._tags[request["ResourceArn"]])},
        }

    def answer(
        self, application: Application, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answers a WSGI request that concerns jobs or endpoints, and passes every other one on."""
        if (answered := self._hosting.invoked(environ, start_response)) is not None:
            return answered
        target = environ.get("HTTP_X_AMZ_TARGET", "")
        if target == _QUOTAS:
            return respond(start_response, lambda request, region: {"Quotas": []}, {}, REGION)  # a laptop has none
        if not target.startswith(_TARGET):
            return _pass_on(application, environ, start_response)
        operation = target.removeprefix(_TARGET)
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        try:
            request = json.loads(body or b"{}")
            own_tags = request.get("ResourceArn") in self._tags
        except (ValueError, AttributeError, TypeError):
            return send(start_response, "400 Bad Request", RequestError("malformed", "SerializationException").answer())
        handler = self._tag_operations.get(operation) if own_tags else self._operations.get(operation)
        if handler is None:
            return _pass_on(application, environ | {"wsgi.input": io.BytesIO(body)}, start_response)

        def checked(request: dict[str, Any], region: str) -> dict[str, Any]:
            check_shape(operation, request)
            return handler(request, region)

        return respond(start_response, checked, request, environ[REGION_KEY])

    def create(
        self, request: dict[str, Any], *, region: str = REGION, directory: Path | None = None, own: bool = False
    ) -> dict[str, Any]:
        """Starts a job; see :meth:`start`.

        Raises:
            RequestError: as SageMaker would answer, or for what only SageMaker can do.
        """
        return {"TrainingJobArn": self.start(request, region=region, directory=directory, own=own).arn}

    def start(
        self,
        request: dict[str, Any],
        *,
        region: str,
        directory: Path | None = None,
        own: bool = False,
        tuning_arn: str = "",
    ) -> TrainingJob:
        """Starts a job.

        Args:
            request: of CreateTrainingJob. Besides ``s3://``, channels, output and checkpoints may be ``file://``
                locations; InstanceType ``local-container`` runs the image, any other a process.
            region: that the job belongs to.
            directory: for the job's ``/opt/ml`` tree, kept when the services end.
            own: whether the job is this process's own, and gets its token of the model hub.
            tuning_arn: of the tuning job that it is a trial of.

        Raises:
            RequestError: as SageMaker would answer, or for what only SageMaker can do.
        """
        _check(request)
        name = request["TrainingJobName"]
        arn = arn_of("training-job", name, region)
        job = TrainingJob(
            request,
            arn,
            directory or self._directory / region / name,
            clients=EmbeddedClients(self._server, with_s3=self._with_s3, region=region),
            environment=self._environment(region, request["ResourceConfig"].get("InstanceType") == CONTAINER, own),
            entrypoint=self._entrypoint,
            grace=self._grace,
            tuning_arn=tuning_arn,
            on_change=self._tell,
        )
        if self.jobs.setdefault(arn, job) is not job:
            raise RequestError(
                f"Job name must be unique within an AWS account and region, and a job with this name already exists "
                f"({arn})",
                "ResourceInUse",
            )
        self._tags[arn] = {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])}
        job.start(self._warm_pools.enter(request, region))
        return job

    def interrupt(self, name: str) -> None:
        """Takes a spot job's instance away: SIGTERM, then a start on a fresh one with its checkpoints.

        Raises:
            ValueError: it is not a spot job, or does not run.
        """
        self.named(name).interrupt()

    def named(self, name: str) -> TrainingJob:
        """The job of this name, the latest of several regions.

        Raises:
            KeyError: there is none.
        """
        return {job.name: job for job in list(self.jobs.values())}[name]

    def close(self) -> None:
        """Stops what still runs, and waits for its end."""
        self._pipelines.close()
        self._processing.close()
        self.tuning.close()
        self._hosting.close()
        running = [job for job in list(self.jobs.values()) if not job.ended]
        for job in running:
            job.stop()
        for job in running:
            job.join()
        self._events.close()

    def _environment(self, region: str, in_container: bool, own: bool) -> dict[str, str]:
        if self._with_s3:
            return {**self._server.environment(region), **(own_tokens() if own else {})}
        return own_credentials() if in_container else own_settings()

    def _tell(self, job: TrainingJob) -> None:
        self._events.tell(job.describe(), self._tags.get(job.arn, {}), job.region)

    def _find(self, request: dict[str, Any], region: str) -> TrainingJob:
        try:
            return self.jobs[arn_of("training-job", request["TrainingJobName"], region)]
        except KeyError:
            raise RequestError("Requested resource not found.") from None

    def _stop(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        try:
            self._find(request, region).stop()
        except ValueError as error:
            raise RequestError(f"The request was rejected because {error}.") from None
        return {}

    def _list(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        jobs = [
            job.summary()
            for job in list(self.jobs.values())
            if job.region == region
            and request.get("NameContains", "") in job.name
            and request.get("StatusEquals", job.status) == job.status
            and request.get("WarmPoolStatusEquals", job.warm_pool_status) == job.warm_pool_status
            and request.get("CreationTimeAfter", 0) <= job.created <= request.get("CreationTimeBefore", float("inf"))
        ]
        keys = {"Name": "TrainingJobName", "Status": "TrainingJobStatus"}
        key = keys.get(request.get("SortBy", ""), "CreationTime")
        jobs.sort(key=lambda job: job[key], reverse=request.get("SortOrder", "Descending") == "Descending")
        if not (token := request.get("NextToken", "0")).isdecimal():
            raise RequestError("NextToken is not one of ListTrainingJobs")
        start = int(token)
        end = start + request.get("MaxResults", 100)
        more = {"NextToken": str(end)} if end < len(jobs) else {}
        return {"TrainingJobSummaries": jobs[start:end], **more}

    def _add_tags(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        tags = self._tags[request["ResourceArn"]]
        tags.update({tag["Key"]: tag["Value"] for tag in request["Tags"]})
        return {"Tags": pairs(tags)}

    def _delete_tags(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        for key in request["TagKeys"]:
            self._tags[request["ResourceArn"]].pop(key, None)
        return {}


def _pass_on(application: Application, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Turns what moto does not know into an error that clients don't try again, without a traceback."""
    try:
        return application(environ, start_response)
    except NotImplementedError as error:
        unknown = RequestError(f"not in the embedded services: {error}", "UnknownOperationException")
        return send(start_response, "400 Bad Request", unknown.answer())


def _check(request: dict[str, Any]) -> None:
    """Raises RequestError for what SageMaker refuses, and for what a laptop can't do."""
    check_shape("CreateTrainingJob", request)
    problems = list(_beyond_a_laptop(request))
    if not _NAME.fullmatch(request["TrainingJobName"]) or len(request["TrainingJobName"]) > 63:
        problems.insert(0, f"TrainingJobName {request['TrainingJobName']!r}: at most 63 letters, digits and hyphens")
    if problems:
        raise RequestError("; ".join(problems))


def _beyond_a_laptop(request: dict[str, Any]) -> Iterator[str]:
    resources = request["ResourceConfig"]
    groups = resources.get("InstanceGroups") or [resources]
    if sum(group.get("InstanceCount", 1) for group in groups) != 1:
        yield "ResourceConfig: the embedded SageMaker runs jobs of one host; set InstanceCount to 1"
    for channel in request.get("InputDataConfig", []):
        source = channel["DataSource"].get("S3DataSource", {})
        if (
            source.get("S3DataType", "S3Prefix") not in ("S3Prefix", "ManifestFile", "Converse")
            or "S3Uri" not in source
        ):
            yield f"channel {channel['ChannelName']}: the embedded SageMaker reads S3 prefixes and manifests only"
        if channel.get("InputMode") == "Pipe":
            yield f"channel {channel['ChannelName']}: the embedded SageMaker has no Pipe mode"
    unsafe = (
        [] if resources.get("InstanceType") == CONTAINER else sorted(loader_variables(request.get("Environment", {})))
    )
    if unsafe:
        yield (
            f"Environment: {', '.join(unsafe)}: decides which code of this machine runs; leave it out, or set "
            f"InstanceType to {CONTAINER}"
        )
    local = request.get("CheckpointConfig", {}).get("LocalPath", "/opt/ml/checkpoints")
    if not local.startswith("/opt/ml/"):
        yield f"CheckpointConfig.LocalPath {local}: the embedded SageMaker keeps checkpoints below /opt/ml"
