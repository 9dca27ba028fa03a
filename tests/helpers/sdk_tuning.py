"""Sends the requests of tuning jobs with an SDK's own tuner, as its own user would.

``python sdk_tuning.py estimator|model_trainer``, in an environment with that SDK and with requests as a JSON list on
standard input, prints the bodies that went to SageMaker.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import boto3

from launcher import sdks


def training(request: dict[str, Any]) -> dict[str, Any]:
    """The request of a training job that is a trial of the tuning job, without values."""
    definition = request["TrainingJobDefinition"]
    return {
        "TrainingJobName": request["HyperParameterTuningJobName"],
        "HyperParameters": definition["StaticHyperParameters"],
        "ResourceConfig": definition["HyperParameterTuningResourceConfig"],
        "CheckpointConfig": {"S3Uri": "s3://models/unused"},
        **{key: value for key, value in definition.items() if not key.startswith(("Static", "HyperParameter"))},
    }


def ranges(request: dict[str, Any], kinds: dict[str, Any]) -> dict[str, Any]:
    found = request["HyperParameterTuningJobConfig"]["ParameterRanges"]
    numbers = {
        each["Name"]: kinds[kind](read(each["MinValue"]), read(each["MaxValue"]), each["ScalingType"])
        for kind, read in (("Integer", int), ("Continuous", float))
        for each in found[f"{kind}ParameterRanges"]
    }
    lists = {each["Name"]: kinds["Categorical"](each["Values"]) for each in found["CategoricalParameterRanges"]}
    return {**numbers, **lists}


def how(request: dict[str, Any]) -> dict[str, Any]:
    """Options that both tuners have."""
    config = request["HyperParameterTuningJobConfig"]
    goal, limits = config["HyperParameterTuningJobObjective"], config["ResourceLimits"]
    return {
        "objective_metric_name": goal["MetricName"],
        "objective_type": goal["Type"],
        "metric_definitions": request["TrainingJobDefinition"]["AlgorithmSpecification"]["MetricDefinitions"],
        "strategy": config["Strategy"],
        "max_jobs": limits["MaxNumberOfTrainingJobs"],
        "max_parallel_jobs": limits["MaxParallelTrainingJobs"],
        "max_runtime_in_seconds": limits.get("MaxRuntimeInSeconds"),
        "early_stopping_type": config["TrainingJobEarlyStoppingType"],
        "random_seed": config.get("RandomSeed"),
        "tags": request["Tags"],
    }


def with_estimator(request: dict[str, Any], session: boto3.Session) -> None:
    from sagemaker.parameter import CategoricalParameter, ContinuousParameter, IntegerParameter
    from sagemaker.tuner import (
        HyperbandStrategyConfig,
        HyperparameterTuner,
        StrategyConfig,
        TuningJobCompletionCriteriaConfig,
        WarmStartConfig,
        WarmStartTypes,
    )

    estimator = sdks.estimator(training(request), session)
    estimator.tags = None  # or it would add them to the tuner's
    if "CheckpointConfig" not in request["TrainingJobDefinition"]:
        estimator.checkpoint_s3_uri = None
    kinds = {"Integer": IntegerParameter, "Continuous": ContinuousParameter, "Categorical": CategoricalParameter}
    options = how(request)
    config, warm = request["HyperParameterTuningJobConfig"], request.get("WarmStartConfig")
    if hyperband := config.get("StrategyConfig", {}).get("HyperbandStrategyConfig"):
        limits = HyperbandStrategyConfig(hyperband["MaxResource"], hyperband["MinResource"])
        options["strategy_config"] = StrategyConfig(limits)
    if criteria := config.get("TuningJobCompletionCriteria"):
        options["completion_criteria_config"] = TuningJobCompletionCriteriaConfig(
            criteria["BestObjectiveNotImproving"]["MaxNumberOfTrainingJobsNotImproving"],
            True,
            criteria["TargetObjectiveMetricValue"],
        )
    if warm:
        parents = {each["HyperParameterTuningJobName"] for each in warm["ParentHyperParameterTuningJobs"]}
        options["warm_start_config"] = WarmStartConfig(WarmStartTypes(warm["WarmStartType"]), parents)
    tuner = HyperparameterTuner(estimator, hyperparameter_ranges=ranges(request, kinds), **options)
    from sagemaker.inputs import TrainingInput

    inputs = {
        channel["ChannelName"]: TrainingInput(source["S3Uri"], s3_data_type=source["S3DataType"])
        for channel in request["TrainingJobDefinition"]["InputDataConfig"]
        for source in [channel["DataSource"]["S3DataSource"]]
    }
    tuner.fit(inputs, job_name=request["HyperParameterTuningJobName"], wait=False)


def with_model_trainer(request: dict[str, Any], session: boto3.Session) -> None:
    from sagemaker.core.parameter import CategoricalParameter, ContinuousParameter, IntegerParameter
    from sagemaker.core.shapes import (
        HyperParameterTuningJobStrategyConfig,
        HyperParameterTuningJobWarmStartConfig,
        TuningJobCompletionCriteria,
    )
    from sagemaker.train.tuner import HyperparameterTuner

    trainer = sdks.model_trainer(training(request), session)
    if "CheckpointConfig" not in request["TrainingJobDefinition"]:
        trainer.checkpoint_config = None
    kinds = {"Integer": IntegerParameter, "Continuous": ContinuousParameter, "Categorical": CategoricalParameter}
    options = how(request)
    config = request["HyperParameterTuningJobConfig"]
    for key, name, shape, place in (
        ("StrategyConfig", "strategy_config", HyperParameterTuningJobStrategyConfig, config),
        ("TuningJobCompletionCriteria", "completion_criteria_config", TuningJobCompletionCriteria, config),
        ("WarmStartConfig", "warm_start_config", HyperParameterTuningJobWarmStartConfig, request),
    ):
        if key in place:
            options[name] = shape(**sdks.snake(place[key]))
    tuner = HyperparameterTuner(trainer, hyperparameter_ranges=ranges(request, kinds), **options)
    tuner.tune(job_name=request["HyperParameterTuningJobName"], wait=False)


def main(backend: str) -> None:
    sent: list[Any] = []
    session = boto3.Session()
    session.events.register(
        "before-call.sagemaker.CreateHyperParameterTuningJob",
        lambda params, **_: sent.append(json.loads(params["body"])),
    )
    start = {"estimator": with_estimator, "model_trainer": with_model_trainer}[backend]
    for request in json.load(sys.stdin):
        start(request, session)
    print(json.dumps(sent))


if __name__ == "__main__":
    main(sys.argv[1])
