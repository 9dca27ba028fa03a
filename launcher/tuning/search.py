"""How SageMaker searches: strategy, goal, number of trials, and when it ends."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.report import TRAINING_METRICS
from launcher.tuning.ranges import Range, parameter_ranges

STRATEGIES = {each.lower(): each for each in ("Bayesian", "Random", "Hyperband", "Grid")}
# Measures of a job, and which of their values are good.
OBJECTIVES = {
    "score": "Maximize",
    "subject": "Maximize",
    "prompt": "Maximize",
    "prior": "Minimize",
    "diversity": "Maximize",
}
# The tag that trials have in common, for the bill: SageMaker gives a tuning job's tags to its training jobs.
TAG = "dreambooth-sm:tuning"
# The limits of CreateHyperParameterTuningJob, and quotas at their greatest.
MAX_NAME, MAX_PARENTS, MAX_PARALLEL, MAX_ENVIRONMENT = 32, 5, 100, 48
_MOST_TRIALS, _MOST_RANDOM_TRIALS = 750, 10_000
_LEAST_PATIENCE, _LEAST_MINUTES, _MOST_MINUTES = 3, 2, 15_768_000 // 60
_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,31}")
# Of a training job's request, what the definition of a tuning job's training jobs has alike.
_ALIKE = (
    "AlgorithmSpecification",
    "RoleArn",
    "InputDataConfig",
    "VpcConfig",
    "OutputDataConfig",
    "StoppingCondition",
    "EnableNetworkIsolation",
    "EnableManagedSpotTraining",
    "RetryStrategy",
    "Environment",
)


@dataclass(frozen=True)
class Search:
    """A search, whatever it goes over.

    Attributes:
        objective: the measure that is to be best.
        strategy: bayesian, random, hyperband or grid.
        max_trials: training jobs in all; None: 12, and with grid one for each combination.
        parallel: training jobs at a time.
        early_stopping: end trials that fall behind.
        warm_start: names of earlier tuning jobs whose trials count.
        same_data: whether these had the same pictures and image: their trials then take part themselves.
        target: end when a trial is as good as this.
        patience: end when so many trials were not better than the best before them.
        until_convergence: end when SageMaker finds that nothing better is to be expected.
        max_total_minutes: the search ends after so many.
        search_seed: of the values that are drawn.
    """

    objective: str = "score"
    strategy: str = "bayesian"
    max_trials: int | None = None
    parallel: int = 2
    early_stopping: bool = False
    warm_start: tuple[str, ...] = ()
    same_data: bool = False
    target: float | None = None
    patience: int | None = None
    until_convergence: bool = False
    max_total_minutes: int | None = None
    search_seed: int | None = None

    @property
    def service_strategy(self) -> str:
        """As SageMaker spells it."""
        return STRATEGIES[self.strategy.lower()]

    @property
    def looks_while_training(self) -> bool:
        """Whether trials are compared before they have ended."""
        return self.early_stopping or self.strategy.lower() == "hyperband"

    def trials(self, ranges: Sequence[Range]) -> int:
        """Training jobs in all, at most."""
        if self.strategy.lower() == "grid":
            return math.prod(len(each.values) for each in ranges)
        return self.max_trials or 12

    def problems(self) -> Iterator[str]:
        """What is wrong with it, whatever it goes over."""
        strategy = self.strategy.lower()
        if strategy not in STRATEGIES:
            yield f"strategy={self.strategy} is not one; set {', '.join(STRATEGIES)}"
        if self.objective in TRAINING_METRICS:
            yield (
                f"objective={self.objective} is of the training and says little of the pictures; set one of "
                f"{', '.join(OBJECTIVES)}"
            )
        elif self.objective not in OBJECTIVES:
            yield f"objective={self.objective} is not a measure of a job; set one of {', '.join(OBJECTIVES)}"
        most = _MOST_RANDOM_TRIALS if strategy == "random" else _MOST_TRIALS
        if strategy == "grid" and self.max_trials is not None:
            yield "max_trials: strategy=grid has a trial for each combination of values; leave max_trials out"
        elif self.max_trials is not None and not 1 <= self.max_trials <= most:
            yield f"max_trials={self.max_trials}: set 1 to {most:,} with strategy={strategy}"
        if not 1 <= self.parallel <= MAX_PARALLEL:
            yield f"parallel={self.parallel}: set 1 to {MAX_PARALLEL}"
        if self.early_stopping and strategy == "hyperband":
            yield "early_stopping: strategy=hyperband stops trials itself; leave early_stopping out"
        if len({*self.warm_start}) != len(self.warm_start) or len(self.warm_start) > MAX_PARENTS:
            yield f"warm_start: name at most {MAX_PARENTS} tuning jobs, each once"
        if self.same_data and not self.warm_start:
            yield "same_data says something of the tuning jobs of warm_start; name some, or leave same_data out"
        if self.target is not None and not math.isfinite(self.target):
            yield f"target={self.target:g}: set a value of the objective"
        if self.patience is not None and self.patience < _LEAST_PATIENCE:
            yield f"patience={self.patience}: set {_LEAST_PATIENCE} or more trials, or leave it out"
        minutes = self.max_total_minutes
        if minutes is not None and not _LEAST_MINUTES <= minutes <= _MOST_MINUTES:
            yield f"max_total_minutes={minutes}: set {_LEAST_MINUTES} to {_MOST_MINUTES:,}"
        if self.search_seed is not None and not 0 <= self.search_seed < 2**31:
            yield f"search_seed={self.search_seed}: set 0 to {2**31 - 1}"

    def problems_with(self, ranges: Sequence[Range], h: Hyperparameters) -> Iterator[str]:
        """What is wrong with it for these ranges, and this job."""
        numbers = [each.name for each in ranges if each.kind != "Categorical"]
        if self.strategy.lower() == "grid":
            if numbers:
                yield f"strategy=grid goes over lists of values; give lists for {', '.join(numbers)}"
            elif self.trials(ranges) > _MOST_TRIALS:
                yield f"strategy=grid: {self.trials(ranges):,} combinations; SageMaker runs {_MOST_TRIALS} at most"
        lengths = {each.name for each in ranges} & {"max_train_steps", "num_train_epochs"}
        if self.strategy.lower() == "hyperband" and lengths:
            yield (
                f"strategy=hyperband chooses itself how long trials train; set {' and '.join(sorted(lengths))} to one "
                "value"
            )
        classes = h.class_prompt or any(each.class_prompt for each in h.inline_concepts)
        if self.objective in ("prior", "diversity") and not classes and h.concepts_list is None:
            yield f"objective={self.objective} is measured on pictures of the class; set class_prompt"
        if self.objective == "prompt" and not re.search("judge|clip=", h.fidelity_encoders or ""):
            yield (
                "objective=prompt: nothing reads prompts; set "
                "fidelity_encoders='dino=facebook/dinov2-base clip=openai/clip-vit-large-patch14'"
            )

    def words(self, ranges: Sequence[Range]) -> str:
        """For people, in a line."""
        goal = "greatest" if OBJECTIVES[self.objective] == "Maximize" else "least"
        stops = ", those that fall behind stopped" if self.looks_while_training else ""
        count = self.trials(ranges)
        return (
            f"{count} trial{'s' * (count > 1)}, {min(self.parallel, count)} at a time{stops}; "
            f"strategy={self.strategy.lower()}, for the {goal} {self.objective}"
        )


def refused_name(name: str) -> str | None:
    """Why this is not the name of a tuning job."""
    if _NAME.fullmatch(name) and len(name) <= MAX_NAME:
        return None
    return (
        f"name: {name!r} is not the name of a tuning job; set 1 to {MAX_NAME} letters, digits and hyphens, with a "
        "letter or digit first and last"
    )


def tuning_request(
    training: Mapping[str, Any], name: str, ranges: Sequence[Range], search: Search, measures: int
) -> dict[str, Any]:
    """The request of a tuning job, as boto3's ``create_hyper_parameter_tuning_job`` takes it.

    Args:
        training: the request of a training job with any values in the ranges.
        name: of the tuning job.
        measures: how often a trial says its measures, with strategy=hyperband.
    """
    searched = {each.name for each in ranges}
    config: dict[str, Any] = {
        "Strategy": search.service_strategy,
        "HyperParameterTuningJobObjective": {"Type": OBJECTIVES[search.objective], "MetricName": search.objective},
        "ResourceLimits": {
            "MaxNumberOfTrainingJobs": search.trials(ranges),
            "MaxParallelTrainingJobs": min(search.parallel, search.trials(ranges)),
        },
        "ParameterRanges": parameter_ranges(ranges),
        "TrainingJobEarlyStoppingType": "Auto" if search.early_stopping else "Off",
    }
    if search.strategy.lower() == "hyperband":
        # One more than there are: a trial that has come to its end is not stopped at it.
        config["StrategyConfig"] = {"HyperbandStrategyConfig": {"MinResource": 1, "MaxResource": measures + 1}}
    if search.max_total_minutes is not None:
        config["ResourceLimits"]["MaxRuntimeInSeconds"] = 60 * search.max_total_minutes
    if search.search_seed is not None:
        config["RandomSeed"] = search.search_seed
    if criteria := _criteria(search):
        config["TuningJobCompletionCriteria"] = criteria
    resources = {key: value for key, value in training["ResourceConfig"].items() if key != "KeepAlivePeriodInSeconds"}
    definition: dict[str, Any] = {
        "StaticHyperParameters": {
            key: value for key, value in training["HyperParameters"].items() if key not in searched
        },
        "HyperParameterTuningResourceConfig": resources,
        **{key: training[key] for key in _ALIKE if key in training},
    }
    if training.get("EnableManagedSpotTraining") or "RetryStrategy" in training:
        # All trials have one place, and each fetches what lies there: without another start there is nothing to fetch.
        definition |= {key: training[key] for key in ("CheckpointConfig",) if key in training}
    request: dict[str, Any] = {
        "HyperParameterTuningJobName": name,
        "HyperParameterTuningJobConfig": config,
        "TrainingJobDefinition": definition,
        "Tags": [*training.get("Tags", []), {"Key": TAG, "Value": name}],
    }
    if search.warm_start:
        request["WarmStartConfig"] = {
            "ParentHyperParameterTuningJobs": [{"HyperParameterTuningJobName": each} for each in search.warm_start],
            "WarmStartType": "IdenticalDataAndAlgorithm" if search.same_data else "TransferLearning",
        }
    return request


def _criteria(search: Search) -> dict[str, Any]:
    criteria: dict[str, Any] = {}
    if search.target is not None:
        criteria["TargetObjectiveMetricValue"] = search.target
    if search.patience is not None:
        criteria["BestObjectiveNotImproving"] = {"MaxNumberOfTrainingJobsNotImproving": search.patience}
    if search.until_convergence:
        criteria["ConvergenceDetected"] = {"CompleteOnConvergence": "Enabled"}
    return criteria
