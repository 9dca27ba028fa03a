"""The description of a training job: from hyperparameters, resources and channels to SageMaker's own request.

:func:`training_request` is pure: it reads no file, no environment and no account. The dictionary that it returns is
what boto3's ``create_training_job`` takes; Step Functions, Terraform and AWS Batch take the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.tracking import MLFLOW, TENSORBOARD, WANDB
from dreambooth_sm.printing import SECRET_VALUE, names_secret, secrets_of
from dreambooth_sm.report import MEASURES, TRAINING_METRICS, measure_pattern, metric_pattern
from dreambooth_sm.storage import S3Uri
from dreambooth_sm.toybox import SHIPPED
from dreambooth_sm.trackers.needs import find_missing_settings, is_online
from launcher.channels import Channel
from launcher.instances import find_instance
from launcher.resources import DEFAULT_MAX_MINUTES, DEFAULT_VOLUME_GB, MAX_RUN_MINUTES, Resources

# Input channels, and where SageMaker mounts them.
CHANNELS = "/opt/ml/input/data"
IMAGES_CHANNEL, CLASS_IMAGES_CHANNEL, MODEL_CHANNEL, CONFIG_CHANNEL = "images", "class_images", "model", "config"
CONCEPTS_FILE = "concepts_list.json"


# The limits of CreateTrainingJob. Longer values pass botocore's model, and are refused by the service's own text.
MAX_NAME, MAX_VALUE, MAX_HYPERPARAMETERS = 63, 256, 100
MAX_ENVIRONMENT, MAX_ENVIRONMENT_TEXT = 100, 512
MAX_CHANNELS, MAX_TAGS, MAX_IMAGE_URI, MAX_S3_URI = 20, 50, 255, 1024
_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
_ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+", re.ASCII)
_CHANNEL = re.compile(r"[A-Za-z0-9._-]{1,64}")
_VARIABLE = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,511}")
_KMS = re.compile(r"[a-zA-Z0-9:/_-]{1,2048}")
_TAG = re.compile(r"[\w .:/=+@-]*")
_VPC_ID = re.compile(r"(subnet|sg)-[0-9a-zA-Z]{1,26}")


def training_request(
    h: Hyperparameters, resources: Resources, channels: Mapping[str, S3Uri | Channel]
) -> dict[str, Any]:
    """The request of one training job, as ``boto3.client("sagemaker").create_training_job(**request)`` takes it.

    Args:
        h: the hyperparameters; those that were set explicitly are sent, encoded as strings.
        resources: with role, image, bucket and name filled in.
        channels: names of input channels to where their files lie: a folder, or as :class:`Channel` says.

    Raises:
        UserError: with everything that SageMaker, or the job on it, would refuse.

    Examples:
        >>> request = training_request(
        ...     Hyperparameters.parse({"instance_prompt": "photo of zwx toy"}),
        ...     Resources(
        ...         instance_type="ml.g5.xlarge", name="zwx", bucket="models", image_uri="image:1",
        ...         role="arn:aws:iam::123456789012:role/train",
        ...     ),
        ...     {"images": S3Uri("models", "pictures")},
        ... )
        >>> request["HyperParameters"], request["CheckpointConfig"]
        ({'instance_prompt': 'photo of zwx toy'}, {'S3Uri': 's3://models/dreambooth-sm/checkpoints/zwx'})
    """
    problems = [
        *refused_resources(resources, channels),
        *_refused_values(h.to_sagemaker()),
        *_refused_by_the_job(h, resources),
    ]
    request: dict[str, Any] = {
        "TrainingJobName": resources.name,
        "AlgorithmSpecification": {
            "TrainingImage": resources.image_uri,
            "TrainingInputMode": "File",
            "MetricDefinitions": [*metric_definitions(), *(measure_definitions() if h.fidelity_encoders else ())],
        },
        "RoleArn": resources.role,
        "HyperParameters": h.to_sagemaker(),
        "InputDataConfig": [_channel(name, uri) for name, uri in channels.items()],
        "OutputDataConfig": _output_config(h, resources),
        "ResourceConfig": _resource_config(resources),
        "StoppingCondition": _stopping_condition(resources),
        "CheckpointConfig": {"S3Uri": resources.checkpoint or f"{resources.workspace}/checkpoints/{resources.name}"},
    }
    if TENSORBOARD in h.trackers:
        request["TensorBoardOutputConfig"] = {"S3OutputPath": f"{resources.workspace}/tensorboard"}
    if resources.spot:
        request["EnableManagedSpotTraining"] = True
    if resources.max_retry_attempts is not None:
        request["RetryStrategy"] = {"MaximumRetryAttempts": resources.max_retry_attempts}
    if resources.network_isolation:
        request["EnableNetworkIsolation"] = True
    if resources.vpc:
        request["VpcConfig"] = {
            "SecurityGroupIds": [each for each in resources.vpc if each.startswith("sg-")],
            "Subnets": [each for each in resources.vpc if each.startswith("subnet-")],
        }
    if resources.environment:
        request["Environment"] = dict(resources.environment)
    if resources.tags:
        request["Tags"] = [{"Key": key, "Value": value} for key, value in resources.tags.items()]
    problems += find_secrets(request)
    if problems:
        raise UserError(dict.fromkeys(problems))
    return request


def refused_resources(r: Resources, channels: Mapping[str, S3Uri | Channel]) -> Iterator[str]:
    """Finds what breaks a rule of CreateTrainingJob, whatever the hyperparameters are."""
    if not r.name or len(r.name) > MAX_NAME or not _NAME.fullmatch(r.name):
        yield (
            f"name: {r.name!r} is not the name of a job; set 1 to {MAX_NAME} letters, digits and hyphens, with a "
            "letter or digit first and last"
        )
    if not r.role or not _ROLE.fullmatch(r.role) or len(r.role) > 2048:
        yield f"role: {r.role!r} is not the ARN of a role; set arn:aws:iam::123456789012:role/NAME"
    if not r.image_uri or len(r.image_uri) > MAX_IMAGE_URI or not r.image_uri.isprintable():
        yield f"image_uri: {r.image_uri!r} is not an image; set at most {MAX_IMAGE_URI} characters, as ECR shows them"
    yield from _problems_of(lambda: find_instance(r.instance_type))
    yield from _refused_texts("environment", r.environment, MAX_ENVIRONMENT)
    for name, value in r.environment.items():
        if not _VARIABLE.fullmatch(name):
            yield f"environment: {name!r} is not the name of a variable; use letters, digits and underscores"
        if len(value) > MAX_ENVIRONMENT_TEXT:
            yield f"environment: {name} is longer than {MAX_ENVIRONMENT_TEXT} characters"
    yield from refused_tags(r.tags)
    if not 1 <= len(channels) <= MAX_CHANNELS:
        yield f"a job has 1 to {MAX_CHANNELS} input channels, and this one {len(channels)}"
    for name, place in channels.items():
        uri = place.uri if isinstance(place, Channel) else place
        if not _CHANNEL.fullmatch(name):
            yield f"channel {name!r}: its name has to be 1 to 64 letters, digits, dots, underscores and hyphens"
        yield from _refused_uri(f"channel {name}", str(uri))
    if not r.bucket:
        yield "bucket is missing; set the name of a bucket"
    else:
        yield from _problems_of(lambda: S3Uri.parse(f"s3://{r.bucket}/"), "bucket: ")
    for option, text in (("output", r.output), ("checkpoint", r.checkpoint)):
        if text is not None:
            yield from _refused_uri(option, text)
    yield from _refused_together(r)


def metric_definitions() -> list[dict[str, str]]:
    """Defines what CloudWatch reads from the job's log."""
    return [{"Name": name, "Regex": metric_pattern(name)} for name in TRAINING_METRICS]


