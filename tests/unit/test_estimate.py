"""Time and cost of a job, estimated without a GPU or an account."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import launcher
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.planning.choice import make_plan
from launcher.estimates import MARGIN, Estimate, choose_instance, estimate_on
from launcher.instances import INSTANCES, find_instance
from launcher.jobs.times import Median, OwnTimes
from launcher.parts import NOTHING, Known, in_minutes
from tests.helpers.api import shape_of

PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
GPU_TYPES = st.sampled_from(sorted(INSTANCES))


def parse(**values: object) -> Hyperparameters:
    return Hyperparameters.parse({**PROMPTS, **values})


def minutes(instance: str, **values: object) -> float:
    found = estimate_on(parse(**values), find_instance(instance)).minutes
    assert found is not None
    return found


def test_every_instance_type_is_one_of_sagemaker() -> None:
    known = set(shape_of("CreateTrainingJob").members["ResourceConfig"].members["InstanceType"].enum)
    assert known.issuperset(INSTANCES)
    assert all(instance.count in (1, 4, 8) for instance in INSTANCES.values())


@pytest.mark.parametrize("name", ["ml.m5.xlarge", "ml.c5.18xlarge", "ml.r5d.large", "ml.m7i-flex.2xlarge"])
def test_types_without_a_gpu_train_on_the_cpu(name: str) -> None:
    found = estimate_on(parse(), find_instance(name))
    assert (found.plan.device, found.minutes, found.usd) == ("cpu", None, None)
    assert find_instance(name).has_own_disk == ("5d" in name)


@pytest.mark.parametrize("name", ["ml.trn1.2xlarge", "g5.xlarge", "ml.g5.small", "", "ml.inf2.xlarge"])
def test_types_that_can_not_run_the_job_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="no instance type that this job can run on"):
        find_instance(name)


def test_the_plan_is_the_jobs_own() -> None:
    h = parse(train_text_encoder=False)
    assert estimate_on(h, find_instance("ml.g4dn.xlarge")).plan == make_plan(h, find_instance("ml.g4dn.xlarge").card)


@given(name=GPU_TYPES, steps=st.integers(1, 5000), more=st.integers(1, 5000))
def test_more_steps_take_longer_and_cost_more(name: str, steps: int, more: int) -> None:
    one = estimate_on(parse(max_train_steps=steps), find_instance(name))
    two = estimate_on(parse(max_train_steps=steps + more), find_instance(name))
    assert one.minutes is not None
    assert two.minutes is not None
    assert one.minutes < two.minutes
    if one.usd is not None and two.usd is not None:
        assert one.usd < two.usd


def test_what_makes_a_job_longer() -> None:
    usual = minutes("ml.g5.xlarge")
    assert minutes("ml.g5.xlarge", resolution=768) > usual
    assert minutes("ml.g5.xlarge", train_batch_size=4) > usual
    assert minutes("ml.g5.xlarge", num_class_images=200) > usual
    assert minutes("ml.g5.xlarge", with_prior_preservation=False) < usual
    assert minutes("ml.g5.xlarge", optimizer="adamw", use_ema=False, train_text_encoder=False) > usual


def test_faster_cards_take_less_time() -> None:
    times = [minutes(f"ml.{name}") for name in ("g4dn.xlarge", "g5.xlarge", "g6e.xlarge", "p5.4xlarge")]
    assert times == sorted(times, reverse=True)


def test_the_estimate_agrees_with_what_was_measured_on_the_h200() -> None:
    # docs/performance.md: 1,000 steps with 16 class images under a T4's memory, from load to save, took 80.5 s; its own
    # plan is faster.
    instance = find_instance("ml.p5en.48xlarge")
    found = estimate_on(parse(max_train_steps=1000, num_class_images=16, num_processes=1), instance)
    measured = [part for part in found.parts if part.source.startswith("measured")]
    assert [part.name for part in measured] == ["checks, loading, encoding", "16 class images", "1000 steps"]
    assert 40 < sum(part.seconds for part in measured) < 80.5


def test_the_minutes_are_those_of_the_parts_and_the_wait_is_not_billed() -> None:
    found = estimate_on(parse(), find_instance("ml.g5.xlarge"))
    assert found.minutes is not None
    (waiting,) = (part for part in found.parts if not part.is_billed)
    assert waiting.name == "instance"
    billed = sum(part.seconds for part in found.parts if part is not waiting) / 60
    assert found.minutes == pytest.approx(billed)
    assert found.usd == pytest.approx(billed / 60 * 1.408)
    assert found.whole_minutes == pytest.approx(billed + waiting.seconds / 60)
    lines = found.lines()
    assert f"about {in_minutes(found.whole_minutes)}, about ${found.usd:.2f} on demand" in lines[2]
    assert lines[2].endswith(f"; billed: {in_minutes(found.minutes)}")
    assert lines[3:] == [f"  {part.line()}" for part in found.parts]
    assert lines[3] == f"  instance: {waiting.seconds / 60:.1f} minutes, not billed (assumed)"


def test_what_is_fetched_and_written_takes_time_by_its_size() -> None:
    def seconds(name: str, known: Known = NOTHING, **values: object) -> float:
        parts = estimate_on(parse(**values), find_instance("ml.g5.xlarge"), known=known).parts
        return next(part.seconds for part in parts if part.name == name)

    toybox, hub, bucket = (
        seconds("base model", pretrained_model_name_or_path=base, base_architecture="sd")
        for base in ("toybox", "me/model", "s3://models/sd")
    )
    assert toybox == 0 < bucket < hub
    assert seconds("base model", base_architecture="sdxl") > 2 * hub
    assert seconds("saving and sending") > seconds("saving and sending", method="lora")
    small, large = (seconds("training image", Known(image_bytes=size)) for size in (10**9, 3 * 10**9))
    assert large == pytest.approx(3 * small)


def test_an_accounts_own_jobs_stand_in_for_what_is_assumed() -> None:
    instance, values = find_instance("ml.g5.xlarge"), {**PROMPTS, "max_train_steps": "400"}
    usual = estimate_on(parse(), instance)
    expected = {part.name: part.seconds for part in estimate_on(Hyperparameters.parse(values), instance).parts}
    trained = tuple((values, ratio * expected["400 steps"]) for ratio in (1.5, 0.5, 1.2))
    own = OwnTimes(Median(100, 3), Median(30, 3), Median(7, 1), None, (*trained, ({"no_such": "1"}, 1e9)))
    found = estimate_on(parse(), instance, known=Known(own=own))
    assert [part.seconds for part in found.parts[:3]] == [100, 30, 7]
    assert [part.source for part in found.parts[1:3]] == ["median of your last 3 jobs", "as your last job"]
    assert found.parts[-1] == usual.parts[-1]
    assert found.parts[-2].seconds == pytest.approx(1.2 * usual.parts[-2].seconds)
    assert found.training_minutes == pytest.approx(1.2 * usual.training_minutes)
    assert found.parts[-2].source == "1.2 x what was expected, median of your last 3 jobs"


def test_measuring_takes_the_time_of_its_pictures() -> None:
    usual = minutes("ml.g5.xlarge", max_train_steps=400)
    measured = minutes("ml.g5.xlarge", max_train_steps=400, fidelity_encoders="judge")
    on_the_way = minutes("ml.g5.xlarge", max_train_steps=400, fidelity_encoders="judge", fidelity_steps=100)
    # 24 pictures before and after, in batches; and as many, one by one, after 100, 200 and 300 steps.
    many, more = (minutes("ml.g5.xlarge", max_train_steps=400, num_class_images=50 + count) for count in (0, 48))
    assert measured - usual == pytest.approx(more - many)
    assert on_the_way - measured >= 1.5 * (measured - usual) - 1e-9
    chosen = minutes("ml.g5.xlarge", max_train_steps=400, fidelity_encoders="judge", select_best=True, save_steps=100)
    assert chosen - usual == pytest.approx(2 * (measured - usual))


def test_a_live_base_takes_longer_steps_and_no_class_images() -> None:
    def seconds(prior: str, steps: int) -> float:
        values = {"method": "lora", "prior": prior, "num_class_images": 200}
        return 60 * minutes("ml.g5.xlarge", max_train_steps=steps, **values)

    assert seconds("output", 1) < seconds("images", 1) - 60
    longer, shorter = (seconds(prior, 4001) - seconds(prior, 1) for prior in ("output", "images"))
    assert 1.1 < longer / shorter < 1.3


def test_epochs_are_counted_as_the_job_counts_them() -> None:
    h = parse(num_train_epochs=100)
    instance = find_instance("ml.g5.xlarge")
    assert estimate_on(h, instance, pictures=10).minutes == estimate_on(parse(max_train_steps=1000), instance).minutes


@given(
    steps=st.integers(1, 4000),
    limit=st.one_of(st.none(), st.integers(10, 500)),
    resolution=st.sampled_from([512, 768, 1024]),
)
def test_auto_is_the_cheapest_that_is_done_in_time(steps: int, limit: int | None, resolution: int) -> None:
    h = parse(max_train_steps=steps, resolution=resolution)
    priced: dict[str, Estimate] = {}
    for name, instance in INSTANCES.items():
        try:
            found = estimate_on(h, instance)
        except UserError:
            continue
        if found.usd is not None and found.minutes is not None and found.minutes * MARGIN <= (limit or 1e9):
            priced[name] = found
    try:
        chosen = choose_instance(h, max_minutes=limit).name
    except UserError:
        assert not priced
        return
    assert priced[chosen].usd == min(found.usd or 0 for found in priced.values())


def test_a_limit_that_nothing_keeps_names_the_fastest() -> None:
    with pytest.raises(UserError, match=r"max_minutes=3: .* the fastest, ml\.\S+, takes about \d+ minutes: allow \d+"):
        choose_instance(parse(), max_minutes=3)


def test_a_limit_that_the_instance_breaks() -> None:
    with pytest.raises(UserError, match=r"max_minutes=10: .* about \d\d minutes on ml.g4dn.xlarge"):
        launcher.estimate(**PROMPTS, instance_type="ml.g4dn.xlarge", max_minutes=10)


def test_what_does_not_fit_names_what_would() -> None:
    with pytest.raises(UserError, match=r"it fits with .*optimizer=auto"):
        launcher.estimate(**PROMPTS, instance_type="ml.g4dn.xlarge", optimizer="adamw", train_text_encoder=True)


def test_the_lines_say_it_all() -> None:
    lines = launcher.estimate(**PROMPTS, instance_type="ml.g5.12xlarge", instance_count=2).lines()
    assert lines[0] == "instance: 2 x ml.g5.12xlarge (8 x A10G)"
    assert lines[1].startswith("plan: large: UNet and text encoder with EMA, bf16, ")
    assert lines[2].startswith("length: 8 processes take 200 steps ")
    assert "on demand (us-west-2, November 2026)" in lines[3]


def test_every_option_is_named_for_people_and_for_completion() -> None:
    names = set(inspect.signature(launcher.fit).parameters)
    expected = {*Hyperparameters.model_fields, *launcher.Resources.model_fields, "images", "base_model", "wait"}
    assert expected <= names
    defaults: dict[str, Any] = {n: p.default for n, p in inspect.signature(launcher.fit).parameters.items()}
    assert (defaults["instance_type"], defaults["resolution"], defaults["spot"]) == ("local", 512, False)
    assert all(f"\n{name}: " in (launcher.fit.__doc__ or "") for name in launcher.Resources.model_fields)


def test_sdxl_takes_longer() -> None:
    small, large = (minutes("ml.g5.2xlarge", base_architecture=kind) for kind in ("sd", "sdxl"))
    assert large > 3 * small - 4  # without the minutes in which neither trains


def test_a_model_that_overflows_gets_an_instance_with_bf16() -> None:
    options = {**PROMPTS, "base_model": "Tongyi-MAI/Z-Image", "method": "lora"}
    found = launcher.estimate(**options, instance_type="auto")
    assert found.instance.card.has_bf16
    assert found.plan.precision == "bf16"
    assert found.minutes is not None
    with pytest.raises(UserError, match=f"T4 has no bf16, .* instance_type='auto' takes {found.instance.name}"):
        launcher.estimate(**options, instance_type="ml.g4dn.xlarge")
    with pytest.raises(UserError, match="method=full: the base model is a Z-Image model; set method to lora"):
        launcher.estimate(**{**options, "method": "full"}, instance_type="ml.p5.4xlarge")


@pytest.mark.slow
def test_an_sdxl_model_on_this_machine_is_seen_before_it_is_a_channel(tiny_base: Path, tiny_xl_base: Path) -> None:
    found = [
        launcher.estimate(**PROMPTS, base_model=base, instance_type="ml.g5.2xlarge").plan.predicted_peak_gb
        for base in (tiny_base, tiny_xl_base)
    ]
    plans = [make_plan(parse(base_architecture=kind), find_instance("ml.g5.2xlarge").card) for kind in ("sd", "sdxl")]
    assert found == [plan.predicted_peak_gb for plan in plans]


def test_what_a_kept_instance_costs_is_told_beside_what_it_saves() -> None:
    options = {**PROMPTS, "instance_type": "ml.g5.xlarge", "instance_count": 2}
    without, kept = launcher.estimate(**options), launcher.estimate(**options, keep_alive=600)
    (line,) = set(kept.lines()) - set(without.lines())
    hourly = find_instance("ml.g5.xlarge").usd_per_hour
    assert hourly
    assert f": ${2 * hourly / 60:.3f} a minute, ${2 * hourly / 6:.2f} at most;" in line
    seconds = {part.name: part.seconds for part in without.parts}
    saved = seconds["instance"] - 20 + seconds["training image"] + seconds["base model"]
    assert line.endswith(f"one like this would begin about {saved / 60:.1f} minutes sooner")


@pytest.mark.parametrize(
    ("minutes", "said"), [(0.2, "1 minute"), (1.4, "1 minute"), (1.6, "2 minutes"), (61.0, "61 minutes")]
)
def test_minutes_in_words(minutes: float, said: str) -> None:
    assert in_minutes(minutes) == said
