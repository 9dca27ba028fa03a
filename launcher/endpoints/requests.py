"""The description of an endpoint: the three requests that make one of what a job left in S3.

:func:`endpoint_requests` is pure: it reads no file, no environment and no account.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.serving.settings import ServingSettings
from dreambooth_sm.sources import is_s3
from dreambooth_sm.storage import S3Uri
from launcher.training_request import refused_tags

# What is made for an endpoint is known by it.
OWNER_TAG = "dreambooth-sm:endpoint"
# As the SageMaker SDKs call it.
VARIANT = "AllTraffic"
_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9])*")
_LONGEST_NAME = 63
_ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+", re.ASCII)
_INSTANCE = re.compile(r"ml\.[a-z0-9]+(-[a-z]+)?\.[a-z0-9]+")
# Seconds: that files may take to come, and the server to answer after that.
_DOWNLOAD, _START = 1800, 900
# Bytes: what SageMaker takes of an asynchronous invocation.
_ASYNCHRONOUS_ANSWER = 10**9


def endpoint_requests(
    name: str,
    model: str | None,
    *,
    image_uri: str,
    role: str,
    instance_type: str,
    instance_count: int = 1,
    base_model: str | None = None,
    adapters: str | None = None,
    asynchronous: str | None = None,
    network_isolation: bool = False,
    version: str | None = None,
    tags: Mapping[str, str] | None = None,
    **settings: object,
) -> dict[str, dict[str, Any]]:
    """The requests of one endpoint, by the names that boto3's client of SageMaker has for them, in their order.

    Args:
        name: of endpoint, configuration and model.
        model: ``s3://`` prefix that a job's output lies below, as it lies; None: the base model alone.
        image_uri: of the image that trained it.
        role: ARN of the execution role, which reads the prefixes.
        base_model: that an adapter lies beside: an ``s3://`` prefix, or a hub id.
        adapters: ``s3://`` prefix with the adapters that requests may name: read when they are asked for, or, where
            the network is isolated, all of them before the endpoint is there.
        asynchronous: ``s3://`` prefix that answers go to, of an endpoint that is asked by way of S3.
        network_isolation: whether the container reaches nothing, S3 neither.
        version: follows the name of configuration and model, where another version of the endpoint has them.
        tags: of endpoint, configuration and model, such as those that costs are told apart by.
        settings: of the server, without ``SERVE_`` and in small letters, such as ``batch=16``.

    Raises:
        UserError: with everything that SageMaker or the server would refuse.

    Examples:
        >>> requests = endpoint_requests(
        ...     "zwx", "s3://models/zwx", image_uri="image:1", role="arn:aws:iam::123456789012:role/serve",
        ...     instance_type="ml.g5.xlarge",
        ... )
        >>> list(requests)
        ['create_model', 'create_endpoint_config', 'create_endpoint']
        >>> for operation, request in requests.items():  # doctest: +SKIP
        ...     getattr(boto3.client("sagemaker"), operation)(**request)
    """
    problems = Problems()
    inner = f"{name}-{version}" if version else name
    if not _NAME.fullmatch(name) or len(inner) > _LONGEST_NAME:
        longest = _LONGEST_NAME - len(inner) + len(name)
        problems.found.append(f"name: {name!r} is not valid; set letters, digits and single hyphens, at most {longest}")
    for field, value, pattern, such in (
        ("role", role, _ROLE, "the ARN of a role"),
        ("instance_type", instance_type, _INSTANCE, "a type such as ml.g5.xlarge"),
    ):
        if not pattern.fullmatch(value):
            problems.found.append(f"{field}: {value!r} is not valid; set {such}")
    if model is None and base_model is None:
        problems.found.append("model is missing; name an s3:// prefix, or a base_model to serve alone")
    problems.found += refused_tags({**(tags or {}), OWNER_TAG: name})
    if instance_count < 1:
        problems.found.append(f"instance_count: {instance_count} is not valid; set a whole number from 1")
    container = container_of(
        model,
        image_uri,
        problems,
        base_model=base_model,
        adapters=adapters,
        asynchronous=asynchronous,
        network_isolation=network_isolation,
        **settings,
    )
    problems.raise_any()
    variant = {
        "VariantName": VARIANT,
        "InitialVariantWeight": 1,
        "ModelName": inner,
        "InstanceType": instance_type,
        "InitialInstanceCount": instance_count,
        "ModelDataDownloadTimeoutInSeconds": _DOWNLOAD,
        "ContainerStartupHealthCheckTimeoutInSeconds": _START,
    }
    output = {}
    if asynchronous:
        places = {"S3OutputPath": asynchronous, "S3FailurePath": f"{asynchronous.rstrip('/')}/failures"}
        output = {"AsyncInferenceConfig": {"OutputConfig": places}}
    owned = [{"Key": key, "Value": value} for key, value in {**(tags or {}), OWNER_TAG: name}.items()]
    return {
        "create_model": {
            "ModelName": inner,
            "ExecutionRoleArn": role,
            "PrimaryContainer": container,
            **({"EnableNetworkIsolation": True} if network_isolation else {}),
            "Tags": owned,
        },
        "create_endpoint_config": {
            "EndpointConfigName": inner,
            "ProductionVariants": [variant],
            "Tags": owned,
            **output,
        },
        "create_endpoint": {"EndpointName": name, "EndpointConfigName": inner, "Tags": owned},
    }


def container_of(
    model: str | None,
    image_uri: str,
    problems: Problems,
    *,
    base_model: str | None = None,
    adapters: str | None = None,
    asynchronous: str | None = None,
    network_isolation: bool = False,
    **settings: object,
) -> dict[str, Any]:
    """The container that serves a model, as SageMaker's requests describe it.

    Args:
        problems: gets everything that SageMaker or the server would refuse.
        model, image_uri, base_model, adapters, asynchronous, network_isolation, settings: as for
            :func:`endpoint_requests`.
    """
    sources = {field: _source(field, value, problems) for field, value in (("model", model), ("adapters", adapters))}
    channels = {}
    chosen: dict[str, object] = dict(settings)
    if base_model and base_model.startswith("s3://"):
        channels["base"] = _source("base_model", base_model, problems)
    elif base_model and network_isolation:
        problems.found.append(f"base_model: {base_model} is not in S3, and the network is isolated; name a prefix")
    elif base_model:
        chosen["base_model"] = base_model
    if adapters and network_isolation:
        channels["adapters"] = sources["adapters"]
    elif adapters:
        chosen["adapters"] = adapters
    if models := chosen.get("full_models"):
        _source("full_models", str(models), problems)
        if network_isolation:
            problems.found.append("full_models: they come from S3, and the network is isolated; leave one of them out")
    if asynchronous:
        _source("asynchronous", asynchronous, problems)
        chosen.setdefault("answer_bytes", _ASYNCHRONOUS_ANSWER)
    environment = {f"SERVE_{key.upper()}": str(value) for key, value in chosen.items()}
    with problems.collected():
        ServingSettings.of(environment)
    container: dict[str, Any] = {"Image": image_uri, "Environment": environment}
    if model:
        container["ModelDataSource"] = sources["model"]
    if channels:
        container["AdditionalModelDataSources"] = [{"ChannelName": key, **each} for key, each in channels.items()]
    return container


def arguments_of(model: Mapping[str, Any], configuration: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`endpoint_requests` was told, but for the name, by descriptions of what it made.

    Args:
        model: of DescribeModel.
        configuration: of DescribeEndpointConfig.
    """
    (variant, *_) = configuration["ProductionVariants"]
    output = configuration.get("AsyncInferenceConfig", {}).get("OutputConfig", {})
    return {
        "role": model["ExecutionRoleArn"],
        "instance_type": variant["InstanceType"],
        "instance_count": variant["InitialInstanceCount"],
        "network_isolation": model.get("EnableNetworkIsolation", False),
        "asynchronous": output.get("S3OutputPath"),
        **arguments_of_container(model["PrimaryContainer"]),
    }


