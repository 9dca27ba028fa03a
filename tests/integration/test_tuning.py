"""Tuning jobs on the embedded SageMaker: searches of a program of a few lines, and one of real trials."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from PIL import Image

import launcher
from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from dreambooth_sm.report import measure_pattern
from dreambooth_sm.storage import S3Uri, list_objects
from launcher.aws.iam import notebook_policy
from launcher.cli import main
from launcher.local.services import EmbeddedServices, embedded_services
from launcher.tuning.tuning import Tuning
from tests.helpers.api import refusals
from tests.helpers.services import Workplace, eventually

# Is measured twice: the better, the nearer its learning rate is to 1e-3. Takes its time where it is told to, but not
# where it finds a checkpoint of its own.
PROGRAM = """
import json, math, os, pathlib, signal, sys, time
base = pathlib.Path(os.environ["SAGEMAKER_BASE_DIR"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
values = json.loads((base / "input/config/hyperparameters.json").read_text())
assert values["_tuning_objective_metric"] == "score" and values["static"] == "yes"
if values.get("word") == "bad":
    (base / "output").mkdir(exist_ok=True)
    (base / "output/failure").write_text("a bad word")
    sys.exit(1)
score = 1 - abs(math.log10(float(values.get("learning_rate", "1e-3"))) + 3)
own = base / "checkpoints" / os.environ["TRAINING_JOB_NAME"]
takes_its_time = not own.exists() and (score < 0.5 or "ALL" in os.environ)
own.mkdir(parents=True, exist_ok=True)
for step in range(3):
    print(f"candidate={step} score={score if step else 9}", flush=True)
    (own / str(step)).write_text("x")
    time.sleep(float(os.environ.get("PAUSE", "0")) if takes_its_time else 0)
(base / "model" / "model.txt").write_text(str(values))
"""
RATES = {"Name": "learning_rate", "MinValue": "1e-5", "MaxValue": "1e-1", "ScalingType": "Logarithmic"}
WORDS = {"Name": "word", "Values": ["good", "bad"]}


# Of a job that is trained and measured for real; without a class, which would be measured by 16 more pictures.
SMALL: dict[str, Any] = {
    "instance_prompt": "photo of zwx toy",
    "method": "lora",
    "resolution": 64,
    "center_crop": True,
    "max_train_steps": 2,
    "fidelity_encoders": "judge",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    program = tmp_path_factory.mktemp("program") / "train.py"
    program.write_text(PROGRAM)
    with embedded_services(entrypoint=program, grace=5) as services:
        yield Workplace(services)


def request_of(
    workplace: Workplace, name: str, ranges: dict[str, Any], environment: dict[str, str] | None = None, **config: Any
) -> dict[str, Any]:
    training = workplace.request()
    training["AlgorithmSpecification"]["MetricDefinitions"] = [{"Name": "score", "Regex": measure_pattern("score")}]
    kept = ("AlgorithmSpecification", "RoleArn", "OutputDataConfig", "StoppingCondition")
    return {
        "HyperParameterTuningJobName": name,
        "HyperParameterTuningJobConfig": {
            "Strategy": "Random",
            "RandomSeed": 3,
            "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "score"},
            "ResourceLimits": {"MaxNumberOfTrainingJobs": 4, "MaxParallelTrainingJobs": 2},
            "ParameterRanges": ranges,
            **config,
        },
        "TrainingJobDefinition": {
            **{key: training[key] for key in kept},
            "HyperParameterTuningResourceConfig": training["ResourceConfig"],
            "StaticHyperParameters": {"static": "yes"},
            "CheckpointConfig": {"S3Uri": str(workplace.bucket / f"checkpoints/{name}")},
            "Environment": environment or {},
        },
        "Tags": [{"Key": "team", "Value": "toys"}],
    }


def start(workplace: Workplace, *arguments: Any, **more: Any) -> Tuning:
    request = request_of(workplace, *arguments, **more)
    assert refusals("CreateHyperParameterTuningJob", request) == []
    workplace.clients("sagemaker").create_hyper_parameter_tuning_job(**request)
    return Tuning(request["HyperParameterTuningJobName"], workplace.clients)


def quiet(line: str) -> None:
    """A log that nobody reads."""


def test_trials_are_training_jobs_and_the_best_is_found(workplace: Workplace) -> None:
    tuning = start(workplace, "random", {"ContinuousParameterRanges": [RATES]})
    lines: list[str] = []
    assert tuning.wait(lines.append) is tuning
    status = tuning.status()
    assert status.status == "Completed"
    assert [trial.number for trial in status.trials] == [1, 2, 3, 4]
    assert len({trial.values["learning_rate"] for trial in status.trials}) == 4
    assert all(1e-5 <= float(trial.values["learning_rate"]) <= 1e-1 for trial in status.trials)
    # The score of each, on its own; and not that of the base model, 9.
    for trial in status.trials:
        assert trial.objective is not None
        description = tuning.job(trial).describe()
        assert description["TuningJobArn"] == tuning.describe()["HyperParameterTuningJobArn"]
        assert description["HyperParameters"]["learning_rate"] == trial.values["learning_rate"]
    best = max(status.trials, key=lambda trial: trial.objective or 0.0)
    description = tuning.describe()
    assert tuning.best == best
    assert description["BestTrainingJob"]["TrainingJobName"] == tuning.best_job.name == best.name
    assert description["TrainingJobStatusCounters"]["Completed"] == 4
    assert description["ObjectiveStatusCounters"] == {"Succeeded": 4, "Pending": 0, "Failed": 0}
    tags = workplace.clients("sagemaker").list_tags(ResourceArn=tuning.best_job.describe()["TrainingJobArn"])["Tags"]
    assert tags == [{"Key": "team", "Value": "toys"}]
    assert sum(line.startswith("trial ") for line in lines) == 4
    # Each has a model and checkpoints of its own.
    models = {name.split("/")[0] for name in workplace.keys("output")}
    assert models == {trial.name for trial in status.trials}
    assert {name.split("/")[0] for name in workplace.keys("checkpoints/random")} == models
    table = tuning.table()
    assert list(table["trial"]) == [trial.number for trial in status.ranked()]
    assert table["learning_rate"][0] == float(best.values["learning_rate"])
    assert best.name in tuning.table().to_string()
    assert f">{best.number}</td>" in tuning._repr_html_()


def test_a_search_with_a_model_comes_closer_than_one_at_random(workplace: Workplace) -> None:
    ranges = {"ContinuousParameterRanges": [RATES]}
    limits = {"MaxNumberOfTrainingJobs": 16, "MaxParallelTrainingJobs": 1}
    tuning = start(workplace, "bayesian", ranges, Strategy="Bayesian", ResourceLimits=limits).wait(quiet)
    scores = [trial.objective or 0.0 for trial in tuning.trials]
    # Rates at random come to 0: their logarithms are between -5 and -1, evenly.
    assert sum(scores[8:]) / 8 > 0.1
    assert max(scores) > 0.85


def test_earlier_trials_count_and_nothing_is_drawn_twice(workplace: Workplace) -> None:
    ranges = {"ContinuousParameterRanges": [RATES]}
    limits = {"MaxNumberOfTrainingJobs": 8, "MaxParallelTrainingJobs": 1}
    start(workplace, "parent", ranges, Strategy="Bayesian", ResourceLimits=limits).wait(quiet)
    request = request_of(workplace, "child", ranges, Strategy="Bayesian", ResourceLimits=limits)
    request["WarmStartConfig"] = {
        "ParentHyperParameterTuningJobs": [{"HyperParameterTuningJobName": "parent"}],
        "WarmStartType": "TransferLearning",
    }
    sagemaker = workplace.clients("sagemaker")
    sagemaker.create_hyper_parameter_tuning_job(**request)
    child, parent = (Tuning(name, workplace.clients).wait(quiet) for name in ("child", "parent"))
    mean = {each.name: sum(trial.objective or 0.0 for trial in each.trials) / 8 for each in (child, parent)}
    assert mean["child"] > mean["parent"]
    with pytest.raises(ClientError, match="already exists"):
        sagemaker.create_hyper_parameter_tuning_job(**request)


def test_a_grid_tries_all_and_a_failed_trial_ends_nothing(workplace: Workplace) -> None:
    ranges = {"CategoricalParameterRanges": [WORDS, {"Name": "learning_rate", "Values": ["1e-3", "1e-2"]}]}
    tuning = start(workplace, "grid", ranges, Strategy="Grid", ResourceLimits={"MaxParallelTrainingJobs": 2})
    lines: list[str] = []
    tuning.wait(lines.append)
    tried = {(trial.values["word"], trial.values["learning_rate"]) for trial in tuning.trials}
    assert tried == {(word, rate) for word in ("good", "bad") for rate in ("1e-3", "1e-2")}
    assert {trial.status for trial in tuning.trials if trial.values["word"] == "bad"} == {"Failed"}
    assert tuning.best.values == {"word": "good", "learning_rate": "1e-3"}
    assert any(line.endswith("a bad word") for line in lines)


def test_where_all_trials_fail_the_search_fails_with_their_reason(workplace: Workplace) -> None:
    tuning = start(workplace, "failing", {"CategoricalParameterRanges": [{"Name": "word", "Values": ["bad"]}]})
    with pytest.raises(launcher.JobFailed, match="No training job has said its objective") as raised:
        tuning.wait(quiet)
    assert "a bad word" in str(raised.value)
    with pytest.raises(UserError, match="no trial has left a model with its score"):
        _ = tuning.best_job
    with pytest.raises(UserError, match="has started no trial 9; it has started 4"):
        tuning.job(9)


@pytest.mark.parametrize("kind", ["early", "hyperband"])
def test_trials_that_fall_behind_are_stopped(workplace: Workplace, kind: str) -> None:
    """Those take their time between two measures."""
    ranges = {"CategoricalParameterRanges": [{"Name": "learning_rate", "Values": ["1e-3", "9e-4", "8e-4", "1e-5"]}]}
    pause = {"PAUSE": "5" if kind == "early" else "0.5"}
    more: dict[str, Any] = {
        "Strategy": "Grid",
        "TrainingJobEarlyStoppingType": "Auto",
        "ResourceLimits": {"MaxNumberOfTrainingJobs": 4, "MaxParallelTrainingJobs": 1},
        "RandomSeed": 1,
    }
    if kind == "hyperband":
        hyperband = {"HyperbandStrategyConfig": {"MinResource": 1, "MaxResource": 4}}
        more |= {"Strategy": "Hyperband", "StrategyConfig": hyperband, "TrainingJobEarlyStoppingType": "Off"}
        more["ResourceLimits"] = {"MaxNumberOfTrainingJobs": 10, "MaxParallelTrainingJobs": 1}
    tuning = start(workplace, kind, ranges, pause, **more).wait(quiet)
    slow = [trial for trial in tuning.trials if trial.values["learning_rate"] == "1e-5"]
    stopped = [trial for trial in tuning.trials if trial.status == "Stopped"]
    assert stopped
    assert {trial.name for trial in stopped} <= {trial.name for trial in slow}
    assert tuning.best.values["learning_rate"] == "1e-3"


@pytest.mark.parametrize(
    ("criteria", "trials"),
    [
        ({"TargetObjectiveMetricValue": -5.0}, 1),
        ({"BestObjectiveNotImproving": {"MaxNumberOfTrainingJobsNotImproving": 3}}, 4),
    ],
    ids=["target", "patience"],
)
def test_a_search_that_is_good_enough_ends(workplace: Workplace, criteria: dict[str, Any], trials: int) -> None:
    ranges = {"CategoricalParameterRanges": [{"Name": "learning_rate", "Values": ["1e-3"]}]}
    limits = {"MaxNumberOfTrainingJobs": 20, "MaxParallelTrainingJobs": 1}
    more = {"TuningJobCompletionCriteria": criteria, "ResourceLimits": limits}
    tuning = start(workplace, f"enough-{trials}", ranges, **more).wait(quiet)
    assert tuning.status().counts() == {"done": trials}


def test_a_search_is_stopped_with_its_trials(workplace: Workplace) -> None:
    tuning = start(workplace, "stopped", {"ContinuousParameterRanges": [RATES]}, {"PAUSE": "60", "ALL": "1"})
    eventually(lambda: len([trial for trial in tuning.trials if trial.objective is not None or trial.seconds]) == 2)
    assert tuning.status().counts() == {"done": 0, "running": 2, "planned": 2}
    tuning.stop()
    with pytest.raises(launcher.JobStopped, match="the tuning job was stopped"):
        tuning.wait(quiet)
    assert tuning.status().counts() == {"done": 0, "stopped": 2}
    tuning.stop()  # which has an end already
    with pytest.raises(ClientError, match="is in status Stopped"):
        workplace.clients("sagemaker").stop_hyper_parameter_tuning_job(HyperParameterTuningJobName="stopped")


def test_an_interrupted_trial_finds_its_own_checkpoint(workplace: Workplace) -> None:
    ranges = {"CategoricalParameterRanges": [{"Name": "learning_rate", "Values": ["1e-3"]}]}
    limits = {"MaxNumberOfTrainingJobs": 2, "MaxParallelTrainingJobs": 2}
    request = request_of(workplace, "spot", ranges, {"PAUSE": "60", "ALL": "1"}, ResourceLimits=limits)
    request["TrainingJobDefinition"] |= {
        "EnableManagedSpotTraining": True,
        "StoppingCondition": {"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 1200},
    }
    workplace.clients("sagemaker").create_hyper_parameter_tuning_job(**request)
    tuning = Tuning("spot", workplace.clients)
    eventually(lambda: len(workplace.keys("checkpoints/spot")) == 2)
    for trial in tuning.trials:
        workplace.services.sagemaker.interrupt(trial.name)
    assert tuning.wait(quiet).status().counts() == {"done": 2}
    for trial in tuning.trials:
        states = [entry["Status"] for entry in tuning.job(trial).describe()["SecondaryStatusTransitions"]]
        assert "Interrupted" in states


def test_lists_have_pages_and_an_order(workplace: Workplace) -> None:
    sagemaker = workplace.clients("sagemaker")
    start(workplace, "listed", {"ContinuousParameterRanges": [RATES]}).wait(quiet)
    first = sagemaker.list_training_jobs_for_hyper_parameter_tuning_job(
        HyperParameterTuningJobName="listed",
        MaxResults=3,
        SortBy="FinalObjectiveMetricValue",
        SortOrder="Descending",
    )
    rest = sagemaker.list_training_jobs_for_hyper_parameter_tuning_job(
        HyperParameterTuningJobName="listed",
        MaxResults=3,
        SortBy="FinalObjectiveMetricValue",
        SortOrder="Descending",
        NextToken=first["NextToken"],
    )
    found = [*first["TrainingJobSummaries"], *rest["TrainingJobSummaries"]]
    values = [each["FinalHyperParameterTuningJobObjectiveMetric"]["Value"] for each in found]
    assert values == sorted(values, reverse=True)
    assert len(values) == 4
    assert "NextToken" not in rest
    (listed,) = sagemaker.list_hyper_parameter_tuning_jobs(NameContains="liste")["HyperParameterTuningJobSummaries"]
    assert (listed["HyperParameterTuningJobName"], listed["HyperParameterTuningJobStatus"]) == ("listed", "Completed")
    with pytest.raises(UserError, match="tuning job 'nothing' was not found in us-east-1"):
        launcher.attach_tuning("nothing", workplace.clients)
    assert launcher.attach_tuning("listed", workplace.clients).best.status == "Completed"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"Strategy": "Grid"}, "categorical ranges alone"),
        ({"HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "loss"}}, "not one of MetricDefinit"),
        ({"Strategy": "Hyperband", "TrainingJobEarlyStoppingType": "Auto"}, "has to be Off"),
        ({"ParameterRanges": {}}, "has at least one"),
        ({"ParameterRanges": {"AutoParameters": [{"Name": "a", "ValueHint": "1"}]}}, "without Autotune"),
        (
            {"TuningJobCompletionCriteria": {"ConvergenceDetected": {"CompleteOnConvergence": "Enabled"}}},
            "leave it out",
        ),
        ({"ParameterRanges": {"ContinuousParameterRanges": [{**RATES, "Name": "static"}]}}, "static are tuned as well"),
        ({"ParameterRanges": {"ContinuousParameterRanges": [{**RATES, "MinValue": "2"}]}}, "learning_rate"),
    ],
    ids=str,
)
def test_what_can_not_be_searched_is_refused(workplace: Workplace, change: dict[str, Any], words: str) -> None:
    request = request_of(workplace, "refused", {"ContinuousParameterRanges": [RATES]}, **change)
    with pytest.raises(ClientError, match=words):
        workplace.clients("sagemaker").create_hyper_parameter_tuning_job(**request)


# The launcher's own way


@pytest.mark.slow
def test_from_pictures_to_the_best_model(
    services: EmbeddedServices, pictures: Path, tiny_base: Path, tmp_path: Path
) -> None:
    bucket = S3Uri("tuned-toys")
    services.client().create_bucket(Bucket=bucket.bucket)
    services.client().put_object(Bucket=bucket.bucket, Key="mine/manifest.json", Body=b"the user's own")
    asked: set[str] = set()
    session = boto3.Session()
    session.events.register("before-call.sagemaker", lambda model, **_: asked.add(model.name))
    lines: list[str] = []
    tuning = launcher.tune(
        pictures,
        ranges={"learning_rate": (1e-4, 1e-2, "log"), "lora_rank": [2, 4]},
        max_trials=2,
        parallel=1,
        search_seed=1,
        early_stopping=True,
        base_model=tiny_base,
        instance_type="ml.g5.xlarge",
        output="s3://tuned-toys/mine",
        bucket=bucket.bucket,
        spot=True,
        max_minutes=30,
        tags={"team": "toys"},
        log=lines.append,
        session=session,
        **SMALL,
    )
    said = "\n".join(lines)
    assert "trials: 2 trials, 1 at a time, those that fall behind stopped; strategy=bayesian" in said
    assert "search: learning_rate 0.0001 to 0.01, logarithmic" in said
    assert "fidelity_steps: 1, for all trials" in said
    assert "cost: about $" in said
    allowed = {action for statement in notebook_policy("b")["Statement"] for action in statement["Action"]}
    assert {f"sagemaker:{name}" for name in asked} <= allowed
    first, second = tuning.trials
    # A measure after each step but the last, and one at the end.
    job = tuning.job(first)
    measures = [match for line in job.lines() if (match := re.search(measure_pattern("score"), line))]
    assert len(measures) == 2
    assert first.objective == float(measures[-1][1])
    tags = services.clients()("sagemaker").list_tags(ResourceArn=job.describe()["TrainingJobArn"])["Tags"]
    assert {tag["Key"]: tag["Value"] for tag in tags} == {"team": "toys", "dreambooth-sm:tuning": tuning.name}
    # Each has its own place, and nothing of the user's was touched.
    assert tuning.best_job.model_uri == f"s3://tuned-toys/mine/{tuning.best.name}/output/model"
    places = {name.split("/")[0] for name in list_objects(bucket / "mine")}
    assert places == {"manifest.json", first.name, second.name}
    assert (
        services.client().get_object(Bucket=bucket.bucket, Key="mine/manifest.json")["Body"].read() == b"the user's own"
    )
    kept = list_objects(bucket / f"dreambooth-sm/checkpoints/{tuning.name}")
    assert not [name for name in kept if "step-" in name and "/samples/" not in name]
    grid = tuning.samples()
    assert [trial.number for trial, _ in grid] == [trial.number for trial in tuning.status().ranked()]
    assert all(len(shown) == 1 for _, shown in grid)  # after training, and not of the base model
    assert Image.open(io.BytesIO(grid._repr_png_() or b"")).height > 160 * len(grid)
    assert launcher.attach_tuning(tuning.name).best == tuning.best
    # What is found is what trains again.
    found = launcher.tuning_request(
        pictures,
        ranges=["learning_rate"],
        warm_start=[tuning.name],
        base_model=tiny_base,
        bucket=bucket.bucket,
        **SMALL,
    )
    assert refusals("CreateHyperParameterTuningJob", found) == []
    with pytest.raises(UserError, match=f"warm_start: {tuning.name} searched for the best score, and not subject"):
        launcher.check_tuning(
            pictures, objective="subject", warm_start=[tuning.name], instance_type="ml.g5.xlarge", **SMALL
        )


@pytest.mark.slow
def test_the_command_line_searches_on_this_machine(
    pictures: Path, tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [word for name, value in SMALL.items() for word in (f"--{name}", *str(value).split())]
    options += ["--base_model", str(tiny_base), "--ranges", "learning_rate=1e-4..1e-2:log", "lora_targets=linear"]
    assert main(["tune", str(pictures), *options, "--max_trials", "3", "--dry_run"]) == EXIT_OK
    assert "trials: 3 trials, 2 at a time" in capfd.readouterr().out
    grid = tmp_path / "grid.png"
    here = ["--max_trials", "1", "--directory", str(tmp_path / "trials"), "--grid", str(grid), "--name", "here"]
    assert main(["tune", str(pictures), *options, *here]) == EXIT_OK
    said = capfd.readouterr().out
    (tree,) = (tmp_path / "trials").iterdir()
    assert f"model: {tree / 'model'}" in said
    assert re.search(r"^best: trial 1: --learning_rate \S+ --lora_targets linear$", said, re.MULTILINE)
    assert grid.stat().st_size
    assert (tree / "model" / "report.html").is_file()
    assert main(["attach_tuning", "here", "--no_wait"]) == EXIT_OK
    assert "1 done; best score" in capfd.readouterr().out
    wrong = ["--ranges", "lora_rank=a..b", "lora_rank", "--strategy", "best"]
    assert main(["tune", str(pictures), *options[:-3], *wrong]) == EXIT_BAD_INPUT
    assert "set two numbers" in capfd.readouterr().err


def test_everything_that_is_wrong_is_told_before_anything_starts(
    services: EmbeddedServices, pictures: Path, tmp_path: Path
) -> None:
    started = len(services.sagemaker.jobs)
    with pytest.raises(UserError) as raised:
        launcher.tune(
            tmp_path / "nothing",
            ranges={"lora_rank": None, "learning_rate": (1, 0)},
            objective="loss",
            max_trials=1000,
            name="a" * 33,
            checkpoint="s3://other/place",
            manual_upload_model_path="s3://other/place",
            instance_type="ml.g5.xlarge",
            instance_prompt="photo of zwx toy",
        )
    text = "\n".join(raised.value.problems)
    for words in (
        "is not a folder",
        "lora_rank belongs to method=lora or pivotal",
        "learning_rate: 1 to 0 is not a range",
        "objective=loss",
        "max_trials=1000",
        "is not the name of a tuning job",
        "checkpoint: each trial has a place of its own",
        "manual_upload_model_path: all trials would write there",
    ):
        assert words in text
    assert len({*raised.value.problems}) == len(raised.value.problems)
    with pytest.raises(UserError, match="directory is for a search on this machine"):
        launcher.tune(pictures, directory=tmp_path, instance_type="ml.g5.xlarge", **SMALL)
    with pytest.raises(UserError, match="report_to: automatic tuning does not take TensorBoard's events"):
        launcher.tune(pictures, instance_type="ml.g5.xlarge", report_to="tensorboard", **SMALL)
    assert len(services.sagemaker.jobs) == started
