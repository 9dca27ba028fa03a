"""What an endpoint is made of on SageMaker: made in one go, and removed again, but for what others have made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreambooth_sm.errors import UserError
from launcher.aws.service_errors import Kind, ServiceError, asking
from launcher.endpoints.requests import OWNER_TAG

Say = Callable[[str], None]
# Each kind as boto3 calls it, to the field with its name; in the order in which they are removed.
_KINDS = {"endpoint": "EndpointName", "endpoint_config": "EndpointConfigName", "model": "ModelName"}


@dataclass(frozen=True)
class HostedPart:
    """An endpoint, a configuration or a model.

    Attributes:
        kind: as operations of boto3 call it.
    """

    kind: str
    name: str

    @property
    def naming(self) -> dict[str, str]:
        """What requests call it by."""
        return {_KINDS[self.kind]: self.name}

    @property
    def command(self) -> str:
        """The command line that removes it."""
        flag = {"endpoint_config": "endpoint-config"}.get(self.kind, self.kind)
        return f"aws sagemaker delete-{flag} --{flag}-name {self.name}"

    def describe(self, sagemaker: Any) -> dict[str, Any]:
        """SageMaker's description.

        Raises:
            ServiceError: it is not there, or may not be looked at.
        """
        with asking(f"{self} can't be looked at"):
            return dict(getattr(sagemaker, f"describe_{self.kind}")(**self.naming))

    def is_there(self, sagemaker: Any) -> bool:
        try:
            self.describe(sagemaker)
        except ServiceError as error:
            if error.kind is not Kind.MISSING:
                raise
            return False
        return True

    def __str__(self) -> str:
        return f"{self.kind.replace('_config', ' configuration')} {self.name}"


def make(requests: Mapping[str, Mapping[str, Any]], sagemaker: Any, say: Say) -> None:
    """Makes all of it, or nothing: what was made before a refusal, a lost connection or Ctrl-C is removed again.

    Args:
        requests: operations of boto3 to their requests.
        say: gets a line about each thing that could not be removed, with the command that does it.

    Raises:
        UserError: SageMaker refuses one of them; its own words follow.
        ServiceError: AWS can't be reached, not with these credentials, or has a fault of its own.
    """
    made: list[HostedPart] = []
    try:
        for operation, request in requests.items():
            kind = operation.partition("_")[2]
            made.append(HostedPart(kind, request[_KINDS[kind]]))  # an answer may be lost
            try:
                with asking(f"{made[-1]} was not made"):
                    getattr(sagemaker, operation)(**request)
            except ServiceError as error:
                _check_made(made, request, sagemaker, error)
    except BaseException:
        remove(made, sagemaker, say)
        raise


def _check_made(made: list[HostedPart], request: Mapping[str, Any], sagemaker: Any, error: ServiceError) -> None:
    """Raises a refusal, unless it is of a second try, after the answer to the first one was lost.

    Names of models and configurations are made up; an endpoint is this one if it has this configuration.
    """
    if error.kind in (Kind.NETWORK, Kind.CREDENTIALS, Kind.CLOCK, Kind.BUSY):
        raise error
    thing = made[-1]
    if thing.is_there(sagemaker):
        there = thing.describe(sagemaker)
        if all(there.get(field, name) == name for field, name in request.items() if field in _KINDS.values()):
            return
    made.pop()
    advice = f"; {error.advice}" if error.advice else ""
    raise UserError(f"SageMaker refuses the {thing}: {error.reason}{advice}") from error


def remove(things: Sequence[HostedPart], sagemaker: Any, say: Say) -> bool:
    """Removes an endpoint first, and what it needs after it. Whether nothing is left.

    Args:
        say: gets a line about each thing that is left, with the command that removes it.
    """
    left = sorted(things, key=lambda thing: list(_KINDS).index(thing.kind))
    while left:
        try:
            with asking(f"{left[0]} was not removed"):
                getattr(sagemaker, f"delete_{left[0].kind}")(**left[0].naming)
        except ServiceError as error:
            if error.kind is not Kind.MISSING:
                for thing in left:
                    costs = ", which costs money by the hour" if thing.kind == "endpoint" else ""
                    say(f"left: {thing}{costs} ({error.reason}): {thing.command}")
                return False
        del left[0]
    return True


def variant_of(endpoint: str, sagemaker: Any) -> str:
    """How the variant of an endpoint is called, which autoscaling and log streams are named after: what others made,
    and older versions of this project, have names of their own.

    Raises:
        ServiceError: it is not there, or may not be looked at.
    """
    description = HostedPart("endpoint", endpoint).describe(sagemaker)
    variants = description.get("ProductionVariants")
    if not variants:  # of an endpoint that never came, its configuration knows them
        configuration = HostedPart("endpoint_config", description["EndpointConfigName"]).describe(sagemaker)
        variants = configuration["ProductionVariants"]
    return str(variants[0]["VariantName"])


def owned(endpoint: str, sagemaker: Any) -> list[HostedPart]:
    """Configurations and models that were made for an endpoint, by their tags.

    Raises:
        ServiceError: they can't be listed.
    """
    found = []
    with asking(f"what belongs to {endpoint} can't be listed"):
        for kind, operation, listed in (
            ("endpoint_config", "list_endpoint_configs", "EndpointConfigs"),
            ("model", "list_models", "Models"),
        ):
            for page in sagemaker.get_paginator(operation).paginate(NameContains=endpoint):
                for each in page[listed]:
                    name, arn = each[_KINDS[kind]], each[f"{_KINDS[kind].removesuffix('Name')}Arn"]
                    if f"{name}-".startswith(f"{endpoint}-") and is_owned(arn, endpoint, sagemaker):
                        found.append(HostedPart(kind, name))
    return found


def is_owned(arn: str, endpoint: str, sagemaker: Any) -> bool:
    """Whether a tag says that something was made for an endpoint."""
    return tags_of(arn, sagemaker).get(OWNER_TAG) == endpoint


def tags_of(arn: str, sagemaker: Any) -> dict[str, str]:
    """The tags of something of SageMaker's that people have given it.

    Raises:
        ServiceError: they can't be read.
    """
    with asking(f"the tags of {arn} can't be read"):
        tags = sagemaker.list_tags(ResourceArn=arn)["Tags"]
    return {tag["Key"]: tag["Value"] for tag in tags if not tag["Key"].startswith("aws:")}