def arguments_of_container(container: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`container_of` was told."""
    environment = dict(container.get("Environment", {}))
    found = {name.removeprefix("SERVE_").lower(): value for name, value in environment.items()}
    channels = {each["ChannelName"]: _prefix(each) for each in container.get("AdditionalModelDataSources", ())}
    return {
        "model": _prefix(container),
        "image_uri": container["Image"],
        **found,
        "base_model": channels.get("base", found.get("base_model")),
        "adapters": channels.get("adapters", found.get("adapters")),
    }


def _prefix(source: Mapping[str, Any]) -> str | None:
    """Where a container's model, or one of its channels, lies."""
    where = source.get("ModelDataSource", source).get("S3DataSource")
    return None if where is None else str(where["S3Uri"])


def not_in_s3(field: str, place: str) -> str:
    """What is wrong with a place that an endpoint can't read from."""
    return f"{field}: {place} is not in S3; name an s3:// prefix, or give launcher.deploy a directory of this machine"


def _source(field: str, prefix: str | None, problems: Problems) -> Mapping[str, Any]:
    """The data source of a prefix, with all that lies below it."""
    if prefix is None:
        return {}
    if not is_s3(prefix):
        problems.found.append(not_in_s3(field, prefix))
        return {}
    uri = S3Uri("")
    with problems.collected():
        try:
            uri = S3Uri.parse(prefix)
        except UserError as error:
            raise UserError(f"{field}: {problem}" for problem in error.problems) from None
    return {"S3DataSource": {"S3Uri": f"{uri}/", "S3DataType": "S3Prefix", "CompressionType": "None"}}
