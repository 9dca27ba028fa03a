"""The same request by the SageMaker SDKs: the Estimator of SDK 2, and the ModelTrainer of SDK 3."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dreambooth_sm.errors import UserError

if TYPE_CHECKING:
    from boto3.session import Session
    from sagemaker.estimator import Estimator
    from sagemaker.train import ModelTrainer


def estimator(request: Mapping[str, Any], session: Session | None = None) -> Estimator:
    """An Estimator whose ``fit()`` sends the request.

    Args:
        session: boto3's; default: the standard AWS settings.

    Raises:
        UserError: SDK 2 is not installed.
    """
    try:
        from sagemaker import Session as SageMakerSession
        from sagemaker.debugger import TensorBoardOutputConfig
        from sagemaker.estimator import Estimator
        from sagemaker.inputs import TrainingInput
    except ImportError as error:
        raise UserError(f"launcher.estimator needs the SageMaker SDK 2 ({error}): {_install('estimator')}") from error

    channels = {
        channel["ChannelName"]: TrainingInput(source["S3Uri"], s3_data_type=source["S3DataType"])
        for channel in request["InputDataConfig"]
        for source in [channel["DataSource"]["S3DataSource"]]
    }

    class DreamBoothEstimator(Estimator):  # type: ignore[misc]  # the SDK has no types
        """Knows its inputs and its name, and leaves the profiler out of the request."""

        def fit(self, inputs: Any = None, *args: Any, job_name: str | None = None, **options: Any) -> None:
            super().fit(inputs or channels, *args, job_name=job_name or request["TrainingJobName"], **options)

        def _prepare_profiler_for_training(self) -> None:
            self.profiler_config = self.profiler_rule_configs = None

    resources, output = request["ResourceConfig"], request["OutputDataConfig"]
    stopping, vpc = request["StoppingCondition"], request.get("VpcConfig", {})
    events = request.get("TensorBoardOutputConfig")
    return DreamBoothEstimator(
        image_uri=request["AlgorithmSpecification"]["TrainingImage"],
        role=request["RoleArn"],
        instance_type=resources["InstanceType"],
        instance_count=resources["InstanceCount"],
        volume_size=resources["VolumeSizeInGB"],
        volume_kms_key=resources.get("VolumeKmsKeyId"),
        keep_alive_period_in_seconds=resources.get("KeepAlivePeriodInSeconds"),
        hyperparameters=dict(request["HyperParameters"]),
        metric_definitions=request["AlgorithmSpecification"]["MetricDefinitions"],
        environment=request.get("Environment"),
        max_run=stopping["MaxRuntimeInSeconds"],
        max_wait=stopping.get("MaxWaitTimeInSeconds"),
        max_retry_attempts=request.get("RetryStrategy", {}).get("MaximumRetryAttempts"),
        use_spot_instances=request.get("EnableManagedSpotTraining", False),
        checkpoint_s3_uri=request["CheckpointConfig"]["S3Uri"],
        output_path=output["S3OutputPath"],
        output_kms_key=output.get("KmsKeyId"),
        disable_output_compression=output.get("CompressionType") == "NONE",
        subnets=vpc.get("Subnets"),
        security_group_ids=vpc.get("SecurityGroupIds"),
        enable_network_isolation=request.get("EnableNetworkIsolation", False),
        tags=request.get("Tags"),
        tensorboard_output_config=TensorBoardOutputConfig(events["S3OutputPath"]) if events else None,
        debugger_hook_config=False,
        disable_profiler=True,
        sagemaker_session=SageMakerSession(session) if session else None,
    )


def model_trainer(request: Mapping[str, Any], session: Session | None = None) -> ModelTrainer:
    """A ModelTrainer whose ``train()`` sends the request, under a name to which the SDK adds the time.

    Args:
        session: boto3's; default: the standard AWS settings.

    Raises:
        UserError: SDK 3 is not installed.
    """
    try:
        from sagemaker.core.helper.session_helper import Session as SageMakerSession
        from sagemaker.core.shapes import (
            Channel,
            CheckpointConfig,
            MetricDefinition,
            OutputDataConfig,
            RetryStrategy,
            StoppingCondition,
            Tag,
            TensorBoardOutputConfig,
        )
        from sagemaker.core.training.configs import Compute, Networking
        from sagemaker.train import ModelTrainer
    except ImportError as error:
        raise UserError(
            f"launcher.model_trainer needs the SageMaker SDK 3 ({error}): {_install('model-trainer')}"
        ) from error

    vpc, isolated = request.get("VpcConfig"), request.get("EnableNetworkIsolation")
    networking = None
    if vpc or isolated:
        networking = Networking(**snake(vpc or {}), enable_network_isolation=isolated)
    spot = request.get("EnableManagedSpotTraining")
    trainer = ModelTrainer(
        training_image=request["AlgorithmSpecification"]["TrainingImage"],
        role=request["RoleArn"],
        base_job_name=request["TrainingJobName"],
        compute=Compute(**snake(request["ResourceConfig"]), enable_managed_spot_training=spot),
        networking=networking,
        stopping_condition=StoppingCondition(**snake(request["StoppingCondition"])),
        output_data_config=OutputDataConfig(**snake(request["OutputDataConfig"])),
        input_data_config=[Channel(**snake(channel)) for channel in request["InputDataConfig"]],
        checkpoint_config=CheckpointConfig(**snake(request["CheckpointConfig"])),
        hyperparameters=dict(request["HyperParameters"]),
        environment=dict(request.get("Environment", {})),
        tags=[Tag(**snake(tag)) for tag in request.get("Tags", [])] or None,
        sagemaker_session=SageMakerSession(session) if session else None,
    )
    if retry := request.get("RetryStrategy"):
        trainer = trainer.with_retry_strategy(RetryStrategy(**snake(retry)))
    if events := request.get("TensorBoardOutputConfig"):
        trainer = trainer.with_tensorboard_output_config(TensorBoardOutputConfig(**snake(events)))
    return trainer.with_metric_definitions(
        [MetricDefinition(**snake(definition)) for definition in request["AlgorithmSpecification"]["MetricDefinitions"]]
    )


def _install(extra: str) -> str:
    return f"pip install 'dreambooth-sm[{extra}]', in an environment without the other SageMaker SDK"


def snake(value: Any) -> Any:
    """A request as SDK 3 calls its fields, all the way down: ``{"InstanceType": ...}`` as ``{"instance_type": ...}``.
    The names of variables stay."""
    if isinstance(value, Mapping):
        return {_snake_case(name): each if name == "Environment" else snake(each) for name, each in value.items()}
    return [snake(each) for each in value] if isinstance(value, list) else value


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