def measure_definitions() -> list[dict[str, str]]:
    """Defines what CloudWatch reads of a job that measures its model, and what a tuning job looks for the best of."""
    return [{"Name": name, "Regex": measure_pattern(name)} for name in MEASURES]


def uploads_by_itself(resources: Resources) -> bool:
    """Whether the job sends the model to `output` itself, file by file and verified; SageMaker does it otherwise."""
    return resources.output is not None and not (resources.network_isolation or resources.compression)


def move_long_values(h: Hyperparameters) -> tuple[Hyperparameters, str | None]:
    """Prompts and concepts that are too long for a hyperparameter, as the content of a concepts file.

    Returns:
        the hyperparameters without them, naming the file in the config channel; and the file's content, or None
        where everything fits.
    """
    movable = ("instance_prompt", "class_prompt", "concepts_list")
    if isinstance(h.concepts_list, str) or not any(len(h.to_sagemaker().get(name, "")) > MAX_VALUE for name in movable):
        return h, None
    prompts = {name: getattr(h, name) for name in ("instance_prompt", "class_prompt") if getattr(h, name)}
    own = [concept.model_dump(exclude_none=True) for concept in h.inline_concepts] or [{}]
    content = json.dumps([{**prompts, **concept} for concept in own], ensure_ascii=False, indent=1)
    kept = {name: getattr(h, name) for name in h.model_fields_set if name not in movable}
    moved = Hyperparameters.parse({**kept, "concepts_list": f"{CHANNELS}/{CONFIG_CHANNEL}/{CONCEPTS_FILE}"})
    return moved, content


