"""From options to a prepared pipeline: its training job is checked as any, its files are staged once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS
from dreambooth_sm.report import MEASURES
from dreambooth_sm.storage import S3Uri
from launcher.aws.account import Account
from launcher.aws.service_errors import Kind, ServiceError, asking
from launcher.channels import FOLDER
from launcher.draft import ON_THIS_MACHINE
from launcher.endpoints.requests import container_of
from launcher.measured import CLASS_CACHE, caching, measuring, with_values
from launcher.pipelines.definition import (
    EXECUTION,
    MOST_ARGUMENTS,
    Registration,
    model_of,
    pipeline_definition,
)
from launcher.pipelines.pipeline import PIPELINE_TAG, TrainingPipeline, find_pipeline, is_owned
from launcher.prepare import PreparedJob, prepare
from launcher.registry.groups import make_group
from launcher.registry.requests import group_request, refused_version
from launcher.training_request import MAX_TAGS, MODEL_CHANNEL, training_request

# What a processing job runs on where nothing else is said: it reads some pictures, or a page of JSON.
CHECK_INSTANCE = "ml.m5.large"
# Options of a job that mean nothing, or harm, where each execution has a job and a place of its own.
_NOT_OURS = {
    "checkpoint": "each execution has a place of its own; leave it out",
    "compression": "the registry takes models that lie in S3 as plain files; leave it out",
    "network_isolation": "the job sends its model itself; leave it out",
    "manual_upload_model_path": "each execution has a place of its own; leave it out, and set output",
    "manul_upload_model_path": "each execution has a place of its own; leave it out, and set output",
    "output_mode": "the job sends its model itself; leave it out",
    "fleet": "a pipeline trains one subject; leave it out",
    "fleet_outcomes": "a pipeline trains one subject; leave it out",
}


@dataclass
class PreparedPipeline:
    """A pipeline that has been checked.

    Attributes:
        job: a training job of it.
        registration: what becomes of a model that is good enough.
        definition: by the schema's version 2020-12-01.
        added: hyperparameters that were set for its decision.
    """

    name: str
    job: PreparedJob
    registration: Registration
    definition: dict[str, Any]
    added: Mapping[str, object]

    @property
    def tags(self) -> dict[str, str]:
        """Those of the job, and what the pipeline is known by."""
        return {**self.job.resources.tags, PIPELINE_TAG: self.name}

    @property
    def request(self) -> dict[str, Any]:
        """For ``create_pipeline``."""
        return {
            "PipelineName": self.name,
            "PipelineDescription": f"Trains, measures, and registers in {self.registration.group}: dreambooth-sm",
            "PipelineDefinition": json.dumps(self.definition),
            "RoleArn": self.job.resources.role,
            "Tags": [{"Key": key, "Value": value} for key, value in self.tags.items()],
        }

    def lines(self) -> list[str]:
        """Tells people what will be made."""
        limits = " and ".join(f"{name} {limit:g}" for name, limit in self.registration.required.items())
        return [
            f"pipeline: {self.name}, registers in {self.registration.group} what has {limits}",
            *(f"{name}: {value}" for name, value in self.added.items()),
            *(line for line in self.job.lines() if not line.startswith("job: ")),
        ]

    def submit(self, say: Callable[[str], None] = lambda line: None) -> TrainingPipeline:
        """Stages the files, and makes the pipeline and its group; or changes the one that is there.

        Raises:
            UserError: the name is that of somebody else's pipeline, or SageMaker refuses it.
            ServiceError: AWS can't be reached, or not with these credentials.
            TransferError: the transfer failed in spite of retries.
        """
        account = self.job.account
        assert account is not None
        sagemaker = account.clients("sagemaker")
        found = find_owned(self.name, sagemaker)
        self.job.stage(say)
        make_group(group_request(self.registration.group, self.job.resources.tags), sagemaker)
        request = self.request
        kept = {key: value for key, value in request.items() if key != "Tags"}
        if found is None:
            _send("made", self.name, lambda: sagemaker.create_pipeline(**request))
        elif any(found.get(key) != value for key, value in kept.items()):
            _send("changed", self.name, lambda: sagemaker.update_pipeline(**kept))
        with asking(f"the tags of {self.name} can't be set"):
            if found is not None:
                sagemaker.add_tags(ResourceArn=found["PipelineArn"], Tags=request["Tags"])
        say(f"pipeline: {'made' if found is None else 'is there'}: {self.name}")
        return TrainingPipeline(self.name, account.clients)


def prepare_pipeline(
    options: Mapping[str, Any],
    group: str,
    required: Mapping[str, float],
    account: Account,
    *,
    approval: str,
    check_instance: str = CHECK_INSTANCE,
) -> PreparedPipeline:
    """Checks everything that can be checked of a pipeline.

    Args:
        options: of a training job; ``name`` is the pipeline's, and ``output`` the prefix of all executions.
        group, approval: as for :meth:`launcher.Job.register`.
        required: measures to their limits.

    Raises:
        UserError: with everything that was found.
    """
    name = str(options.get("name") or f"dreambooth-{group}")
    tags = options.get("tags")
    problems = Problems()
    problems.found += [*_refused(options, required)]
    problems.found += refused_version(group, approval, tags if isinstance(tags, Mapping) else {})
    job = None
    own = {key: value for key, value in options.items() if key not in _NOT_OURS}
    with problems.collected():
        job = prepare({**own, "name": name}, account)
    if job is None:  # the account may be what could not be asked
        problems.raise_any()
    assert job is not None
    h, added = job.hyperparameters, {}
    with problems.collected():
        added = {**measuring(h), **caching(h, str(job.resources.workspace / CLASS_CACHE))}
    if "prior" in required and not h.prior_preservation:
        problems.found.append("require: prior is measured of a class; set class_prompt, or leave prior out")
    with problems.collected():
        find_owned(name, account.clients("sagemaker"))
    problems.raise_any()
    registration = Registration(group, approval, dict(required))
    definition = _define(job, added, registration, check_instance, name)
    return PreparedPipeline(name, job, registration, definition, added)


def _define(
    job: PreparedJob, added: Mapping[str, object], registration: Registration, check_instance: str, name: str
) -> dict[str, Any]:
    resources = job.resources
    place = S3Uri.parse(resources.output) if resources.output else resources.workspace / "pipelines" / name
    values = {**added, "manual_upload_model_path": str(model_of(place))}
    h = with_values(job.hyperparameters, values)
    own = resources.model_copy(update={"checkpoint": str(place / EXECUTION / "checkpoints"), "output": None})
    problems = Problems()
    training = training_request(h, own, job.channels)
    if 1 + 2 * len(training["HyperParameters"]) > MOST_ARGUMENTS:
        problems.found.append(f"a pipeline's job has at most {MOST_ARGUMENTS // 2} hyperparameters; leave some out")
    container = container_of(str(model_of(place)), str(resources.image_uri), problems, base_model=_base(h, job))
    problems.raise_any()
    return pipeline_definition(training, place, registration, container, check_instance=check_instance)


def _base(h: Hyperparameters, job: PreparedJob) -> str | None:
    """Where the base model lies that what was trained is served with; None where the job's report names it."""
    channel = job.channels.get(MODEL_CHANNEL)
    if channel is None or channel.kind != FOLDER or not METHODS[h.method].leaves_base:
        return None
    return str(channel.uri)


