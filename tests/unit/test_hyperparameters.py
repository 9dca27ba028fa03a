"""The schema: what SageMaker, its SDKs, notebooks and command lines make of a value, and back."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal, get_origin

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.concepts import Concept
from dreambooth_sm.knobs.declare import meaning
from dreambooth_sm.knobs.decode import decode, platform_keys, split_arguments
from dreambooth_sm.knobs.docs import markdown_table
from dreambooth_sm.knobs.escapes import unescape_prompt
from dreambooth_sm.knobs.takes import alternatives, choices
from dreambooth_sm.storage import S3Options

PROMPT = "photo of zwx toy"
FIELDS = Hyperparameters.model_fields
BOOLEANS = [name for name, field in FIELDS.items() if bool in alternatives(field.annotation)]
AUTO = [name for name, field in FIELDS.items() if "auto" in choices(field.annotation)]
INTEGERS = [name for name, field in FIELDS.items() if int in alternatives(field.annotation)]
FLOATS = [name for name, field in FIELDS.items() if float in alternatives(field.annotation)]
OPTIONAL = [name for name, field in FIELDS.items() if type(None) in alternatives(field.annotation)]

# The seed's hyperparameters (facts.md, section 1), with the values of its notebook where it has them.
SEED_NOTEBOOK = {
    "pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5",
    "pretrained_vae_name_or_path": None,
    "revision": None,
    "model_name": "aws-trained-dreambooth-model",
    "models_path": "/opt/ml/model/",
    "manul_upload_model_path": "s3://bucket/prefix",
    "instance_data_dir": "/opt/ml/input/data/images/",
    "class_data_dir": "/opt/ml/input/data/class_images/",
    "instance_prompt": r"photo\ of\ zwx\  toy",
    "class_prompt": r"photo\ of\ a\  toy",
    "with_prior_preservation": True,
    "num_class_images": 50,
    "prior_loss_weight": 0.5,
    "resolution": 512,
    "center_crop": True,
    "hflip": False,
    "train_batch_size": 1,
    "sample_batch_size": 1,
    "max_train_steps": 300,
    "num_train_epochs": 75,
    "save_steps": 100,
    "save_use_epochs": False,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "learning_rate": 2e-6,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "scale_lr": False,
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 0.01,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "mixed_precision": "fp16",
    "attention": "xformers",
    "train_text_encoder": False,
    "use_ema": True,
    "use_lora": False,
    "use_cpu": False,
    "not_cache_latents": True,
    "max_token_length": 75,
    "pad_tokens": True,
    "shuffle_tags": False,
    "seed": 1,
}
# Named in the same table, and in no notebook together with the rest.
SEED_OTHERS = {"manual_upload_model_path": "s3://bucket/prefix", "concepts_list": "/opt/ml/input/data/concepts.json"}


def parse(**values: object) -> Hyperparameters:
    return Hyperparameters.parse({"instance_prompt": PROMPT, **values})


def problems(raw: dict[str, object]) -> list[str]:
    with pytest.raises(UserError) as caught:
        Hyperparameters.parse(raw)
    return caught.value.problems


def problem(**values: object) -> str:
    """The one problem of these values."""
    (line,) = problems({"instance_prompt": PROMPT, **values})
    return line


# How a value reaches the container


def by_str(value: object) -> str:
    """SageMaker SDK 2."""
    return str(value)


def by_json(value: object) -> str:
    """SageMaker SDK 3, and SDK 2 before 2.0 for strings as well."""
    return value if isinstance(value, str) else json.dumps(value)


def by_json_twice(value: object) -> str:
    return json.dumps(by_json(value))


ENCODINGS = [by_str, by_json, json.dumps, by_json_twice, lambda value: json.dumps(json.dumps(value))]


@pytest.mark.parametrize("encode", ENCODINGS)
def test_the_seeds_notebook_means_what_it_says(encode: Any) -> None:
    parsed = Hyperparameters.parse({name: encode(value) for name, value in SEED_NOTEBOOK.items()})
    expected = {**SEED_NOTEBOOK, "instance_prompt": PROMPT, "class_prompt": "photo of a toy"}
    expected["manual_upload_model_path"] = expected.pop("manul_upload_model_path")
    assert expected.pop("use_8bit_adam") is False
    assert expected.pop("use_lora") is False
    expected |= {"optimizer": "auto16", "method": "full"}
    assert parsed.model_dump(include=set(expected)) == expected


@pytest.mark.parametrize("name", [*SEED_NOTEBOOK, *SEED_OTHERS])
def test_every_name_of_the_seed_is_accepted(name: str) -> None:
    value = {**SEED_NOTEBOOK, **SEED_OTHERS}[name]
    parsed = Hyperparameters.parse({"instance_prompt": PROMPT, "class_prompt": "photo of a toy", name: str(value)})
    is_set = Hyperparameters.aliases().get(name, name) in parsed.model_fields_set
    assert is_set != (name == "use_lora")  # false says nothing about the method


@pytest.mark.parametrize("name", BOOLEANS)
@pytest.mark.parametrize(
    ("text", "meant"),
    [(text, True) for text in ("True", "true", "TRUE", "1", "yes", " true ", '"True"', '"\\"true\\""')]
    + [(text, False) for text in ("False", "false", "FALSE", "0", "no", " false\n", '"False"', '"\\"false\\""')],
)
def test_booleans_are_read_and_not_taken_for_truthy_texts(name: str, text: str, meant: bool) -> None:
    field = FIELDS[name]
    decoded = decode(text, field)
    read = Hyperparameters.model_validate({name: decoded})
    assert getattr(read, name) is meant


@pytest.mark.parametrize("text", ["maybe", "2", "", "-1", "truee", "None", "[]", "0.5", "False True", "nan"])
@pytest.mark.parametrize("name", ["use_cpu", "train_text_encoder"])
def test_anything_else_is_no_boolean(name: str, text: str) -> None:
    assert problem(**{name: text}).startswith(f"{name}: ")
    assert "set true or false" in problem(**{name: text})


@pytest.mark.parametrize("name", sorted(set(INTEGERS + FLOATS) - {"seed"}))
@pytest.mark.parametrize("value", [True, False, "true"])
def test_a_boolean_is_no_number(name: str, value: object) -> None:
    assert f"{name}: " in problem(**{name: value})


@pytest.mark.parametrize("name", AUTO)
@pytest.mark.parametrize("text", ["auto", "Auto", " AUTO ", '"auto"', '"\\"auto\\""'])
def test_auto_leaves_the_choice_to_the_plan(name: str, text: str) -> None:
    assert getattr(parse(**{name: text}), name) == "auto"


def test_auto_is_the_default_of_everything_that_depends_on_the_card() -> None:
    on_the_card = {
        "with_prior_preservation",
        "sample_batch_size",
        "train_text_encoder",
        "optimizer",
        "max_grad_norm",
        "use_ema",
        "mixed_precision",
        "attention",
        "gradient_checkpointing",
        "not_cache_latents",
    }
    assert on_the_card <= set(AUTO)
    # Where None leaves it to the AWS settings, "auto" is one of theirs.
    assert {name for name in AUTO if FIELDS[name].default != "auto"} == {"s3_addressing_style"}


@pytest.mark.parametrize("name", sorted(set(OPTIONAL) - {"instance_prompt"}))
@pytest.mark.parametrize("text", [None, "None", "null", "", "none", '"None"', '""'])
def test_none_is_none(name: str, text: str | None) -> None:
    method = (*meaning(FIELDS[name]).methods, FIELDS["method"].default)[0]
    given = {"method": method, "class_prompt": "photo of a toy", name: text}
    assert getattr(parse(**given), name) is None


@pytest.mark.parametrize("name", ["learning_rate", "resolution", "model_name", "center_crop"])
def test_none_where_a_value_is_needed(name: str) -> None:
    assert problem(**{name: None}).startswith(f"{name}: no value is not valid; set ")


@pytest.mark.parametrize(
    "given_",
    [
        r"photo\ of\ zwx\  toy",
        "photo of  zwx\t toy ",
        r'"photo\ of\ zwx\  toy"',
        r"photo\\ of\\ zwx toy",
        json.dumps(r"photo\ of\ zwx\  toy"),
        "photo of zwx toy\\",
        '"photo of zwx\ntoy"',
        json.dumps(json.dumps(PROMPT)),
    ],
)
def test_prompts_reach_the_tokenizer_as_they_were_meant(given_: str) -> None:
    assert parse(instance_prompt=given_, class_prompt="photo of a toy").instance_prompt == PROMPT
    inline = parse(concepts_list=json.dumps([{"instance_prompt": given_.strip('"')}]))
    if given_.startswith("photo"):
        assert inline.inline_concepts[0].instance_prompt == PROMPT


@pytest.mark.parametrize(
    "prompt",
    [
        "фото zwx игрушки",
        "ズウクス の 写真",
        "zwx 🦆, studio light",
        "café zwx",
        '"zwx" the "toy"',
        r"a\b zwx",
        "100% {zwx}",
    ],
)
def test_prompts_of_any_language_stay_as_they_are(prompt: str) -> None:
    for encoded in (prompt, json.dumps(prompt), json.dumps(prompt, ensure_ascii=False)):
        assert parse(instance_prompt=encoded).instance_prompt == prompt


@given(st.text(max_size=40))
@example("a\\\\ \\ b\\")
def test_unescaping_twice_is_unescaping_once(text: str) -> None:
    once = unescape_prompt(text)
    assert unescape_prompt(once) == once
    assert once == once.strip()
    assert "\\ " not in once


def test_both_spellings_of_the_upload_path() -> None:
    target = "s3://bucket/prefix"
    for name in ("manul_upload_model_path", "manual_upload_model_path"):
        assert parse(**{name: target}).manual_upload_model_path == target
    both = parse(manul_upload_model_path=target, manual_upload_model_path=f'"{target}"')
    assert both.manual_upload_model_path == target
    line = problem(manul_upload_model_path=target, manual_upload_model_path="s3://other/prefix")
    assert "manul_upload_model_path" in line
    assert "manual_upload_model_path" in line


@pytest.mark.parametrize("encode", ENCODINGS)
@pytest.mark.parametrize(
    ("values", "meant"),
    [
        ({"use_lora": True}, "lora"),
        ({"use_lora": False}, "full"),
        ({"use_lora": True, "method": "lora"}, "lora"),
        ({"use_lora": False, "method": "lora"}, "lora"),
        ({"use_lora": False, "method": "hypernetwork"}, "hypernetwork"),
    ],
)
def test_the_seeds_name_of_lora(encode: Any, values: dict[str, object], meant: str) -> None:
    assert parse(**{name: encode(value) for name, value in values.items()}).method == meant


@pytest.mark.parametrize("encode", ENCODINGS)
@pytest.mark.parametrize(
    ("values", "meant"),
    [
        ({"use_8bit_adam": True}, "adamw8bit"),
        ({"use_8bit_adam": False}, "auto16"),
        ({"use_8bit_adam": "auto"}, "auto"),
        ({"use_8bit_adam": True, "optimizer": "auto"}, "adamw8bit"),
        ({"optimizer": "adamw8bit", "use_8bit_adam": True}, "adamw8bit"),
        ({"use_8bit_adam": False, "optimizer": "adamw"}, "adamw"),
        ({"use_8bit_adam": False, "optimizer": "lion"}, "lion"),
        ({"use_8bit_adam": "auto", "optimizer": "blockwise"}, "blockwise"),
    ],
)
def test_the_seeds_name_of_the_optimizer(encode: Any, values: dict[str, object], meant: str) -> None:
    assert parse(**{name: encode(value) for name, value in values.items()}).optimizer == meant


def test_optimizers_have_defaults_of_their_own_and_what_is_given_wins() -> None:
    def rates(**values: object) -> tuple[float, float]:
        h = parse(base_architecture="sd", **values)
        assert h.fit_to_base() == h
        return h.learning_rate, h.adam_beta2

    assert rates() == rates(optimizer="adafactor") == (2e-6, 0.999)
    assert rates(optimizer="prodigy") == rates(optimizer="prodigy", method="hypernetwork") == (1.0, 0.999)
    assert rates(optimizer="lion") == (2e-6 / 5, 0.99)
    assert rates(optimizer="lion", method="hypernetwork") == (1e-4 / 5, 0.99)
    assert rates(optimizer="lion", learning_rate=3e-6, adam_beta2=0.95) == (3e-6, 0.95)
    assert rates(optimizer="prodigy", learning_rate=0.5) == (0.5, 0.999)


@pytest.mark.parametrize(
    ("said", "optimizer"), [("true", "adamw"), ("true", "blockwise"), ("false", "adamw8bit"), ("false", "blockwise")]
)
def test_two_names_of_the_optimizer_that_contradict_each_other(said: str, optimizer: str) -> None:
    line = problem(use_8bit_adam=said, optimizer=optimizer, use_cpu="true")
    assert line == f"use_8bit_adam={said} and optimizer={optimizer} contradict each other; keep one of them"


@pytest.mark.parametrize("value", ["perhaps", "2", None, ["true"]])
def test_a_value_that_the_seeds_name_does_not_take(value: object) -> None:
    assert problem(use_8bit_adam=value).endswith(" is not valid; set true or false, or auto")
    assert problem(use_8bit_adam=value, use_cpu="true").startswith("use_8bit_adam: ")
    assert len(problems({"instance_prompt": PROMPT, "use_8bit_adam": "true", "optimizer": "sgd"})) == 1


@pytest.mark.parametrize("bad", ["bucket/prefix", "https://bucket", "s3:/bucket", "s3://", "s3://b", "/opt/ml/model"])
def test_the_upload_path_is_an_s3_location(bad: str) -> None:
    assert "s3://bucket/prefix" in problem(manual_upload_model_path=bad)


def test_what_the_platform_adds_is_kept_apart() -> None:
    added = {
        "sagemaker_container_log_level": "20",
        "sagemaker_submit_directory": '"s3://b/sourcedir.tar.gz"',
        "_tuning_objective_metric": "loss",
    }
    raw = {"instance_prompt": PROMPT, **added}
    assert Hyperparameters.parse(raw) == parse()
    assert platform_keys(raw) == added
    assert platform_keys({"sagemaker": 1, "tuning": 2, "my_sagemaker_x": 3}) == {}


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("learning-rate", "learning_rate"),
        ("LEARNING_RATE", "learning_rate"),
        ("max_train_step", "max_train_steps"),
        ("instance_promt", "instance_prompt"),
        ("manul_upload_model_pth", "manul_upload_model_path"),
        ("use_8bits_adam", "use_8bit_adam"),
    ],
)
def test_an_unknown_name_gets_the_nearest_known_one(wrong: str, meant: str) -> None:
    assert problem(**{wrong: "1"}) == f"{wrong}: unknown hyperparameter; did you mean {meant}?"


def test_an_unknown_name_far_from_all_gets_the_list() -> None:
    assert "python -m dreambooth_sm.hyperparameters" in problem(qqqqqq="1")


def test_every_problem_is_told_at_once() -> None:
    told = problems(
        {
            "instance_prompt": PROMPT,
            "class_prompt": PROMPT,
            "learning_rate": "fast",
            "resolution": "500",
            "use_ema": "perhaps",
            "stepps": "1",
            "manual_upload_model_path": "nowhere",
            "use_lora": "True",
            "method": "full",
        }
    )
    named = ["stepps", "learning_rate", "use_ema", "are the same", "resolution=500", "use_lora", "'nowhere'"]
    assert all(any(name in line for line in told) for name in named), told
    assert len(told) == len(named)


def test_a_refused_value_is_not_reported_a_second_time_as_missing() -> None:
    told = problems({"instance_prompt": ["photo"], "with_prior_preservation": "true", "class_prompt": 3.5})
    assert sorted(line.split(":")[0] for line in told) == ["class_prompt", "instance_prompt"]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "Infinity", "1e999", "NaN", math.nan, math.inf])
def test_numbers_that_are_none(name: str, text: object) -> None:
    assert problem(**{name: text}).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("resolution", ["63", "2049", "512.5", "0", "-512"], ["64", "512", 2048, "512.0"]),
        ("learning_rate", ["0", "-1e-6", "2e-6x"], ["2e-06", "1", 5e-6]),
        ("train_batch_size", ["0", "-1", "1.5"], ["1", 4]),
        ("max_train_steps", ["0", "-3", "many"], ["1", "300"]),
        ("prior_loss_weight", ["-0.1"], ["0", "1.5"]),
        ("adam_beta1", ["1", "-0.1", "1.5"], ["0", "0.9"]),
        ("adam_beta2", ["1.0"], ["0.999"]),
        ("ema_decay", ["1", "-1"], ["0", "0.9999"]),
        ("max_grad_norm", ["0", "-1"], ["0.5", "none"]),
        ("snr_gamma", ["0", "-5"], ["5", "None"]),
        ("sample_batch_size", ["0", "2.5"], ["4"]),
        ("save_steps", ["-1"], ["0", "100"]),
        ("seed", ["-1", "1.5"], ["0", "12345678901"]),
        ("checkpoints_total_limit", ["0"], ["1"]),
        ("max_token_length", ["77", "0", "seventy-five"], ["75", "150", "225", 225]),
        ("mixed_precision", ["fp8", "True", "16"], ["FP16", "bf16", "no"]),
        ("attention", ["sdpa", "none"], ["Default", "xformers", "flash_attention"]),
        ("lr_scheduler", ["step"], ["cosine", "Linear"]),
        ("resume_from_checkpoint", ["step-1"], ["latest", "no"]),
    ],
)
def test_values_out_of_range(name: str, bad: list[object], good: list[object]) -> None:
    for value in good:
        assert name in parse(**{name: value}).model_fields_set
    for value in bad:
        line = problem(**{name: value})
        assert line.startswith(f"{name}: {value!r} is not valid; set ")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"instance_prompt": None}, "instance_prompt is missing"),
        ({"with_prior_preservation": "true"}, "needs class_prompt"),
        ({"class_prompt": PROMPT}, "are the same"),
        ({"resolution": "500"}, "set 496"),
        ({"resolution": "65"}, "set 64"),
        ({"use_lora": "true", "method": "full"}, "contradict each other"),
        (
            {"method": "lora", "lora_variant": "lokr", "lora_init": "gaussian"},
            "lora_init is for lora_variant=lora or dora",
        ),
        ({"method": "lora", "lora_variant": "oft", "lora_alpha": 8}, "leave lora_alpha out"),
        ({"method": "lora", "model_name": "a/b"}, "can't be a file's name"),
        ({"method": "lora", "model_name": "pytorch_lora_weights"}, "set another model_name"),
        ({"method": "lora", "optimizer": "prodigy", "lora_plus_ratio": 4}, "finds one learning rate for all"),
        ({"lora_rank": 8}, "belongs to method=lora"),
        ({"use_cpu": "1", "mixed_precision": "fp16"}, "can't train in fp16"),
        ({"instance_data_dir": "/a/", "class_data_dir": "/a"}, "same directory"),
        ({"lr_warmup_steps": "5"}, "constant_with_warmup"),
        ({"text_encoder_lr": "1e-6", "train_text_encoder": "false"}, "leave text_encoder_lr out"),
        ({"optimizer": "prodigy", "learning_rate": "1e-4"}, "set learning_rate to 1, or leave it out"),
        ({"optimizer": "prodigy", "text_encoder_lr": "1e-4"}, "leave text_encoder_lr out"),
        ({"optimizer": "lion", "adam_epsilon": "1e-6"}, "leave adam_epsilon out"),
        ({"optimizer": "adafactor", "adam_beta1": "0.8"}, "leave adam_beta1 out"),
        ({"optimizer": "schedule_free", "lr_scheduler": "cosine"}, "constant_with_warmup"),
        ({"optimizer": "schedule_free", "use_ema": "true"}, "set use_ema to false or auto"),
        ({"optimizer": "schedule_free", "adam_beta1": "0"}, "adam_beta1 to more than 0"),
        ({"text_encoder_lr": "1e-6", "method": "hypernetwork"}, "leave text_encoder_lr out"),
        ({"select_best": "true", "save_steps": 2, "fidelity_encoders": "judge"}, None),
        ({"select_best": "true", "save_steps": 2}, "fidelity_encoders"),
        ({"select_best": "true", "fidelity_encoders": "judge"}, "save_steps"),
        ({"fidelity_encoders": "dino=a/b clip=/c/d"}, None),
        ({"fidelity_encoders": "clip=a/b dino=/c/d"}, None),
        ({"fidelity_encoders": "clip=a/b clip=c/d"}, "fidelity_encoders"),
        ({"fidelity_encoders": "judge dino=a/b"}, "fidelity_encoders"),
        ({"concepts_list": "[]"}, "concepts_list is empty"),
        ({"concepts_list": '[{"instance_promt": "a"}]'}, "'instance_promt' is not a key of a concept"),
        ({"concepts_list": '["a"]'}, "concepts_list: item"),
        ({"concepts_list": "{}", "instance_prompt": None}, None),
        (
            {"concepts_list": '[{"class_prompt": "photo of a toy"}]', "instance_prompt": None},
            "concept 0 has no instance",
        ),
        ({"concepts_list": '[{"instance_prompt": "zwx"}]', "with_prior_preservation": "1"}, "concept 0 has no class"),
    ],
)
def test_values_that_do_not_go_together(values: dict[str, object], said: str | None) -> None:
    raw = {"instance_prompt": PROMPT, **values}
    if said is None:  # any other text is the path of a file
        assert Hyperparameters.parse(raw).inline_concepts == ()
    else:
        (line,) = problems(raw)
        assert said in line


def test_prior_preservation_follows_the_class_prompt() -> None:
    assert not parse().prior_preservation
    assert parse(class_prompt="photo of a toy").prior_preservation
    assert not parse(class_prompt="photo of a toy", with_prior_preservation="False").prior_preservation
    assert parse(concepts_list='[{"class_prompt": "photo of a toy"}]').prior_preservation


CONCEPTS = [{"instance_prompt": PROMPT, "class_prompt": "photo of a toy"}, {"instance_data_dir": "/pictures"}]


@pytest.mark.parametrize(
    "given_",
    [CONCEPTS, tuple(CONCEPTS), str(CONCEPTS), json.dumps(CONCEPTS), json.dumps(json.dumps(CONCEPTS))],
    ids=["list", "tuple", "str", "json", "json twice"],
)
def test_concepts_in_every_encoding(given_: object) -> None:
    expected = tuple(Concept(**concept) for concept in CONCEPTS)
    assert parse(concepts_list=given_, class_prompt="photo of a toy").inline_concepts == expected


# Command lines


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--a", "1", "--b=x y"], {"a": "1", "b": "x y"}),
        (["--instance_prompt", "photo", "of", "zwx", "toy", "--seed", "1"], {"instance_prompt": PROMPT, "seed": "1"}),
        (["--use_ema"], {"use_ema": "true"}),
        (["--use_ema", "False"], {"use_ema": "False"}),
        (["--a="], {"a": ""}),
        (["--a=b=c"], {"a": "b=c"}),
        (["--a", "-1"], {"a": "-1"}),
        (["--a", "x", "--", "y"], {"a": "x -- y"}),
        ([], {}),
    ],
)
def test_command_lines(words: list[str], expected: dict[str, str]) -> None:
    assert split_arguments(words) == expected


@pytest.mark.parametrize(
    ("words", "said"), [(["1", "--a", "2"], "'1'"), (["--a", "1", "--a", "2"], "--a is given twice")]
)
def test_broken_command_lines(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        split_arguments(words)


def test_a_command_line_is_parsed_like_any_input() -> None:
    words = ["--instance_prompt", "photo\\", "of\\", "zwx\\", "toy", "--use_ema=False", "--train_text_encoder"]
    parsed = Hyperparameters.parse_arguments(words)
    assert parsed == parse(use_ema=False, train_text_encoder=True)


# Round trips


def plain(text: str) -> bool:
    """Texts that no encoding touches: the rest is decoded on purpose."""
    return (
        text == unescape_prompt(text)
        and text.lower() not in {"", "none", "null"}
        and not (text.startswith('"') and text.endswith('"'))
    )


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30).map(unescape_prompt)
texts = texts.filter(plain)
paths = st.from_regex(r"/[a-z0-9_/.-]{1,20}[a-z]", fullmatch=True)
concepts = st.fixed_dictionaries(
    {"instance_prompt": texts.map("zwx {}".format)},
    optional={"instance_data_dir": paths, "class_data_dir": paths, "class_prompt": texts.map("a {}".format)},
)


def values_of(name: str) -> st.SearchStrategy[Any]:
    """Any valid value of a field, as Python has it."""
    special: dict[str, st.SearchStrategy[Any]] = {
        "resolution": st.integers(8, 256).map(lambda n: n * 8),
        "pretrained_model_name_or_path": paths.map("/models{}".format)
        | st.sampled_from(["toybox", "a/b", "s3://abc/d"]),
        "pretrained_vae_name_or_path": st.none()
        | paths.map("/models{}".format)
        | st.sampled_from(["a/b", "s3://abc/d"]),
        "pretrained_parts_name_or_path": st.none(),
        "manual_upload_model_path": st.from_regex(r"s3://[a-z0-9]{3,9}(/[a-z][a-z ]{0,9}[a-z])?", fullmatch=True),
        "instance_data_dir": paths.map("/instance{}".format),
        "class_data_dir": paths.map("/class{}".format),
        "instance_prompt": texts.map("zwx {}".format),
        "class_prompt": texts.map("a {}".format),
        "concepts_list": st.lists(concepts, min_size=1, max_size=3) | paths,
        "use_cpu": st.just(False),
        "lr_warmup_steps": st.just(0),
        "sample_guidance_scale": st.floats(1, 20),
        "validation_guidance_scale": st.floats(1, 20),
        "validation_steps": st.just(0),
        "fidelity_encoders": st.sampled_from([None, "judge", "dino=a/b", "dino=a/b clip=/c"]),
        "select_best": st.just(False),
        "lora_rank": st.integers(1, 512),
        "lora_plus_ratio": st.floats(1, 64),
        "lora_variant": st.sampled_from(["lora", "dora"]),
        "hypernetwork_width": st.integers(1, 8),
        "hypernetwork_layers": st.integers(1, 4),
        "placeholder_token": st.sampled_from([None, "zwx"]),
        "num_vectors": st.integers(1, 32),
    }
    field = FIELDS[name]
    choices: list[st.SearchStrategy[Any]] = []
    for kind in alternatives(field.annotation):
        if kind is bool:
            choices.append(st.booleans())
        elif kind is int:
            choices.append(st.integers(1, 1_000))
        elif kind is float:
            choices.append(st.floats(1e-12, 0.999))
        elif kind is str:
            choices.append(texts)
        elif kind is type(None):
            choices.append(st.none())
        elif get_origin(kind) is Literal:
            choices.append(st.sampled_from(list(kind.__args__)))
    return special[name] if name in special else st.one_of(choices)


def of_its_method(values: dict[str, Any]) -> dict[str, Any]:
    """Without what belongs to other methods, or to other choices of priors and variants."""
    method = values.get("method", FIELDS["method"].default)
    without = {"with_prior_preservation"} if values.get("prior") == "dco" else {"dco_beta"}
    if values.get("lora_variant", "lora") != "lora":
        without |= {"distance_penalty", "lora_dropout", "lora_min_rank"}
    if (values.get("lora_min_rank") or 0) > values.get("lora_rank", FIELDS["lora_rank"].default):
        without |= {"lora_min_rank"}
    return {
        name: value
        for name, value in values.items()
        if method in (meaning(FIELDS[name]).methods or (method,)) and name not in without
    }


valid = (
    (
        st.fixed_dictionaries(
            {"instance_prompt": values_of("instance_prompt"), "class_prompt": values_of("class_prompt")},
            optional={name: values_of(name) for name in FIELDS if name not in ("instance_prompt", "class_prompt")},
        )
    )
    .map(of_its_method)
    .map(Hyperparameters.model_validate)
    .filter(lambda h: not h.conflicts())
)


@given(valid, st.sampled_from([lambda t: t, str, json.dumps, lambda t: json.dumps(json.dumps(t)), lambda t: f" {t}\n"]))
def test_hyperparameters_survive_the_way_to_the_container(h: Hyperparameters, sdk: Any) -> None:
    sent = h.to_sagemaker()
    assert all(type(value) is str for value in sent.values())
    assert sent.keys() == h.model_fields_set
    received = Hyperparameters.parse({name: sdk(value) for name, value in sent.items()})
    assert received == h
    assert received.model_fields_set == h.model_fields_set


@given(valid, st.sampled_from(ENCODINGS))
def test_python_values_survive_every_sdk(h: Hyperparameters, sdk: Any) -> None:
    raw = h.model_dump(include=h.model_fields_set, mode="json")
    assert Hyperparameters.parse({name: sdk(value) for name, value in raw.items()}) == h
    assert Hyperparameters.parse(raw) == h


# No input is worth a traceback

names = st.sampled_from([*FIELDS, *Hyperparameters.aliases(), "sagemaker_program"]) | st.text(max_size=8)
values_of_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(list(Concept.model_fields)) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
NASTY = ["[" * 50_000, '"\\ud800"', "\ud800", "9" * 5000, "[" + "9" * 5000 + "]", "[{}]", "[{[]: 1}]", "[\0]", '"' * 9]


def reads_or_refuses(raw: dict[str, Any]) -> None:
    """Any exception but UserError fails the test."""
    try:
        parsed = Hyperparameters.parse({"instance_prompt": PROMPT, **raw})
    except UserError:
        pass
    else:
        assert Hyperparameters.model_validate(parsed.model_dump()) == parsed


@given(st.dictionaries(names, st.text(max_size=40) | st.sampled_from(NASTY), max_size=4))
def test_no_dictionary_of_strings_is_worth_a_traceback(raw: dict[str, Any]) -> None:
    reads_or_refuses(raw)


@given(st.dictionaries(names, values_of_json, max_size=4), st.sampled_from([lambda v: v, str, json.dumps]))
def test_no_json_is_worth_a_traceback(raw: dict[str, Any], sdk: Any) -> None:
    reads_or_refuses({name: sdk(value) for name, value in raw.items()})


@pytest.mark.parametrize("name", list(FIELDS))
def test_nasty_values_of_every_field(name: str) -> None:
    for value in NASTY:
        reads_or_refuses({name: value})


# What is long, large or secret


def test_a_problem_of_another_knob_is_told_although_it_names_a_refused_one() -> None:
    told = problems({"class_prompt": "photo of a toy", "attention": "sdpa", "use_cpu": "1", "optimizer": "adamw8bit"})
    assert sorted(line.split(" ")[0].split(":")[0] for line in told) == ["attention", "instance_prompt", "use_cpu=true"]
    # This one names "instance_prompt" in its advice, and says nothing about the refused "prior".
    told = problems({"prior": "none", "class_prompt": PROMPT, "instance_prompt": PROMPT})
    assert len(told) == 2
    assert any("are the same" in line for line in told)


def test_a_problem_that_a_refused_value_makes_is_not_told() -> None:
    (line,) = problems({"concepts_list": '[{"instance_promt": "a"}]'})
    assert "is not a key of a concept" in line


@pytest.mark.parametrize("name", INTEGERS)
def test_counts_have_an_upper_limit(name: str) -> None:
    line = problem(**{name: 10**30})
    assert line.startswith(f"{name}: ")
    assert "at most" in line


@pytest.mark.parametrize("name", ["num_class_images", "train_batch_size", "num_validation_images", "max_train_steps"])
def test_a_thousand_million_is_no_count(name: str) -> None:
    assert "at most" in problem(**{name: 10**9})


def seconds_of(call: Any) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


@pytest.mark.parametrize(
    "read",
    [
        lambda length: unescape_prompt("\\" * length + "x"),
        lambda length: problems({"\\" * length: "1"}),
        lambda length: problems({"learning_rate" * (length // 13): "1"}),
        lambda length: problems({f"learning_rat{number}": "1" for number in range(length // 10)}),
        lambda length: parse(instance_prompt='"' * length + "x"),
    ],
)
def test_long_values_take_time_in_proportion(read: Any) -> None:
    """Sixteen times the length; a quadratic routine takes 256 times the time."""
    short = min(seconds_of(lambda: read(4_000)) for _ in range(3))
    assert seconds_of(lambda: read(64_000)) < 80 * max(short, 0.002)


@pytest.mark.parametrize("url", ["https://me:hunter2@s3.example.com", "http://token@host:9000", "https://a:b@c@host"])
def test_an_address_with_a_password_is_refused_and_not_repeated(url: str) -> None:
    line = problem(s3_endpoint_url=url)
    assert "s3_endpoint_url holds a user's name or password" in line
    for word in ("hunter2", "token@", "b@c"):
        assert word not in line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("toy-box", "did you mean toybox?"),
        ("Toybox", "did you mean toybox?"),
        ("toybox_flow", "did you mean toybox-flow?"),
        ("stable diffusion 1.5", "owner/name"),
        ("a/b/c", "owner/name"),
        ("owner//name", "owner/name"),
        ("owner/na..me", "owner/name"),
        ("stable-diffusion-v1-5", "owner/name"),
        ("owner/name?x=1", "owner/name"),
    ],
)
def test_names_that_no_base_model_can_have(name: str, said: str) -> None:
    line = problem(pretrained_model_name_or_path=name)
    assert line.startswith(f"pretrained_model_name_or_path: {name!r} is neither a path that exists nor")
    assert said in line


@pytest.mark.parametrize(
    "name", ["toybox", "runwayml/stable-diffusion-v1-5", "./model", "/opt/x", "s3://abc/d", "tests"]
)
def test_names_that_a_base_model_may_have(name: str) -> None:
    assert parse(pretrained_model_name_or_path=name).pretrained_model_name_or_path == name


def test_every_knob_says_whether_a_resumed_job_may_change_it() -> None:
    kinds = {name: meaning(field).resume for name, field in FIELDS.items()}
    assert set(kinds.values()) == {"same", "free"}
    for name in ("prediction_type", "snr_gamma", "hflip", "ema_decay", "sample_guidance_scale", "max_token_length"):
        assert kinds[name] == "same"


# The schema as documents show it


def test_the_docs_hold_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "hyperparameters.md"
    assert page.read_text(encoding="utf-8").strip() == f"# Hyperparameters\n\n{markdown_table(Hyperparameters)}", (
        "renew it: python -m dreambooth_sm.hyperparameters > docs/hyperparameters.md"
    )


def test_the_table_has_a_row_for_every_knob() -> None:
    rows = [
        line.split("|")[1].strip(" `")
        for line in markdown_table(Hyperparameters).splitlines()
        if line.startswith("| `")
    ]
    assert rows == list(FIELDS)
    assert all(field.description for field in FIELDS.values())


@pytest.mark.parametrize(
    "module",
    ["launcher", *(f"dreambooth_sm.{name}" for name in ("hyperparameters", "families", "methods", "planning.table"))],
)
def test_the_light_ends_import_neither_torch_nor_numpy(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'numpy', 'diffusers', 'sagemaker'}} & sys.modules.keys()))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("values", "target"),
    [
        ({}, None),
        ({"manual_upload_model_path": "s3://models/toy"}, "s3://models/toy"),
        ({"manual_upload_model_path": "s3://models/toy", "output_mode": "direct"}, "s3://models/toy"),
        ({"output_mode": "archive"}, None),
        ({"output_mode": "uncompressed"}, None),
    ],
)
def test_the_model_leaves_one_way(values: dict[str, str], target: str | None) -> None:
    assert Hyperparameters.parse({"instance_prompt": "photo of zwx toy", **values}).upload_target == target


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"output_mode": "direct"}, "output_mode=direct needs manual_upload_model_path"),
        (
            {"output_mode": "archive", "manual_upload_model_path": "s3://models/toy"},
            "leave manual_upload_model_path out",
        ),
        ({"s3_tags": "team"}, None),
        ({"s3_tags": "aws:team=1"}, "s3_tags"),
        ({"s3_tags": "a=1,a=2"}, "s3_tags"),
        ({"s3_tags": "a=<1>"}, "s3_tags"),
        ({"s3_tags": ",".join(f"t{n}=1" for n in range(11))}, "at most 10"),
        ({"s3_endpoint_url": "minio:9000"}, "https://host:port"),
        ({"s3_acl": "everyone"}, "s3_acl"),
    ],
)
def test_output_options_are_checked(values: dict[str, str], hint: str | None) -> None:
    if hint is None:
        Hyperparameters.parse({"instance_prompt": "photo of zwx toy", **values})
        return
    with pytest.raises(UserError, match=hint):
        Hyperparameters.parse({"instance_prompt": "photo of zwx toy", **values})


def test_s3_options() -> None:
    parsed = Hyperparameters.parse(
        {
            "instance_prompt": "photo of zwx toy",
            "s3_kms_key_id": "key-1",
            "s3_tags": "team=toys, für = x",
            "s3_storage_class": "glacier_ir",
            "s3_requester_pays": "True",
        }
    )
    assert parsed.s3_options == S3Options("key-1", None, {"team": "toys", "für": "x"}, "GLACIER_IR", True)
