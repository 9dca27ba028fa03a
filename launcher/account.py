"""What a job needs of an AWS account: role, image, bucket, quota. Looked up, and checked before anything starts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dreambooth_sm import __version__
from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.storage import S3Uri, TransferError, check_writable, list_objects
from launcher.clients import Clients
from launcher.training_request import Resources

REPOSITORY = "dreambooth-sm"  # as build_and_push.sh names it
_MISSING = {"NoSuchEntity", "RepositoryNotFoundException", "ImageNotFoundException"}
# SageMaker notebooks and Studio spaces describe themselves here.
_NOTEBOOK_METADATA = Path("/opt/ml/metadata/resource-metadata.json")
_ECR = re.compile(
    r"(?P<account>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.[a-z0-9.]+/(?P<repository>[^@:]+)"
    r"(?::(?P<tag>[^@]+))?(?:@(?P<digest>sha256:[0-9a-f]+))?"
)

Answer = TypeVar("Answer")


class _NoAnswer(Exception):  # noqa: N818 - an answer that is missing is no error of the reader's
    """AWS gave no answer; ``missing``: because the thing asked for is not there."""

    def __init__(self, reason: str, *, missing: bool = False) -> None:
        super().__init__(reason)
        self.missing = missing


class Account:
    """The account that a job will run in.

    Args:
        clients: of its services.
        metadata: the file in which a SageMaker notebook describes itself.

    Attributes:
        warnings: what could not be checked, and why.
    """

    def __init__(self, clients: Clients, metadata: Path = _NOTEBOOK_METADATA) -> None:
        self.clients = clients
        self.warnings: list[str] = []
        self._metadata = metadata
        self._identity: dict[str, str] | None = None

    @property
    def region(self) -> str:
        return self.clients("sagemaker").meta.region_name

    def identity(self) -> dict[str, str]:
        """Account and ARN of the caller.

        Raises:
            UserError: there are no valid credentials.
        """
        if self._identity is None:
            try:
                self._identity = _ask(lambda: self.clients("sts").get_caller_identity())
            except _NoAnswer as error:
                raise UserError(
                    f"no valid AWS credentials ({error}): run `aws configure`, or set AWS_PROFILE"
                ) from None
        return self._identity

    def find_role(self) -> str:
        """The execution role: the notebook's, or the role that the caller has assumed.

        Raises:
            UserError: there is neither.
        """
        if (role := self._role_of_notebook()) is not None:
            return role
        arn = self.identity()["Arn"]
        assumed = re.fullmatch(r"arn:(?P<partition>[\w-]+):sts::(?P<account>\d+):assumed-role/(?P<name>[^/]+)/.*", arn)
        if assumed is None:
            raise UserError(
                "role is missing, and these credentials are no role that a job could run with; write "
                "role='arn:aws:iam::ACCOUNT:role/NAME' (`dreambooth-launcher iam` prints the policies it needs)"
            )
        try:  # an assumed role's ARN leaves out the role's path
            return _ask(lambda: self.clients("iam").get_role(RoleName=assumed["name"]))["Role"]["Arn"]
        except _NoAnswer:
            return f"arn:{assumed['partition']}:iam::{assumed['account']}:role/{assumed['name']}"

    def _role_of_notebook(self) -> str | None:
        try:
            metadata = json.loads(self._metadata.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if role := metadata.get("ExecutionRoleArn"):
            return role
        if name := metadata.get("ResourceName"):
            try:
                ask = self.clients("sagemaker").describe_notebook_instance
                return _ask(lambda: ask(NotebookInstanceName=name))["RoleArn"]
            except _NoAnswer:
                return None
        return None

    def find_bucket(self) -> str:
        """The bucket that SageMaker's own SDKs use."""
        return f"sagemaker-{self.region}-{self.identity()['Account']}"

    def find_image(self) -> str:
        """The image that build_and_push.sh pushed for this version of the project, with its digest.

        Raises:
            UserError: it is not there.
        """
        ecr = self.clients("ecr")
        advice = f"run `./build_and_push.sh --region {self.region}` once, or write image_uri='...'"
        try:
            found = _ask(
                lambda: (
                    ecr.describe_repositories(repositoryNames=[REPOSITORY])["repositories"][0],
                    ecr.describe_images(repositoryName=REPOSITORY, imageIds=[{"imageTag": __version__}])[
                        "imageDetails"
                    ][0],
                )
            )
        except _NoAnswer as error:
            raise UserError(
                f"image_uri: the image {REPOSITORY}:{__version__} is not in ECR ({error}); {advice}"
            ) from None
        repository, image = found
        return f"{repository['repositoryUri']}@{image['imageDigest']}"

    def check(self, resources: Resources, *, pictures: S3Uri | None) -> None:
        """Whether a job with these resources can start: image, role, buckets, quota; and pictures that are in S3.

        Raises:
            UserError: with everything that is in the way. What can't be looked at becomes a warning.
        """
        self.identity()
        problems = Problems()
        for check in (
            lambda: self._check_image(resources.image_uri or ""),
            lambda: self._check_role(resources.role or ""),
            lambda: self._check_places(resources),
            lambda: self._check_pictures(pictures),
            lambda: self._check_quota(resources),
        ):
            with problems.collected():
                check()
        problems.raise_any()

    def _check_image(self, uri: str) -> None:
        image = _ECR.fullmatch(uri)
        if image is None or image["account"] != self.identity()["Account"]:
            self.warnings.append("image_uri: whether an image of another registry is there can't be checked")
            return
        if image["region"] != self.region:
            raise UserError(f"image_uri: the image is in {image['region']}, and the job will run in {self.region}")
        wanted = {"imageDigest": image["digest"]} if image["digest"] else {"imageTag": image["tag"] or "latest"}
        with self._looking("image_uri: whether the image is there", f"image_uri: {uri} is not in ECR; push it"):
            _ask(lambda: self.clients("ecr").describe_images(repositoryName=image["repository"], imageIds=[wanted]))

    def _check_role(self, arn: str) -> None:
        """The role has to let SageMaker take it on."""
        with self._looking("role: whether SageMaker may use it", f"role: there is no {arn}; correct its name"):
            role = _ask(lambda: self.clients("iam").get_role(RoleName=arn.rpartition("/")[2])["Role"])
            if "sagemaker.amazonaws.com" not in json.dumps(role["AssumeRolePolicyDocument"]):
                raise UserError(
                    f"role: {arn} does not trust SageMaker; let sagemaker.amazonaws.com do sts:AssumeRole in its trust "
                    "policy, or name an execution role"
                )

    def _check_places(self, resources: Resources) -> None:
        """Buckets that the launcher writes to; a job's role needs the same access to them."""
        places = {str(resources.workspace): resources.workspace}
        for text in (resources.output, resources.checkpoint):
            if text is not None:
                places[text] = S3Uri.parse(text)
        problems = Problems()
        for place in places.values():
            with problems.collected():
                check_writable(place, client=self.clients("s3"))
        problems.raise_any()

    def _check_pictures(self, pictures: S3Uri | None) -> None:
        if pictures is None:
            return
        try:
            found = list_objects(pictures, client=self.clients("s3"))
        except TransferError as error:
            raise UserError(f"images: {error}") from None
        if not found:
            raise UserError(f"images: there is nothing below {pictures}; upload 4 to 20 pictures there")

    def _check_quota(self, resources: Resources) -> None:
        """Quotas of instances; most are 0 in a new account."""
        use = "spot training job" if resources.spot else "training job"
        wanted = [f"{resources.instance_type} for {use} usage"]
        if resources.keep_alive:
            wanted.append(f"{resources.instance_type} for training warm pool usage")
        count = resources.instance_count
        with self._looking(f"quota: whether it allows {count} x {resources.instance_type}", ""):
            quotas = _ask(self._quotas)
            low = [name for name in wanted if quotas.get(name, count) < count]
            if low:
                raise UserError(
                    f"quota: {name!r} is {quotas[name]:g} in {self.region}, and the job needs {count}; ask for more in "
                    "Service Quotas, or choose another instance type"
                    for name in low
                )

    def _quotas(self) -> dict[str, float]:
        pages = self.clients("service-quotas").get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker")
        return {quota["QuotaName"]: quota["Value"] for page in pages for quota in page["Quotas"]}

    @contextmanager
    def _looking(self, what: str, missing: str) -> Iterator[None]:
        """What is not there is a problem, ``missing``; what these credentials may not look at is a warning."""
        try:
            yield
        except _NoAnswer as error:
            if error.missing:
                raise UserError(missing) from None
            self.warnings.append(f"{what} can't be checked: {error}")


def _ask(question: Callable[[], Answer]) -> Answer:
    """An answer of AWS, or _NoAnswer with the reason."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return question()
    except ClientError as error:
        code = error.response["Error"].get("Code", "no reason given")
        raise _NoAnswer(code, missing=code in _MISSING) from None
    except BotoCoreError as error:
        raise _NoAnswer(str(error)) from None