def find_owned(name: str, sagemaker: Any) -> dict[str, Any] | None:
    """The description of the launcher's pipeline of this name; None where it was not found.

    Raises:
        UserError: it is somebody else's.
        ServiceError: it can't be looked at.
    """
    found = find_pipeline(name, sagemaker)
    if found and not is_owned(found, sagemaker):
        raise UserError(f"name: {name} is a pipeline that the launcher has not made; set another name")
    return found


def _refused(options: Mapping[str, Any], required: Mapping[str, float]) -> Iterator[str]:
    for name, why in _NOT_OURS.items():
        if options.get(name):
            yield f"{name}: {why}"
    if options.get("instance_type") in ON_THIS_MACHINE:
        yield "instance_type: pipelines run on SageMaker; name a type such as ml.g5.xlarge, or auto"
    if isinstance(options.get("tags"), Mapping) and len(options["tags"]) >= MAX_TAGS:
        yield f"tags: a pipeline has one of its own, so that {MAX_TAGS - 1} are left; leave some out"
    if not required:
        yield f"require is missing; set what a model has to reach, such as score=0.2: {', '.join(MEASURES)}"
    for name, limit in required.items():
        if name not in MEASURES:
            yield f"require: {name!r} is not a measure; set some of {', '.join(MEASURES)}"
        elif isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit):
            yield f"require: {name}={limit} is not a number"


def _send(done: str, name: str, send: Callable[[], object]) -> None:
    """Raises UserError where SageMaker refuses it; its own words follow."""
    try:
        with asking(f"the pipeline {name} was not {done}"):
            send()
    except ServiceError as error:
        if error.kind is not Kind.OTHER:
            raise
        advice = f"; {error.advice}" if error.advice else ""
        raise UserError(f"SageMaker refuses the pipeline {name}: {error.reason}{advice}") from error
