"""Finds the image in ECR that belongs to the code that asks: a build of the same ``dreambooth_sm/``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dreambooth_sm import __version__
from dreambooth_sm.errors import UserError
from launcher.aws.image_tags import code_digest, is_of_code
from launcher.aws.service_errors import Kind, ServiceError, asking

_ECR = re.compile(
    r"(?P<account>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.[a-z0-9.]+/(?P<repository>[^@:]+)"
    r"(?::(?P<tag>[^@]+))?(?:@(?P<digest>sha256:[0-9a-f]+))?"
)
# As build_and_push.sh names it.
REPOSITORY = "dreambooth-sm"
# Builds that an error names.
_SHOWN = 3


@dataclass(frozen=True)
class EcrUri:
    """An image, or a repository, in ECR.

    Attributes:
        account, region: of the repository.
        repository: its name.
        tag, digest: of the image; both None for the repository.
    """

    account: str
    region: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, uri: str) -> EcrUri | None:
        """None for what is not in ECR.

        Examples:
            >>> EcrUri.parse("123456789012.dkr.ecr.us-west-2.amazonaws.com/dreambooth-sm:latest").tag
            'latest'
        """
        found = _ECR.fullmatch(uri)
        return cls(**found.groupdict()) if found else None


@dataclass(frozen=True, order=True)
class Build:
    """An image as ECR holds it; the later one was pushed later."""

    pushed: datetime
    tag: str
    digest: str


def repository_uri(ecr: Any, region: str) -> str:
    """Finds the image's repository in this account, in the domain of its partition.

    Raises:
        UserError: it is not there, or may not be asked for.
    """
    try:
        with asking("image_uri"):
            return str(ecr.describe_repositories(repositoryNames=[REPOSITORY])["repositories"][0]["repositoryUri"])
    except ServiceError as error:
        raise _not_found(error, REPOSITORY, region, "image_uri='...'") from None


def find_build(ecr: Any, uri: str, place: EcrUri) -> Build:
    """The build of this code in a repository: the one that was pushed last, where there are several.

    Args:
        ecr: boto3's client, of the repository's region.
        uri: of the repository.
        place: the same, parsed.

    Raises:
        UserError: there is none, with those that are there; or they may not be asked for.
    """
    code, another = code_digest(), f"image_uri='{uri}:TAG'"
    pages = ecr.get_paginator("describe_images").paginate(
        registryId=place.account, repositoryName=place.repository, filter={"tagStatus": "TAGGED"}
    )
    try:
        with asking("image_uri"):
            builds = [
                Build(image["imagePushedAt"], tag, image["imageDigest"])
                for page in pages
                for image in page["imageDetails"]
                for tag in image.get("imageTags", ())
            ]
    except ServiceError as error:
        raise _not_found(error, place.repository, place.region, another) from None
    if of_code := [build for build in builds if is_of_code(build.tag, code)]:
        return max(of_code)
    raise UserError(
        f"image_uri: {uri} holds no build of this code ({__version__}, code {code}){_listed(builds)}; run "
        f"{_command(place.repository, place.region)}, or set {another} to run another one"
    )


def _listed(builds: Sequence[Build]) -> str:
    """The last builds, each by its longest tag."""
    tags: dict[str, Build] = {}
    for build in sorted(builds, key=lambda build: len(build.tag)):
        tags[build.digest] = build
    latest = sorted(tags.values(), reverse=True)
    shown = [f"{build.tag} of {build.pushed:%Y-%m-%d %H:%M}" for build in latest[:_SHOWN]]
    more = len(latest) - len(shown)
    return f", but {', '.join(shown)}{f' and {more} more' if more else ''}" if shown else ""


def _command(repository: str, region: str) -> str:
    named = f" --repository {repository}" if repository != REPOSITORY else ""
    return f"`./build_and_push.sh --region {region}{named}`"


def _not_found(error: ServiceError, repository: str, region: str, instead: str) -> UserError:
    what = f"image_uri: no image of {repository!r}"
    if error.kind is Kind.MISSING:
        return UserError(
            f"{what} is in ECR ({error.reason}); run {_command(repository, region)} once, or set {instead}"
        )
    allow = "allow ecr:DescribeRepositories and ecr:DescribeImages to your own credentials"
    advice = allow if error.kind is Kind.DENIED else error.advice
    return UserError(
        f"{what} can be looked for in ECR ({error.reason}); {f'{advice}, or ' if advice else ''}set {instead}"
    )
