"""The requests of an endpoint, as SageMaker's own description of them wants them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import launcher
from dreambooth_sm.errors import UserError
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.planning.cards import CARDS, Card
from dreambooth_sm.planning.serving import padded, pictures_at_a_time, serving_peak_gb, serving_plan, why_none
from dreambooth_sm.serving.settings import ServingSettings
from launcher.endpoints.models import Served, served_of
from launcher.endpoints.prepare import PreparedEndpoint
from launcher.endpoints.requests import arguments_of
from launcher.endpoints.scaling import Scaling
from launcher.instances import INSTANCES
from tests.helpers.api import refusals

OPERATIONS = {
    "create_model": "CreateModel",
    "create_endpoint_config": "CreateEndpointConfig",
    "create_endpoint": "CreateEndpoint",
}
USUAL: dict[str, Any] = {
    "name": "zwx",
    "model": "s3://models/jobs/zwx/",
    "image_uri": "123456789012.dkr.ecr.us-west-2.amazonaws.com/dreambooth-sm:1",
    "role": "arn:aws:iam::123456789012:role/serve",
    "instance_type": "ml.g5.xlarge",
}


def source(prefix: str) -> dict[str, Any]:
    return {"S3DataSource": {"S3Uri": prefix, "S3DataType": "S3Prefix", "CompressionType": "None"}}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"base_model": "owner/model", "adapters": "s3://models/fleet", "batch": 16, "log_prompts": True},
        {"base_model": "s3://models/base", "adapters": "s3://models/fleet", "network_isolation": True},
        {"asynchronous": "s3://models/answers", "instance_count": 2},
    ],
)
def test_sagemaker_takes_them(more: dict[str, Any]) -> None:
    requests = launcher.endpoint_requests(**USUAL, **more)
    assert list(requests) == list(OPERATIONS)
    for operation, request in requests.items():
        assert refusals(OPERATIONS[operation], request) == []
    container = requests["create_model"]["PrimaryContainer"]
    assert container["ModelDataSource"] == source("s3://models/jobs/zwx/")
    read = ServingSettings.of(container["Environment"])
    assert (read.batch, read.log_prompts) == (more.get("batch", 8), more.get("log_prompts", False))
    # What they describe makes the same again.
    said = arguments_of(requests["create_model"], requests["create_endpoint_config"])
    assert launcher.endpoint_requests(USUAL["name"], **said) == requests


def test_what_an_isolated_container_needs_comes_as_channels() -> None:
    more = {"base_model": "s3://models/base", "adapters": "s3://models/fleet/", "network_isolation": True}
    made = launcher.endpoint_requests(**USUAL, **more)["create_model"]
    assert made["EnableNetworkIsolation"] is True
    assert made["PrimaryContainer"]["Environment"] == {}
    assert made["PrimaryContainer"]["AdditionalModelDataSources"] == [
        {"ChannelName": "base", **source("s3://models/base/")},
        {"ChannelName": "adapters", **source("s3://models/fleet/")},
    ]


def test_several_models_are_adapters_below_one_prefix() -> None:
    served = served_of(["s3://models/fleet/zwx", "s3://models/fleet/ink/"], base_model="owner/model")
    assert served == Served(None, "owner/model", "s3://models/fleet")
    made = launcher.endpoint_requests(**{**USUAL, **dataclasses.asdict(served)})["create_model"]
    assert refusals("CreateModel", made) == []
    assert made["PrimaryContainer"]["Environment"] == {
        "SERVE_BASE_MODEL": "owner/model",
        "SERVE_ADAPTERS": "s3://models/fleet",
    }
    assert served_of([Path("zwx")]) == served_of("zwx") == Served("zwx")
    with pytest.raises(UserError) as caught:
        served_of(["s3://models/a/zwx", "s3://models/b/ink"], adapters="s3://models/c")
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "models", "adapters", "base_model is missing; name the model that the adapters lie beside",
    ]  # fmt: skip


def usual_of(family: str, **more: Any) -> Hyperparameters:
    method = next(iter(FAMILIES[family].facts.methods))
    usual = {"instance_prompt": "zwx", "base_architecture": family, "method": method, "accept_license": True}
    return Hyperparameters.parse({**usual, **more})


@pytest.mark.parametrize("card", [card for card in CARDS.values() if not card.is_cpu], ids=lambda card: card.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_pictures_are_drawn_at_a_time_as_fit_the_card(family: str, card: Card) -> None:
    h, most = usual_of(family), 8
    found = pictures_at_a_time(h, card, most)
    assert 0 <= found <= most
    assert found == 0 or serving_peak_gb(found, h) <= card.budget_gb
    if h.facts.overflows and not card.has_bf16:
        assert (found, why_none(h, card).partition(",")[0]) == (0, f"{card.name} has no bf16")
        return
    assert found == most or serving_peak_gb(found + 1, h) > card.budget_gb


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_take_memory_beside_what_is_computed_without_them(family: str) -> None:
    h = usual_of(family)
    without = [serving_peak_gb(pictures, h) for pictures in range(1, 40)]
    by_graphs = [serving_peak_gb(pictures, h, has_graphs=True) for pictures in range(1, 40)]
    assert by_graphs == sorted(by_graphs)  # more rows never need less
    assert all(more > less for more, less in zip(by_graphs, without, strict=True))
    rows_each = 1 if h.facts.drawing.told else 2
    for pictures in range(1, 39):
        same = padded(rows_each * pictures) == padded(rows_each * (pictures + 1))
        assert (by_graphs[pictures - 1] == by_graphs[pictures]) is same  # rows are computed beyond those asked for
    larger = usual_of(family, resolution=h.resolution * 2)
    assert serving_peak_gb(4, larger, has_graphs=True) > serving_peak_gb(4, h, has_graphs=True)


@given(
    family=st.sampled_from([*FAMILIES]),
    gib=st.floats(1, 120),
    most=st.integers(1, 32),
)
def test_a_card_without_room_for_graphs_draws_without_them_and_says_so(family: str, gib: float, most: int) -> None:
    h, card = usual_of(family), Card("a card", gib, (8, 0))
    plan = serving_plan(h, card, most)
    if plan is None:
        assert pictures_at_a_time(h, card, most) == 0
        return
    assert plan.pictures == pictures_at_a_time(h, card, most)  # graphs go before pictures at a time do
    assert plan.peak_gb <= card.budget_gb
    assert plan.has_graphs is (serving_peak_gb(plan.pictures, h, has_graphs=True) <= card.budget_gb)
    if plan.has_graphs:
        assert plan.notes() == []
        return
    (note,) = plan.notes()
    assert "without CUDA graphs" in note
    assert (f"; batch={plan.most_by_graphs} leaves it" in note) is (plan.most_by_graphs > 0)
    if plan.most_by_graphs:
        smaller = serving_plan(h, card, plan.most_by_graphs)
        assert smaller is not None
        assert smaller.has_graphs


def test_the_plan_of_an_endpoint_says_that_graphs_have_no_room() -> None:
    h = usual_of("sdxl")
    plan = serving_plan(h, CARDS["T4"], 8)
    requests = launcher.endpoint_requests(**{**USUAL, "instance_type": "ml.g4dn.xlarge"})
    lines = PreparedEndpoint("zwx", requests, INSTANCES["ml.g4dn.xlarge"], 1, None, plan).lines()
    assert [line for line in lines if line.startswith("plan: ")] == [
        "plan: 8 pictures at a time, 12.7 of 14.6 GB",
        "plan: steps are drawn without CUDA graphs, which is slower: their memory has no room on the card; "
        "batch=4 leaves it",
    ]


@pytest.mark.parametrize("scaling", [Scaling(1, 4, 20), Scaling(0, 2, 3.5, asynchronous=True)])
def test_application_autoscaling_and_cloudwatch_take_what_scales_it(scaling: Scaling) -> None:
    operations = {
        "register_scalable_target": "RegisterScalableTarget",
        "put_scaling_policy": "PutScalingPolicy",
        "put_metric_alarm": "PutMetricAlarm",
    }
    steps = scaling.requests("zwx")
    for service, operation, request in steps:
        assert refusals(operations[operation], request, service) == []
    assert steps[0][2]["ResourceId"] == "endpoint/zwx/variant/AllTraffic"
    assert (steps[0][2]["MinCapacity"], steps[0][2]["MaxCapacity"]) == (scaling.least, scaling.most)
    assert steps[1][2]["TargetTrackingScalingPolicyConfiguration"]["TargetValue"] == scaling.target
    # Nobody counts what waits for each of no instances.
    assert [operation for _, operation, _ in steps[2:]] == (
        ["put_scaling_policy", "put_metric_alarm"] if scaling.least == 0 else []
    )


def test_a_number_of_instances_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        Scaling(0, 0, -1)
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "min_instances", "max_instances", "requests_per_instance",
    ]  # fmt: skip


def test_all_that_would_be_refused_is_told_at_once() -> None:
    wrong = {"name": "a_b", "role": "serve", "instance_type": "local", "model": "models/zwx"}
    with pytest.raises(UserError) as caught:
        launcher.endpoint_requests(
            **{**USUAL, **wrong},
            base_model="owner/model",
            network_isolation=True,
            instance_count=0,
            asynchronous="s3://B/x",
            batches=3,
        )
    starts = [line.partition(":")[0] for line in caught.value.problems]
    assert starts == [
        "name", "role", "instance_type", "instance_count", "model", "base_model", "asynchronous", "SERVE_BATCHES",
    ]  # fmt: skip


def test_full_models_come_from_s3_through_a_network() -> None:
    request = launcher.endpoint_requests(**USUAL, full_models="s3://models/all")["create_model"]
    assert request["PrimaryContainer"]["Environment"]["SERVE_FULL_MODELS"] == "s3://models/all"
    with pytest.raises(UserError) as caught:
        launcher.endpoint_requests(**USUAL, full_models="models/all", network_isolation=True)
    assert [line.partition(":")[0] for line in caught.value.problems] == ["full_models"] * 2
    assert "not in S3" in caught.value.problems[0]
