"""What the registry is told of a model: SageMaker's own limits, and the report's own facts."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from dreambooth_sm.errors import UserError
from launcher.registry.requests import package_requests
from tests.helpers.api import refusals

MODEL, IMAGE = "s3://models/toys/zwx", "123456789012.dkr.ecr.us-west-2.amazonaws.com/dreambooth-sm:1"
JOB = "arn:aws:sagemaker:us-west-2:123456789012:training-job/zwx"


def report(**more: Any) -> dict[str, Any]:
    samples = [(0, "a.png"), (0, "b.png"), (20, "c.png"), (20, "d.png"), (10, "e.png")]
    return {
        "model_name": "zwx",
        "finished": "2026-11-28T10:00:00",
        "base_model": "owner/base",
        "base_model_licence": None,
        "subjects": [{"instance_prompt": "photo of zwx toy"}, {"instance_prompt": "photo of abc cat 🐈"}],
        "hyperparameters": {"method": "lora", "learning_rate": 1e-4, "seed": None, "instance_prompt": "p" * 400},
        "attempts": [{"last_step": 10}, {"last_step": 20}],
        "phases_seconds": {"train": 12.5},
        "peak_vram_gb": 7.5,
        "steps": [{"step": 10, "loss": 0.5}, {"step": 20, "loss": 0.25, "lr": 1e-4, "steps_per_s": 3.0}],
        "candidates": [{"candidate": 0, "score": 0.0}, {"candidate": 20, "score": 0.5, "subject": 0.75}],
        "verdicts": ["good: it has the hat"],
        "samples": [
            {"step": step, "prompt": f"prompt {n % 2}", "seed": 1, "file": f"samples/{name}"}
            for n, (step, name) in enumerate(samples)
        ],
        "versions": {"dreambooth-sm": "0.1.0", "image": "0.1.0-g1", "cuda": None},
        **more,
    }


def requests(facts: dict[str, Any] | None = None, group: str = "toys", **more: Any) -> dict[str, Any]:
    options = {"model": MODEL, "image_uri": IMAGE, "job_arn": JOB, "datasets": ["s3://pictures/zwx"], **more}
    return package_requests(group, json.dumps(facts or report()).encode(), **options)


def card_of(made: dict[str, Any]) -> dict[str, Any]:
    card: dict[str, Any] = json.loads(made["create_model_package"]["ModelCard"]["ModelCardContent"])
    return card


def test_sagemaker_takes_them_and_they_say_what_the_report_says() -> None:
    made = requests(tags={"team": "toys"}, base_model="s3://models/base")
    assert refusals("CreateModelPackageGroup", made["create_model_package_group"]) == []
    package = made["create_model_package"]
    assert refusals("CreateModelPackage", package) == []
    assert "Tags" not in package, "SageMaker takes none for a version of a group"
    assert made["create_model_package_group"]["Tags"] == [{"Key": "team", "Value": "toys"}]
    (container,) = package["InferenceSpecification"]["Containers"]
    source = {"S3Uri": f"{MODEL}/", "S3DataType": "S3Prefix", "CompressionType": "None"}
    assert container["ModelDataSource"] == {"S3DataSource": source}
    assert container["AdditionalModelDataSources"][0]["S3DataSource"]["S3Uri"] == "s3://models/base/"
    digest = hashlib.sha256(json.dumps(report()).encode()).hexdigest()
    assert package["ModelMetrics"]["ModelQuality"]["Statistics"]["ContentDigest"] == f"sha256:{digest}"
    said = package["CustomerMetadataProperties"]
    assert (said["score"], said["steps"], said["method"], said["base_model"]) == ("0.5", "20", "lora", "owner/base")
    assert said["instance_prompt"].split() == ["photo", "of", "zwx", "toy", "photo", "of", "abc", "cat"]
    card = card_of(made)
    details = card["training_details"]["training_job_details"]
    assert details["training_arn"] == JOB
    assert {"name": "loss", "value": 0.25} in details["training_metrics"]
    assert {"name": "learning_rate", "value": "0.0001"} in details["hyper_parameters"]
    assert "seed" not in {each["name"] for each in details["hyper_parameters"]}
    (job,) = card["evaluation_details"]
    assert [group["name"] for group in job["metric_groups"]] == ["before training", "after step 20"]
    assert {"name": "subject", "type": "number", "value": 0.75} in job["metric_groups"][1]["metric_data"]
    shown = card["additional_information"]["custom_details"]
    assert shown["picture 2, before training"] == f"{MODEL}/samples/b.png"
    assert shown["picture 1, after training"] == f"{MODEL}/samples/c.png"
    assert shown["report"] == f"{MODEL}/report.html"


def test_a_report_without_measures_and_pictures_is_enough() -> None:
    made = requests(report(candidates=[], samples=[], steps=[], verdicts=[]))
    assert refusals("CreateModelPackage", made["create_model_package"]) == []
    assert "evaluation_details" not in card_of(made)
    assert "score" not in made["create_model_package"]["CustomerMetadataProperties"]


def test_much_to_say_is_cut_to_what_a_card_takes() -> None:
    facts = report(hyperparameters={"method": "lora", **{f"knob_{n}": "\x07" * 400 for n in range(300)}})
    made = requests(facts)
    assert refusals("CreateModelPackage", made["create_model_package"]) == []
    assert len(made["create_model_package"]["ModelCard"]["ModelCardContent"]) <= 100_000
    assert card_of(made)["training_details"]["training_job_details"]["hyper_parameters"]


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UserError) as caught:
        requests(group="my toys", approval="yes", model="here", base_model="s3://", tags={"aws:mine": "x"})
    said = " ".join(caught.value.problems)
    assert len(caught.value.problems) == 5
    for word in ("group: 'my toys'", "approval: 'yes'", "model: here", "base_model: ", "aws:mine"):
        assert word in said