def find_secrets(request: object, environment: Mapping[str, str] | None = None) -> list[str]:
    """Places of a request that hold a secret, which everyone who may describe the job would see; never its value.

    Args:
        environment: variables of this process, whose secrets are looked for as well.
    """
    known = secrets_of(environment or {})
    found = [
        f"{place} holds a secret, which whoever may describe the job could read; leave it out, and name the AWS "
        "secret that holds the hub's token with hf_token_secret"
        for place, text in _texts(request)
        if SECRET_VALUE.search(text) or any(value in text for value in known)
    ]
    if isinstance(request, Mapping):
        found += [
            f"environment: {name} is the name of a secret, and whoever may describe the job could read it; leave it out"
            for name in request.get("Environment", {})
            if names_secret(name)
        ]
    return found


def _channel(name: str, place: S3Uri | Channel) -> dict[str, Any]:
    channel = place if isinstance(place, Channel) else Channel.at(place)
    return {"ChannelName": name, "DataSource": {"S3DataSource": channel.data_source}}


def _output_config(h: Hyperparameters, resources: Resources) -> dict[str, str]:
    """Says where SageMaker puts what lies in ``/opt/ml/model``: plain files, unless compression is asked for."""
    default = f"{resources.workspace}/jobs"
    config = {"S3OutputPath": default if h.manual_upload_model_path else resources.output or default}
    if resources.kms is not None:
        config["KmsKeyId"] = resources.kms
    return config if resources.compression else {**config, "CompressionType": "NONE"}


def _resource_config(resources: Resources) -> dict[str, Any]:
    config: dict[str, Any] = {
        "InstanceType": resources.instance_type,
        "InstanceCount": resources.instance_count,
        "VolumeSizeInGB": resources.volume_gb or DEFAULT_VOLUME_GB,
    }
    if resources.kms is not None and not _has_own_disk(resources.instance_type):
        config["VolumeKmsKeyId"] = resources.kms
    if resources.keep_alive:
        config["KeepAlivePeriodInSeconds"] = resources.keep_alive
    return config


def _stopping_condition(resources: Resources) -> dict[str, int]:
    minutes = resources.max_minutes or DEFAULT_MAX_MINUTES
    condition = {"MaxRuntimeInSeconds": 60 * minutes}
    if resources.spot:
        wait = resources.max_wait_minutes or min(2 * minutes, MAX_RUN_MINUTES)
        condition["MaxWaitTimeInSeconds"] = 60 * wait
    return condition


def _has_own_disk(instance_type: str) -> bool:
    try:
        return find_instance(instance_type).has_own_disk
    except UserError:
        return True


def _refused_values(values: Mapping[str, str]) -> Iterator[str]:
    if len(values) > MAX_HYPERPARAMETERS:
        yield f"a job has at most {MAX_HYPERPARAMETERS} hyperparameters, and this one {len(values)}"
    for name, value in values.items():
        if len(value) > MAX_VALUE:
            yield f"{name} has {len(value):,} characters; SageMaker takes {MAX_VALUE}: put it into a concepts_list file"
        if len(value.splitlines()) > 1:
            yield f"{name} holds a line break, which a hyperparameter can't; put it into one line"


def _refused_texts(place: str, texts: Mapping[str, str], most: int) -> Iterator[str]:
    if len(texts) > most:
        yield f"{place}: a job takes at most {most}, and this one has {len(texts)}"


def refused_tags(tags: Mapping[str, str]) -> Iterator[str]:
    """Finds tags that AWS would refuse."""
    yield from _refused_texts("tags", tags, MAX_TAGS)
    for key, value in tags.items():
        if not 1 <= len(key) <= 128 or len(value) > 256 or not _TAG.fullmatch(key) or not _TAG.fullmatch(value):
            yield (
                f"tags: {key!r} is not valid; keys have 1 to 128 characters and values up to 256: letters, digits, "
                "blanks and . : / = + - @ _"
            )
        if key.lower().startswith("aws:"):
            yield f"tags: {key!r}: names that start with aws: are AWS's own; take another"


