"""Tuning: what may be searched over, how, and the request that says so."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.storage import S3Uri
from launcher.instances import find_instance
from launcher.resources import Resources
from launcher.training_request import training_request
from launcher.tuning.prepare import _within_quota
from launcher.tuning.ranges import Range, parameter_ranges, parse_ranges, read_ranges, settings
from launcher.tuning.search import OBJECTIVES, TAG, Search, refused_name, tuning_request
from launcher.tuning.status import TuningStatus, read_trials
from launcher.tuning.trials import check_trials, estimate_trials, plan_trials
from tests.helpers.api import refusals

PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
RESOURCES: dict[str, Any] = {
    "instance_type": "ml.g5.xlarge",
    "name": "zwx",
    "bucket": "models",
    "role": "arn:aws:iam::123456789012:role/service-role/train",
    "image_uri": "123456789012.dkr.ecr.us-west-2.amazonaws.com/dreambooth-sm:1",
}
CHANNELS = {"images": S3Uri("models", "pictures")}
A10G = find_instance("ml.g5.xlarge")


def parse(**values: object) -> Hyperparameters:
    return Hyperparameters.parse({**PROMPTS, **values})


def names(ranges: list[Range]) -> set[str]:
    return {each.name for each in ranges}


def request_of(
    ranges: Any, search: Search, values: dict[str, object] | None = None, **resources: object
) -> dict[str, Any]:
    trials = plan_trials(parse(**(values or {"method": "lora"})), ranges, search, pictures=5)
    whole = Resources.parse({**RESOURCES, **resources})
    training = training_request(trials.hyperparameters, whole, CHANNELS)
    return tuning_request(training, "zwx", trials.ranges, search, trials.measures)


# Ranges


def test_ranges_are_the_knobs_own() -> None:
    found = {each.name: each for each in read_ranges(None, parse(method="lora"))}
    assert names([*found.values()]) == {"learning_rate", "max_train_steps", "lora_rank", "prior_loss_weight"}
    # A range of a rate moves with the method's default, as 1e-4 is to 2e-6.
    assert found["learning_rate"] == Range("learning_rate", (2.5e-5, 5e-4), "Continuous", True)
    assert found["lora_rank"] == Range("lora_rank", (4, 64), "Integer", True)
    assert found["max_train_steps"] == Range("max_train_steps", (200, 2000), "Integer")
    (full,) = read_ranges(["learning_rate"], parse())
    assert full.values == (5e-7, 1e-5)


def test_what_is_set_or_means_nothing_is_not_searched_over() -> None:
    assert names(read_ranges(None, parse(max_train_steps=400))) == {"learning_rate", "prior_loss_weight"}
    assert names(read_ranges(None, parse(class_prompt=None))) == {"learning_rate", "max_train_steps"}
    assert "learning_rate" not in names(read_ranges(None, parse(optimizer="prodigy")))


def test_ranges_are_what_they_say() -> None:
    given = {
        "learning_rate": (1e-5, 1e-4, "linear"),
        "lora_rank": (4, 8),
        "lora_targets": ["attention", "linear"],
        "lora_variant": None,
        "use_ema": [True, False],
        "train_batch_size": [1, 2, 4],
        "lora_dropout": (0.0, 0.5),
    }
    found = read_ranges(given, parse(method="lora"))
    assert parameter_ranges(found) == {
        "IntegerParameterRanges": [
            {"Name": "lora_rank", "MinValue": "4", "MaxValue": "8", "ScalingType": "Logarithmic"}
        ],
        "ContinuousParameterRanges": [
            {"Name": "learning_rate", "MinValue": "1e-05", "MaxValue": "0.0001", "ScalingType": "Linear"},
            {"Name": "lora_dropout", "MinValue": "0.0", "MaxValue": "0.5", "ScalingType": "Linear"},
        ],
        "CategoricalParameterRanges": [
            {"Name": "lora_targets", "Values": ["attention", "linear"]},
            {"Name": "lora_variant", "Values": ["lora", "dora", "loha", "lokr", "oft"]},
            {"Name": "use_ema", "Values": ["true", "false"]},
            {"Name": "train_batch_size", "Values": ["1", "2", "4"]},
        ],
    }
    assert [each.words for each in found][:3] == [
        "learning_rate 1e-05 to 0.0001",
        "lora_rank 4 to 8, logarithmic",
        "lora_targets attention, linear",
    ]
    # What is sent is read as what it was.
    for each in found:
        for value in each.values:
            text = value if isinstance(value, str) else json.dumps(value)
            assert getattr(parse(method="lora", **{each.name: text}), each.name) == value


@pytest.mark.parametrize(
    ("ranges", "values", "words"),
    [
        (["lora_rank"], {}, "lora_rank belongs to method=lora or pivotal, and this job's is full"),
        (["lerning_rate"], {}, "did you mean learning_rate"),
        (["learning_rate"], {"learning_rate": 1e-5}, "is set, and searched over as well"),
        (["prior_loss_weight"], {"class_prompt": None}, "trains on no class"),
        (["learning_rate"], {"optimizer": "prodigy"}, "finds the learning rate"),
        (["instance_prompt"], {}, "not a number or one of a few values"),
        (["models_path"], {}, "not a number or one of a few values"),
        (["logging_steps"], {}, "changes nothing of what is learned"),
        (["resolution"], {}, "resolution has no range of its own"),
        ({"learning_rate": (1e-4, 1e-5)}, {}, "set the least value first"),
        ({"learning_rate": (0.0, 1e-5)}, {}, "begins above 0"),
        ({"learning_rate": (float("nan"), 1.0)}, {}, "set the least value first"),
        ({"max_train_steps": (100.5, 200)}, {}, "takes whole numbers"),
        ({"prior": (1, 2)}, {}, "is not a range"),
        ({"learning_rate": (1e-5, 1e-4, "cubic")}, {}, "is not a range"),
        ({"prior": []}, {}, "set 1 to 30 values"),
        ({"seed": list(range(31))}, {}, "set 1 to 30 values"),
        ({"prior": ["images", "images"]}, {}, "each once"),
        ({}, {}, "ranges is empty"),
        ([f"a{number}" for number in range(31)], {}, "at most 30, and these are 31"),
    ],
    ids=str,
)
def test_what_can_not_be_searched_over_is_refused(ranges: Any, values: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_ranges(ranges, parse(**values))


def test_all_problems_of_ranges_are_told_at_once() -> None:
    with pytest.raises(UserError) as raised:
        read_ranges({"lora_rank": None, "nothing": None, "learning_rate": (1, 0)}, parse())
    assert len(raised.value.problems) == 3


def test_all_ends_are_tried_together_where_they_are_few() -> None:
    few = [Range(f"r{number}", (0, 1), "Integer") for number in range(8)]
    assert len([*settings(few)]) == 2**8
    many = [*few, Range("more", (0, 1, 2), "Categorical")]
    tried = [*settings(many)]
    assert len(tried) == 8 * 2 + 3
    for each in many:
        assert {values[each.name] for values in tried} == {*each.values}


# The search


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "loss"}, "objective=loss is of the training and says little of the pictures"),
        ({"objective": "beauty"}, "is not a measure of a job"),
        ({"strategy": "best"}, "set bayesian, random, hyperband, grid"),
        ({"max_trials": 751}, "set 1 to 750 with strategy=bayesian"),
        ({"max_trials": 0}, "set 1 to 750"),
        ({"max_trials": 10_001, "strategy": "random"}, "set 1 to 10,000"),
        ({"max_trials": 4, "strategy": "grid"}, "leave max_trials out"),
        ({"parallel": 101}, "set 1 to 100"),
        ({"strategy": "hyperband", "early_stopping": True}, "stops trials itself"),
        ({"warm_start": tuple("abcdef")}, "at most 5 tuning jobs"),
        ({"same_data": True}, "name some"),
        ({"target": float("inf")}, "set a value of the objective"),
        ({"patience": 2}, "set 3 or more"),
        ({"max_total_minutes": 1}, "set 2 to 262,800"),
        ({"search_seed": -1}, "set 0 to"),
    ],
    ids=str,
)
def test_what_the_service_would_refuse_is_refused(options: dict[str, Any], words: str) -> None:
    (problem,) = Search(**options).problems()
    assert words in problem


@pytest.mark.parametrize(
    ("ranges", "options", "values", "words"),
    [
        (["learning_rate"], {"strategy": "grid"}, {}, "give lists for learning_rate"),
        ({"seed": [*range(30)], "train_batch_size": [*range(1, 31)]}, {"strategy": "grid"}, {}, "900 combinations"),
        (["max_train_steps"], {"strategy": "hyperband"}, {}, "set max_train_steps to one value"),
        (["learning_rate"], {"objective": "prior"}, {"class_prompt": None}, "set class_prompt"),
        (
            ["learning_rate"],
            {"objective": "prompt"},
            {"fidelity_encoders": "dino=facebook/dinov2-base"},
            "nothing reads prompts",
        ),
        (
            ["learning_rate"],
            {"early_stopping": True},
            {"max_train_steps": 100, "fidelity_encoders": "judge", "fidelity_steps": 100},
            "trials of 100 steps can't be compared on the way; set 20",
        ),
    ],
    ids=str,
)
def test_what_the_search_can_not_do_with_a_job_is_refused(
    ranges: Any, options: dict[str, Any], values: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        plan_trials(parse(**values), ranges, Search(**options), pictures=5)


def test_trials_are_measured_alike() -> None:
    trials = plan_trials(parse(), ["learning_rate"], Search(), pictures=5, class_cache="s3://models/cache")
    h = trials.hyperparameters
    assert h.fidelity_encoders == "dino=facebook/dinov2-base clip=openai/clip-vit-large-patch14"
    assert (h.validation_prompt, h.seed, h.class_cache, h.fidelity_steps) == (
        "photo of zwx toy",
        0,
        "s3://models/cache",
        0,
    )
    assert any("fidelity_encoders" in note for note in trials.notes)
    own = {"validation_prompt": "a toy", "seed": 3, "class_cache": "s3://mine/cache", "fidelity_encoders": "judge"}
    mine = plan_trials(parse(**own), ["learning_rate"], Search(), pictures=5, class_cache="s3://models/cache")
    assert {name: getattr(mine.hyperparameters, name) for name in own} == own
    toys = plan_trials(parse(pretrained_model_name_or_path="toybox"), ["learning_rate"], Search(), pictures=5)
    assert toys.hyperparameters.fidelity_encoders == "judge"


def test_a_cache_is_for_class_images_that_are_drawn() -> None:
    for values in ({"class_prompt": None}, {"method": "lora", "prior": "output"}):
        trials = plan_trials(parse(**values), ["learning_rate"], Search(), pictures=5, class_cache="s3://m/cache")
        assert trials.hyperparameters.class_cache is None
    alone = {"fidelity_encoders": "dino=/opt/dino"}
    isolated = plan_trials(
        parse(**alone), ["learning_rate"], Search(), pictures=5, class_cache="s3://m/cache", isolated=True
    )
    assert isolated.hyperparameters.class_cache is None
    with pytest.raises(UserError, match="jobs without a network can't fetch what they are measured with"):
        plan_trials(parse(), ["learning_rate"], Search(), pictures=5, isolated=True)


@pytest.mark.parametrize("options", [{"early_stopping": True}, {"strategy": "hyperband"}], ids=str)
def test_trials_that_are_stopped_are_measured_on_the_way(options: dict[str, Any]) -> None:
    search = Search(**options)
    trials = plan_trials(parse(max_train_steps=400), ["learning_rate"], search, pictures=5)
    assert (trials.hyperparameters.fidelity_steps, trials.measures) == (80, 5)
    saving = plan_trials(parse(max_train_steps=400, save_steps=50), ["learning_rate"], search, pictures=5)
    assert (saving.hyperparameters.fidelity_steps, saving.measures) == (50, 8)
    if search.early_stopping:  # as often as the shortest needs it
        trials = plan_trials(parse(), {"max_train_steps": (100, 1000)}, search, pictures=5)
        assert (trials.hyperparameters.fidelity_steps, trials.measures) == (20, 50)


def test_settings_that_the_rules_refuse_are_found_before() -> None:
    ranges = {"lora_min_rank": (8, 32), "lora_rank": (4, 64)}
    trials = plan_trials(parse(method="lora"), {"lora_rank": (4, 64)}, Search(), pictures=5)
    check_trials(trials)
    with pytest.raises(UserError, match="lora_min_rank=8 lora_rank=4: lora_min_rank=8 is more than lora_rank=4"):
        check_trials(plan_trials(parse(method="lora"), ranges, Search(), pictures=5))


def test_lengths_may_be_a_list_in_words() -> None:
    """As the command line has them."""
    ranges = parse_ranges(["max_train_steps=100,400", "learning_rate=1e-5..1e-4:log"])
    assert ranges == {"max_train_steps": ["100", "400"], "learning_rate": (1e-5, 1e-4, "log")}
    trials = plan_trials(parse(), ranges, Search(early_stopping=True), pictures=5)
    assert (trials.hyperparameters.fidelity_steps, trials.measures) == (20, 20)
    check_trials(trials)
    odd = plan_trials(parse(), {"max_train_steps": [100, "many"]}, Search(), pictures=5)
    with pytest.raises(UserError, match="max_train_steps=many: "):
        check_trials(odd)
    with pytest.raises(UserError) as raised:
        parse_ranges(["learning_rate=a..b", "lora_rank", "lora_rank=4..8"])
    assert len(raised.value.problems) == 2


def test_no_more_trials_run_at_a_time_than_the_quota_allows() -> None:
    resources = Resources.parse({**RESOURCES, "instance_count": 2})
    job: Any = SimpleNamespace(estimate=SimpleNamespace(instance=A10G), resources=resources)
    for room, expected in ((None, 4), (8, 4), (5, 2), (1, 1)):
        account: Any = SimpleNamespace(room_for=lambda name, spot, room=room: room)
        parallel, lines = _within_quota(job, Search(parallel=4), account)
        assert parallel == expected
        assert bool(lines) == (expected < 4)


def test_the_estimate_is_of_all_trials() -> None:
    search = Search(max_trials=10, parallel=4)
    trials = plan_trials(parse(method="lora"), {"max_train_steps": (100, 1000)}, search, pictures=5)
    found = estimate_trials(trials, search, A10G)
    assert found.least.minutes
    assert found.most.minutes
    assert found.least.whole_minutes
    assert found.most.whole_minutes
    assert found.most.usd
    assert found.least.minutes < found.most.minutes
    text = "\n".join(found.lines())
    assert f"about {3 * found.least.whole_minutes:.0f} to {3 * found.most.whole_minutes:.0f} minutes in all" in text
    assert f"${10 * found.most.usd:.2f} in all" in text
    limit = int(found.least.minutes) + 1
    with pytest.raises(UserError, match=f"max_minutes={limit}: a trial with max_train_steps=1000 is expected to take"):
        estimate_trials(trials, search, A10G, max_minutes=limit)
    odd = plan_trials(parse(), {"mixed_precision": ["fp16", "bf16"]}, search, pictures=5)
    with pytest.raises(UserError, match=r"^mixed_precision=bf16: .* T4"):
        estimate_trials(odd, search, find_instance("ml.g4dn.xlarge"))


# The request


SEARCHES = st.builds(
    Search,
    objective=st.sampled_from([*OBJECTIVES]),
    strategy=st.sampled_from(["bayesian", "Random"]),
    max_trials=st.none() | st.integers(1, 750),
    parallel=st.integers(1, 100),
    early_stopping=st.booleans(),
    warm_start=st.lists(st.sampled_from("abcde"), unique=True).map(tuple),
    target=st.none() | st.floats(-1, 1),
    patience=st.none() | st.integers(3, 9),
    until_convergence=st.booleans(),
    max_total_minutes=st.none() | st.integers(2, 262_800),
    search_seed=st.none() | st.integers(0, 2**31 - 1),
)


@given(
    SEARCHES, st.sets(st.sampled_from(["learning_rate", "lora_rank", "max_train_steps", "lora_targets"]), min_size=1)
)
def test_every_request_is_one_that_the_service_takes(search: Search, searched: set[str]) -> None:
    request = request_of(dict.fromkeys(sorted(searched)), search)
    assert refusals("CreateHyperParameterTuningJob", request) == []
    json.dumps(request)


def test_the_request_says_it_all() -> None:
    search = Search("prior", "bayesian", 20, 4, True, ("before",), True, 0.1, 5, True, 600, 7)
    request = request_of(
        ["learning_rate"],
        search,
        {"method": "lora", "max_train_steps": 400},
        spot=True,
        max_minutes=60,
        kms="1234abcd",
        tags={"team": "toys"},
        keep_alive=0,
    )
    config, definition = request["HyperParameterTuningJobConfig"], request["TrainingJobDefinition"]
    assert config["HyperParameterTuningJobObjective"] == {"Type": "Minimize", "MetricName": "prior"}
    assert config["ResourceLimits"] == {
        "MaxNumberOfTrainingJobs": 20,
        "MaxParallelTrainingJobs": 4,
        "MaxRuntimeInSeconds": 36_000,
    }
    assert config["TuningJobCompletionCriteria"] == {
        "TargetObjectiveMetricValue": 0.1,
        "BestObjectiveNotImproving": {"MaxNumberOfTrainingJobsNotImproving": 5},
        "ConvergenceDetected": {"CompleteOnConvergence": "Enabled"},
    }
    assert (config["TrainingJobEarlyStoppingType"], config["RandomSeed"]) == ("Auto", 7)
    assert request["WarmStartConfig"]["WarmStartType"] == "IdenticalDataAndAlgorithm"
    assert "learning_rate" not in definition["StaticHyperParameters"]
    assert definition["StaticHyperParameters"]["fidelity_steps"] == "80"
    assert "prior" in [each["Name"] for each in definition["AlgorithmSpecification"]["MetricDefinitions"]]
    assert definition["EnableManagedSpotTraining"]
    assert definition["CheckpointConfig"] == {"S3Uri": "s3://models/dreambooth-sm/checkpoints/zwx"}
    assert definition["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 7200}
    assert request["Tags"] == [{"Key": "team", "Value": "toys"}, {"Key": TAG, "Value": "zwx"}]


def test_checkpoints_are_kept_for_trials_that_may_start_again() -> None:
    for resources, kept in (({}, False), ({"spot": True}, True), ({"max_retry_attempts": 2}, True)):
        definition = request_of(["learning_rate"], Search(), **resources)["TrainingJobDefinition"]
        assert ("CheckpointConfig" in definition) == kept


def test_hyperband_knows_how_often_trials_are_measured() -> None:
    request = request_of(["learning_rate"], Search(strategy="hyperband"), {"max_train_steps": 400})
    config = request["HyperParameterTuningJobConfig"]
    assert refusals("CreateHyperParameterTuningJob", request) == []
    # After 80, 160, 240, 320 and 400 steps; and no trial is stopped at its end.
    assert config["StrategyConfig"] == {"HyperbandStrategyConfig": {"MinResource": 1, "MaxResource": 6}}
    assert config["TrainingJobEarlyStoppingType"] == "Off"


def test_a_grid_has_a_trial_for_each_combination() -> None:
    ranges = {"lora_rank": [4, 8, 16], "lora_targets": ["attention", "linear"]}
    request = request_of(ranges, Search(strategy="grid", parallel=50))
    limits = request["HyperParameterTuningJobConfig"]["ResourceLimits"]
    assert limits == {"MaxNumberOfTrainingJobs": 6, "MaxParallelTrainingJobs": 6}


@pytest.mark.parametrize("name", ["a" * 33, "-a", "a-", "a b", "", "ä"])
def test_names_are_short(name: str) -> None:
    assert "is not the name of a tuning job" in (refused_name(name) or "")
    assert refused_name("a" * 32) is None


# What has become of it


def summary(number: int, status: str, value: float | None, minutes: float = 1.0) -> dict[str, Any]:
    started = datetime(2026, 11, 30, 10, number, tzinfo=UTC)
    final = {"FinalHyperParameterTuningJobObjectiveMetric": {"MetricName": "score", "Value": value}}
    return {
        "TrainingJobName": f"toys-{number:03d}-0a1b2c3d",
        "CreationTime": started,
        "TrainingStartTime": started,
        **({"TrainingEndTime": started.replace(second=int(60 * minutes) % 60)} if status != "InProgress" else {}),
        "TrainingJobStatus": status,
        "TunedHyperParameters": {"learning_rate": "0.00012345678", "lora_rank": "8"},
        **({} if value is None else final),
    }


def test_trials_are_ranked_by_the_goal_and_stopped_ones_have_no_model() -> None:
    found = [
        summary(3, "Completed", 0.7, 0.5),
        summary(1, "Completed", 0.5, 0.5),
        summary(2, "Stopped", 0.9, 0.5),
        summary(4, "Failed", None, 0.5),
        summary(5, "InProgress", 0.2),
    ]
    now = datetime(2026, 11, 30, 10, 7, tzinfo=UTC).timestamp()
    trials = read_trials(found, 1.2, now)
    assert [trial.number for trial in trials] == [1, 2, 3, 4, 5]
    assert [trial.dollars for trial in trials] == pytest.approx([0.01] * 4 + [0.04])
    status = TuningStatus("InProgress", "score", True, 12, trials)
    assert [trial.number for trial in status.ranked()] == [3, 1]
    assert status.dollars == pytest.approx(0.08)
    assert status.line() == (
        "2 done, 1 stopped, 1 failed, 1 running, 7 planned; best score 0.7 with learning_rate=0.0001235 lora_rank=8"
    )
    least = TuningStatus("Completed", "prior", False, 12, trials)
    assert least.best
    assert least.best.number == 1
    for order in itertools.permutations(found, 5):
        assert read_trials(order, 1.2, now) == trials
