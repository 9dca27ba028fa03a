"""Resources of a job and the places of its results: the options that are not hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dreambooth_sm.errors import Problems
from dreambooth_sm.knobs.declare import COMMON
from dreambooth_sm.knobs.ranges import PositiveInt
from dreambooth_sm.knobs.takes import expected
from dreambooth_sm.storage import S3Uri

DEFAULT_MAX_MINUTES = 24 * 60
# Ignored on instances with disks of their own, which are larger.
DEFAULT_VOLUME_GB = 50
MAX_RUN_MINUTES = 28 * 24 * 60
# Everything that the launcher itself puts into a bucket lies below this prefix.
WORKSPACE = "dreambooth-sm"


class Resources(BaseModel):
    """Resources of a job and the places of its results: everything of a request that is not a hyperparameter."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    instance_type: str = Field(
        default="auto",
        description="ml.g4dn.xlarge, ml.g5.xlarge, ...; auto: the cheapest that does it in max_minutes; local: this "
        "machine.",
        json_schema_extra=COMMON,
    )
    instance_count: PositiveInt = Field(default=1, description="Instances that train together.")
    max_minutes: Annotated[int, Ge(1), Le(MAX_RUN_MINUTES)] | None = Field(
        default=None,
        description=f"The job is stopped after so many minutes, with a checkpoint; {DEFAULT_MAX_MINUTES} if None.",
        json_schema_extra=COMMON,
    )
    spot: bool = Field(
        default=False,
        description="Train on spare capacity, for less; an interrupted job is resumed from a checkpoint.",
        json_schema_extra=COMMON,
    )
    max_wait_minutes: Annotated[int, Ge(1), Le(MAX_RUN_MINUTES)] | None = Field(
        default=None,
        description="spot: minutes that waiting and training may take together; twice max_minutes if None.",
    )
    max_retry_attempts: Annotated[int, Ge(1), Le(30)] | None = Field(
        default=None, description="How often SageMaker may start the job again after a fault of its own; None: never."
    )
    keep_alive: Annotated[int, Ge(0), Le(3600)] = Field(
        default=0,
        description="Seconds that the instance is kept (and paid for) after the job, for the next one to start fast.",
    )
    output: str | None = Field(
        default=None,
        description="s3://bucket/prefix for the trained pipeline; None: below the job's name in `bucket`.",
        json_schema_extra=COMMON,
    )
    compression: bool = Field(default=False, description="Leave a model.tar.gz instead of plain files.")
    checkpoint: str | None = Field(
        default=None,
        description="s3://bucket/prefix for checkpoints; a job is resumed from those of an earlier one. None: one for "
        "this job alone.",
    )
    bucket: str | None = Field(
        default=None,
        description="Bucket for pictures, checkpoints and models; None: that of `output`, or SageMaker's default one.",
        json_schema_extra=COMMON,
    )
    role: str | None = Field(
        default=None,
        description="Name or ARN of the execution role; None: the notebook's, the role that you have assumed, or the "
        "one that is called dreambooth-sm.",
        json_schema_extra=COMMON,
    )
    image_uri: str | None = Field(
        default=None,
        description="Training image; None: the build of this code that build_and_push.sh put into your account. A "
        "repository in ECR, without a tag: the build of this code that is there.",
        json_schema_extra=COMMON,
    )
    name: str | None = Field(
        default=None, description="Name of the job; None: one with the time in it.", json_schema_extra=COMMON
    )
    vpc: tuple[str, ...] = Field(
        default=(), description="Ids of the subnets and security groups to run in: subnet-... and sg-...."
    )
    kms: str | None = Field(default=None, description="Id or ARN of the KMS key for the model and the volume.")
    network_isolation: bool = Field(
        default=False, description="No network and no credentials in the container; the base model has to come from S3."
    )
    environment: dict[str, str] = Field(default={}, description="Environment variables of the container; no secrets.")
    tags: dict[str, str] = Field(default={}, description="Tags of the job.")
    volume_gb: Annotated[int, Ge(1), Le(16384)] | None = Field(
        default=None,
        description=f"Size of the volume; {DEFAULT_VOLUME_GB} if None. Types with disks of their own take none.",
    )

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> Resources:
        """Reads options as Python code gives them.

        Raises:
            UserError: with every value that is not valid.
        """
        problems = Problems()
        resources = cls.read(values, problems)
        problems.raise_any()
        return resources

    @classmethod
    def read(cls, values: Mapping[str, object], problems: Problems) -> Resources:
        """Reads the values that are valid; each of the others becomes a problem."""
        given = {name: tuple(value) if isinstance(value, list | set) else value for name, value in values.items()}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            refused = dict.fromkeys(str(detail["loc"][0]) for detail in error.errors())
        problems.found += [f"{name}: this value is not valid; set {expectation(name)}" for name in refused]
        return cls.model_validate({name: value for name, value in given.items() if name not in refused})

    @property
    def workspace(self) -> S3Uri:
        """Where everything lies that has no place of its own."""
        return S3Uri(self.bucket or "", WORKSPACE)


def expectation(name: str) -> str:
    """Says what an option of :class:`Resources` takes."""
    words = {
        "vpc": "a list of subnet-... and sg-...",
        "tags": "names and values, as a dictionary or NAME=VALUE",
        "environment": "names and values, as a dictionary or NAME=VALUE",
    }
    field = Resources.model_fields.get(name)
    return words.get(name) or (expected(field) if field else f"one of {', '.join(Resources.model_fields)}")