def _refused_uri(place: str, text: str) -> Iterator[str]:
    yield from _problems_of(lambda: S3Uri.parse(text), f"{place}: ")
    if len(text) >= MAX_S3_URI or len(text.splitlines()) > 1:
        yield f"{place}: {text[:60]}... has to be one line of less than {MAX_S3_URI} characters"


def _refused_together(r: Resources) -> Iterator[str]:
    minutes = r.max_minutes or DEFAULT_MAX_MINUTES
    if r.max_wait_minutes is not None and not r.spot:
        yield "max_wait_minutes is for spot=True; leave it out, or set max_minutes"
    elif r.max_wait_minutes is not None and r.max_wait_minutes < minutes:
        yield f"max_wait_minutes={r.max_wait_minutes} is less than max_minutes={minutes}; set {minutes} or more"
    if r.spot and r.keep_alive:
        yield "spot=True can't keep its instance; leave keep_alive out, or set spot=False"
    if r.volume_gb is not None and _has_own_disk(r.instance_type):
        yield f"volume_gb: {r.instance_type} has disks of its own, of a fixed size; leave volume_gb out"
    if r.kms is not None and not _KMS.fullmatch(r.kms):
        yield f"kms: {r.kms!r} is not the id or ARN of a KMS key"
    odd = [each for each in r.vpc if not _VPC_ID.fullmatch(each)]
    groups = sum(each.startswith("sg-") for each in r.vpc)
    if odd:
        yield f"vpc: {', '.join(map(repr, odd))}: set ids of subnets and security groups, subnet-... and sg-..."
    elif r.vpc and not (1 <= groups <= 5 and 1 <= len(r.vpc) - groups <= 16):
        yield f"vpc: {len(r.vpc) - groups} subnets and {groups} security groups; name 1 to 16 and 1 to 5 of them"


def _refused_by_the_job(h: Hyperparameters, r: Resources) -> Iterator[str]:
    """Finds what SageMaker would take, and the job would fail with, or do otherwise than it says."""
    if h.output_mode == ("uncompressed" if r.compression else "archive"):
        yield f"output_mode={h.output_mode} and compression={r.compression} say two things; leave output_mode out"
    yield from find_missing_settings(h, r.environment)
    if not r.network_isolation:
        return
    if h.manual_upload_model_path is not None:
        yield (
            "network_isolation=True: the job can't reach S3 itself; leave manual_upload_model_path out, and SageMaker "
            "saves the model to `output`"
        )
    if h.class_cache is not None:
        yield "network_isolation=True: the job can't reach class_cache in S3; leave it out"
    online = [MLFLOW, *([WANDB] if is_online(r.environment) else [])]
    if remote := [name for name in h.trackers if name in online]:
        yield (
            f"network_isolation=True: the job can't reach {' and '.join(remote)}; leave them out of report_to, or set "
            "WANDB_MODE=offline in its environment"
        )
    for name in ("pretrained_model_name_or_path", "pretrained_vae_name_or_path", "pretrained_parts_name_or_path"):
        if _is_remote(getattr(h, name)):
            yield (
                f"network_isolation=True: the job can't fetch {name}={getattr(h, name)}; give it as an s3:// prefix or "
                "a local directory, which becomes a channel"
            )
    encoders = [word for word in (h.fidelity_encoders or "").split() if _is_remote(word.partition("=")[2] or None)]
    if encoders:
        yield f"network_isolation=True: the job can't fetch fidelity_encoders={' '.join(encoders)}; leave them out"


def _is_remote(model: str | None) -> bool:
    """Whether a model has to come over the network: a hub id or S3, no directory and no model of the image's own."""
    return model is not None and not model.startswith(("/", ".")) and model not in SHIPPED


def _problems_of(check: Any, prefix: str = "") -> Iterable[str]:
    problems = Problems()
    with problems.collected():
        check()
    return [f"{prefix}{problem}" for problem in problems.found]


def _texts(value: object, place: str = "request") -> Iterator[tuple[str, str]]:
    """Every text of a request, and where it stands."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield f"{place}: a key", str(key)
            yield from _texts(each, f"{place}.{key}" if len(str(key)) <= 64 else place)
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from _texts(each, f"{place}[{number}]")
