"""The values that trials of the embedded SageMaker's tuning jobs are tried with: optuna chooses them.

At random, over a grid, or, for ``Bayesian``, by its tree of Parzen estimators, which is not SageMaker's own Gaussian
process. Trials that fall behind are stopped by its pruners: the median of the others for early stopping, Hyperband's
brackets.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

# Hyperband's: of so many trials, one has so many times the resources.
_REDUCTION = 3


def make_study(name: str, config: Mapping[str, Any], earlier: Iterable[tuple[Mapping[str, Any], float]]) -> Study:
    """What chooses values, and says which trials fall behind.

    Args:
        name: of the tuning job, which Hyperband deals trials out to its brackets by.
        config: HyperParameterTuningJobConfig.
        earlier: values and objectives of trials of other tuning jobs that count.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ranges = distributions(config)
    seed, planned = config.get("RandomSeed"), config["ResourceLimits"].get("MaxNumberOfTrainingJobs", 100)
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if config["Strategy"] == "Bayesian":
        at_random = max(2, min(10, planned // 3))
        sampler = optuna.samplers.TPESampler(n_startup_trials=at_random, seed=seed, constant_liar=True)
    elif config["Strategy"] == "Hyperband":
        resources = config.get("StrategyConfig", {}).get("HyperbandStrategyConfig", {})
        pruner = optuna.pruners.HyperbandPruner(
            resources.get("MinResource", 1), resources.get("MaxResource", "auto"), _REDUCTION
        )
    if config.get("TrainingJobEarlyStoppingType") == "Auto":
        pruner = optuna.pruners.MedianPruner(n_startup_trials=3)
    maximizes = config["HyperParameterTuningJobObjective"]["Type"] == "Maximize"
    study = optuna.create_study(
        sampler=sampler, pruner=pruner, direction="maximize" if maximizes else "minimize", study_name=name
    )
    if config["Strategy"] == "Grid":
        for values in combinations(config):
            study.enqueue_trial(values)
    for params, value in earlier:
        with suppress(ValueError):  # of other hyperparameters, or out of these ranges
            study.add_trial(
                create_trial(state=TrialState.COMPLETE, params=dict(params), distributions=ranges, value=value)
            )
    return study


def combinations(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All of lists of values."""
    lists = {each["Name"]: each["Values"] for each in all_ranges(config) if each["Kind"] == "Categorical"}
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def distributions(config: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """The ranges as optuna has them, by the hyperparameters' names."""
    return {each["Name"]: distribution(each) for each in all_ranges(config)}


def all_ranges(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The entries of ParameterRanges, each with its ``Kind``."""
    for kind, each in config.get("ParameterRanges", {}).items():
        for found in each:
            yield {**found, "Kind": kind.removesuffix("ParameterRanges")}


def distribution(found: Mapping[str, Any]) -> BaseDistribution:
    """A range as optuna has it.

    Raises:
        ValueError: its ends are not in order, or not of its scale.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if found["Kind"] == "Categorical":
        return CategoricalDistribution(found["Values"])
    logarithmic = found.get("ScalingType") == "Logarithmic"
    if found["Kind"] == "Integer":
        return IntDistribution(int(found["MinValue"]), int(found["MaxValue"]), log=logarithmic)
    return FloatDistribution(float(found["MinValue"]), float(found["MaxValue"]), log=logarithmic)
