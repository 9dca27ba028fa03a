"""All that a job needs of an AWS account: role, image, bucket, quota. Looked up, and checked before anything starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.storage import S3Options, S3Uri, check_writable
from launcher.aws.clients import Clients
from launcher.aws.images import EcrUri, find_build, repository_uri
from launcher.aws.roles import reserved_for, role_of_notebook, trusts_sagemaker
from launcher.aws.service_errors import Kind, ServiceError, asking
from launcher.resources import Resources

# The execution role as `dreambooth-launcher iam` names it.
ROLE = "dreambooth-sm"
# SageMaker notebooks and Studio spaces describe themselves here.
_NOTEBOOK_METADATA = Path("/opt/ml/metadata/resource-metadata.json")


class Account:
    """The account that a job will run in.

    Args:
        clients: of its services.
        metadata: the file in which a SageMaker notebook describes itself.

    Attributes:
        warnings: what could not be checked, and why.
        missing_bucket: SageMaker's default bucket, if it is wanted and has to be made.
        build: tag of the image that was found for this code, if one was looked for.
        image_bytes: of the image that was checked, compressed; None where it could not be.
    """

    def __init__(self, clients: Clients, metadata: Path = _NOTEBOOK_METADATA) -> None:
        self.clients = clients
        self.warnings: list[str] = []
        self.missing_bucket: str | None = None
        self.build: str | None = None
        self.image_bytes: int | None = None
        self._metadata = metadata
        self._identity: dict[str, str] | None = None
        self._known_quotas: dict[str, float] | None = None

    @property
    def region(self) -> str:
        return str(self.clients("sagemaker").meta.region_name)

    def identity(self) -> dict[str, str]:
        """Account and ARN of the caller.

        Raises:
            UserError: there are no valid credentials.
        """
        if self._identity is None:
            try:
                with asking("who you are"):
                    self._identity = self.clients("sts").get_caller_identity()
            except ServiceError as error:
                if error.kind is Kind.CREDENTIALS:
                    raise UserError(
                        f"no valid AWS credentials ({error.reason}): run `aws configure` or `aws sso login`, or set "
                        "AWS_PROFILE"
                    ) from None
                raise UserError(f"AWS does not say who you are ({error.reason}): {error.advice}") from None
        return self._identity

    def find_role(self) -> str:
        """The execution role: the notebook's, the role that the caller has assumed, or the one that is called
        ``dreambooth-sm``.

        Raises:
            UserError: there is none of them.
        """
        if (role := role_of_notebook(self._metadata, self.clients)) is not None:
            return role
        assumed = re.fullmatch(r"arn:[\w-]+:sts::\d+:assumed-role/(?P<name>[^/]+)/.*", self.identity()["Arn"])
        if assumed and not assumed["name"].startswith("AWSReservedSSO_"):
            return self._arn_of_role(assumed["name"])
        try:
            with asking("role"):
                return str(self.clients("iam").get_role(RoleName=ROLE)["Role"]["Arn"])
        except ServiceError:
            owner = "a person's (SSO)" if assumed else "no role's"
            raise UserError(
                f"role is missing, and these credentials are {owner}, which no job could run with; set "
                "role='NAME', an execution role of this account (`dreambooth-launcher iam` prints the policies it "
                "needs)"
            ) from None

    def complete_role(self, role: str) -> str:
        """The ARN of a role that is given by its name, with or without its path, or by its ARN.

        Raises:
            UserError: there is no such role.
        """
        if role.startswith("arn:"):
            return role
        path = role.strip("/").removeprefix("role/")
        return self._made_up(path) if "/" in path else self._arn_of_role(path)

    def _arn_of_role(self, name: str) -> str:
        """IAM knows a role's path; without a right to ask, it is what SageMaker's console chooses for its roles."""
        try:
            with asking("role"):
                return str(self.clients("iam").get_role(RoleName=name)["Role"]["Arn"])
        except ServiceError as error:
            if error.kind is Kind.MISSING:
                raise UserError(f"role: there is no role {name!r} in this account; correct its name") from None
            arn = self._made_up(f"service-role/{name}" if name.startswith("AmazonSageMaker-") else name)
            self.warnings.append(f"role: its path can't be asked for ({error.reason}), and is taken to be {arn}")
            return arn

    def _made_up(self, path: str) -> str:
        identity = self.identity()
        return f"arn:{identity['Arn'].split(':')[1]}:iam::{identity['Account']}:role/{path}"

    def find_bucket(self) -> str:
        """The bucket that SageMaker's own SDKs use; :attr:`missing_bucket` if there is none yet.

        Raises:
            UserError: it belongs to another account.
        """
        name, owner = f"sagemaker-{self.region}-{self.identity()['Account']}", self.identity()["Account"]
        s3 = self.clients("s3")
        try:
            with asking("bucket"):
                s3.head_bucket(Bucket=name, ExpectedBucketOwner=owner)
        except ServiceError as error:
            if error.kind is Kind.MISSING:
                self.missing_bucket = name
            elif error.kind is Kind.DENIED and self._may_look_at(name):
                raise UserError(f"bucket: {name} belongs to another account; set bucket='...'") from None
            else:
                self.warnings.append(f"bucket: whether {name} is this account's can't be checked: {error.reason}")
        return name

    def _may_look_at(self, bucket: str) -> bool:
        try:
            with asking("bucket"):
                self.clients("s3").head_bucket(Bucket=bucket)
        except ServiceError:
            return False
        return True

    def make_bucket(self) -> str | None:
        """Makes the default bucket, as the SageMaker SDK does, if it is missing.

        Returns:
            the name of the bucket that was made, if any.

        Raises:
            UserError: it can't be made; the message holds the command that does it.
        """
        name, self.missing_bucket = self.missing_bucket, None
        if name is None:
            return None
        # us-east-1 is where S3 puts a bucket that says nothing of it, and no place that it takes by name.
        place = {} if self.region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": self.region}}
        try:
            with asking("bucket"):
                self.clients("s3").create_bucket(Bucket=name, **place)
        except ServiceError as error:
            # Somebody else of this account makes it at the same moment.
            if error.reason.startswith(("BucketAlreadyOwnedByYou", "OperationAborted")):
                return name
            raise UserError(
                f"bucket: {name} does not exist and can't be made ({error.reason}): run "
                f"`aws s3 mb s3://{name} --region {self.region}` with credentials that may, or set bucket='...'"
            ) from None
        return name

    def find_image(self) -> str:
        """The image that build_and_push.sh pushed for this code, with its digest.

        Raises:
            UserError: it is not there.
        """
        return self.complete_image(repository_uri(self.clients("ecr"), self.region))

    def complete_image(self, uri: str) -> str:
        """The image of this code, with its digest, for a repository in ECR; any other image as it is given.

        Raises:
            UserError: the repository has none.
        """
        place = EcrUri.parse(uri)
        if place is None or place.tag or place.digest or place.region != self.region:
            return uri
        found = find_build(self.clients("ecr"), uri, place)
        self.build = found.tag
        return f"{uri}@{found.digest}"

    def check(self, resources: Resources, options: S3Options = S3Options()) -> None:  # noqa: B008 - frozen
        """Checks whether a job with these resources can start: image, role, buckets and quota.

        Args:
            options: how objects are written.

        Raises:
            UserError: with everything that is in the way. What can't be looked at becomes a warning.
        """
        self.identity()
        problems = Problems()
        checks: tuple[Callable[[], None], ...] = (
            lambda: self._check_image(resources.image_uri or ""),
            lambda: self._check_role(resources.role or ""),
            lambda: self._check_places(resources, options),
            lambda: self._check_quota(resources),
        )
        for check in checks:
            with problems.collected():
                check()
        problems.raise_any()

    def _check_image(self, uri: str) -> None:
        image = EcrUri.parse(uri)
        if image is None or image.account != self.identity()["Account"]:
            self.warnings.append("image_uri: whether an image of another registry is there can't be checked")
            return
        if image.region != self.region:
            raise UserError(f"image_uri: the image is in {image.region}, and the job will run in {self.region}")
        wanted = {"imageDigest": image.digest} if image.digest else {"imageTag": image.tag or "latest"}
        with self._looking("image_uri: whether the image is there", f"image_uri: {uri} is not in ECR; push it"):
            found = self.clients("ecr").describe_images(repositoryName=image.repository, imageIds=[wanted])
            self.image_bytes = found["imageDetails"][0].get("imageSizeInBytes")

    def _check_role(self, arn: str) -> None:
        """The role has to be the account's, and to let SageMaker assume it."""
        account = self.identity()["Account"]
        if owner := reserved_for(arn):
            raise UserError(f"role: {arn} is a role that {owner}; no job can run with it: name an execution role")
        if account not in arn.split(":"):
            raise UserError(f"role: {arn} belongs to another account than these credentials, {account}")
        with self._looking("role: whether SageMaker may use it", f"role: there is no {arn}; correct its name"):
            role = self.clients("iam").get_role(RoleName=arn.rpartition("/")[2])["Role"]
            if role["Arn"] != arn:
                raise UserError(f"role: there is no {arn}; the role of this name is {role['Arn']}")
            trusted = trusts_sagemaker(role["AssumeRolePolicyDocument"], account)
            if trusted is False:
                raise UserError(
                    f"role: {arn} does not trust SageMaker; let sagemaker.amazonaws.com do sts:AssumeRole in its trust "
                    "policy (`dreambooth-launcher iam` prints one), or name an execution role"
                )
            if trusted is None:
                self.warnings.append("role: whether the conditions of its trust policy are met can't be checked")

    def _check_places(self, resources: Resources, options: S3Options) -> None:
        """Buckets that the launcher writes to; a job's role needs the same access to them."""
        texts = [text for text in (resources.output, resources.checkpoint) if text is not None]
        self._check_writable([resources.workspace, *map(S3Uri.parse, texts)], options)

    def _check_writable(self, places: Iterable[S3Uri], options: S3Options) -> None:
        problems = Problems()
        for place in dict.fromkeys(places):
            if place.bucket == self.missing_bucket:  # it will be made
                continue
            with problems.collected():
                check_writable(place, options, client=self.clients("s3"))
        problems.raise_any()

    def check_endpoint(
        self, image_uri: str, role: str, instance_type: str, count: int, written: Sequence[S3Uri]
    ) -> None:
        """Checks whether an endpoint can be made: image, role, places in S3, and quota.

        Args:
            count: of instances, at most.
            written: where its model and its answers go to.

        Raises:
            UserError: with everything that is in the way. What can't be looked at becomes a warning.
        """
        self.identity()
        problems = Problems()
        checks: list[Callable[[], None]] = [
            lambda: self._check_image(image_uri),
            lambda: self._check_role(role),
            lambda: self._check_quotas([f"{instance_type} for endpoint usage"], instance_type, count, "the endpoint"),
        ]
        checks.append(lambda: self._check_writable(written, S3Options()))
        for check in checks:
            with problems.collected():
                check()
        problems.raise_any()

    def _check_quota(self, resources: Resources) -> None:
        wanted = [_quota_name(resources.instance_type, spot=resources.spot)]
        if resources.keep_alive:
            wanted.append(f"{resources.instance_type} for training warm pool usage")
        self._check_quotas(wanted, resources.instance_type, resources.instance_count, "the job")

    def _check_quotas(self, wanted: Sequence[str], instance_type: str, count: int, user: str) -> None:
        """Quotas of instances; most are 0 in a new account."""
        with self._looking(f"quota: whether it allows {count} x {instance_type}", ""):
            quotas = self._quotas()
            low = [name for name in wanted if quotas.get(name, count) < count]
            if low:
                raise UserError(
                    f"quota: {name!r} is {quotas[name]:g} in {self.region}, and {user} needs {count}; ask for more in "
                    "Service Quotas, or choose another instance type"
                    for name in low
                )

    def room_for(self, instance_type: str, *, spot: bool) -> int | None:
        """How many training jobs of one instance the account's quota allows at a time; None where it can't be asked
        for, which becomes a warning."""
        with self._looking(f"quota: of {instance_type}", ""):
            found = self._quotas().get(_quota_name(instance_type, spot=spot))
            return None if found is None else int(found)
        return None

    def _quotas(self) -> dict[str, float]:
        if self._known_quotas is None:
            self._known_quotas = self._list_quotas()
        return self._known_quotas

    def _list_quotas(self) -> dict[str, float]:
        pages = self.clients("service-quotas").get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker")
        return {quota["QuotaName"]: quota["Value"] for page in pages for quota in page["Quotas"]}

    @contextmanager
    def _looking(self, what: str, missing: str) -> Iterator[None]:
        """Makes a problem, ``missing``, of what is not there, and a warning of what these credentials may not see."""
        try:
            with asking(what):
                yield
        except ServiceError as error:
            if error.kind is Kind.MISSING:
                raise UserError(missing) from None
            self.warnings.append(f"{what} can't be checked: {error.reason}")


def _quota_name(instance_type: str, *, spot: bool) -> str:
    return f"{instance_type} for {'spot training job' if spot else 'training job'} usage"
