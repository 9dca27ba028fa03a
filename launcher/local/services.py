"""SageMaker, CloudWatch Logs, S3, IAM, ECR and what else moto has, in this process."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_sm import __version__
from launcher.aws.clients import Clients
from launcher.aws.image_tags import code_digest, image_tag
from launcher.local.answers import ACCOUNT
from launcher.local.batch import EmbeddedBatch
from launcher.local.clients import EmbeddedClients
from launcher.local.program import ENTRYPOINT
from launcher.local.s3 import REGION, EmbeddedS3, embedded_s3
from launcher.local.sagemaker import EmbeddedSageMaker
from launcher.local.signatures import REGION_KEY, Application
from launcher.local.training_job import GRACE

_REPOSITORY = _ROLE = "dreambooth-sm"  # the repository as build_and_push.sh names it
_BUILD = "0" * 8  # digest of how an image was built that nobody built


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

    def clients(self, region: str = REGION) -> Clients:
        """Clients of the services that jobs use."""
        return EmbeddedClients(self, with_s3=self.with_s3, region=region)

    def set_up_account(self, region: str = REGION) -> None:
        """Makes what an account needs for jobs: an execution role, this code's image, the SDKs' bucket."""
        clients = EmbeddedClients(self, region=region)
        trust = {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"digest": f"sha256:{hashlib.sha256(b'').hexdigest()}"},
            "layers": [],
        }
        tag = image_tag(__version__, "", code_digest(), _BUILD)
        image = {"repositoryName": _REPOSITORY, "imageTag": tag, "imageManifest": json.dumps(manifest)}
        with _unless_there():
            clients("iam").create_role(RoleName=_ROLE, AssumeRolePolicyDocument=policy)
        with _unless_there():
            clients("ecr").create_repository(repositoryName=_REPOSITORY)
        with _unless_there():
            clients("ecr").put_image(**image)
        with _unless_there():
            elsewhere = {"CreateBucketConfiguration": {"LocationConstraint": region}} if region != REGION else {}
            clients("s3").create_bucket(Bucket=f"sagemaker-{region}-{ACCOUNT}", **elsewhere)


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
    *, with_account: bool = False, with_s3: bool = True, entrypoint: Path = ENTRYPOINT, grace: float = GRACE
) -> Iterator[EmbeddedServices]:
    """Runs the services until the block ends, which stops the jobs that still run.

    Args:
        with_account: make what :meth:`EmbeddedServices.set_up_account` does, in each region that is asked for.
        with_s3: False lets jobs use the S3 of the standard AWS settings, credentials and all.
        entrypoint: program that jobs run as a process, instead of the image's.
        grace: seconds between a job's SIGTERM and SIGKILL.

    Raises:
        UserError: moto is not installed.

    Examples:
        >>> with embedded_services() as services:
        ...     services.clients()("sagemaker").list_training_jobs()["TrainingJobSummaries"]
        []
    """
    services: EmbeddedServices
    batch: EmbeddedBatch
    known: set[str] = set()

    def front(application: Application) -> Application:
        def behind(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            return services.sagemaker.answer(application, environ, start_response)

        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            if with_account and (region := environ[REGION_KEY]) not in known:
                known.add(region)
                services.set_up_account(region)
            return batch.answer(behind, environ, start_response)

        return answer

    with tempfile.TemporaryDirectory(prefix="dreambooth-sm-") as directory, embedded_s3(front) as server:
        sagemaker = EmbeddedSageMaker(Path(directory), server, with_s3=with_s3, entrypoint=entrypoint, grace=grace)
        batch = EmbeddedBatch(sagemaker)
        services = EmbeddedServices(server.endpoint_url, server.access_key, server.secret_key, sagemaker, with_s3)
        try:
            yield services
        finally:
            batch.close()
            sagemaker.close()
