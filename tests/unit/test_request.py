"""The request of a training job: what SageMaker refuses is refused before, and all at once."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth_sm.data.concepts import read_concepts
from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.printing import redact
from dreambooth_sm.report import MEASURES, TRAINING_METRICS, Reporter
from dreambooth_sm.storage import S3Uri
from launcher.resources import Resources
from launcher.training_request import (
    CONCEPTS_FILE,
    find_secrets,
    metric_definitions,
    move_long_values,
    training_request,
)
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
VPC = ("subnet-0a", "sg-0b")
# Put together here, so that nobody takes this file for a leak.
HF_TOKEN = "hf_" + "aBcDeFgHiJ" * 3
AWS_KEY = "AKIA" + "ABCDEFGHIJKLMNOP"
# Values that are right and values that are not; a few of them at a time leave some requests whole.
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "instance_type": st.sampled_from(["ml.g5.xlarge", "ml.p3.2xlarge", "ml.m5.large", "ml.p6-b200.48xlarge", "ml.x"]),
    "instance_count": st.integers(1, 4),
    "max_minutes": st.integers(1, 28 * 24 * 60),
    "max_wait_minutes": st.integers(1, 28 * 24 * 60),
    "spot": st.booleans(),
    "keep_alive": st.integers(0, 3600),
    "output": st.sampled_from(["s3://models/out", "s3://models", "s3://models/" + "x" * 1100, "models/out"]),
    "checkpoint": st.sampled_from(["s3://models/checkpoints", "s3://m"]),
    "compression": st.booleans(),
    "name": st.from_regex(r"[a-z0-9-]{0,70}", fullmatch=True) | st.text(max_size=8),
    "bucket": st.text("ab-.", max_size=64),
    "role": st.sampled_from([RESOURCES["role"], "train", "arn:aws-cn:iam::123456789012:role/a+b=c,d.e@f"]),
    "image_uri": st.sampled_from([RESOURCES["image_uri"], "x" * 300, "a\nb"]),
    "vpc": st.lists(st.sampled_from(["subnet-0a", "subnet-0c", "sg-0b", "sg-0d", "vpc-1"]), max_size=20).map(tuple),
    "kms": st.sampled_from(["1234abcd", "arn:aws:kms:us-west-2:123456789012:key/1", "alias/a b"]),
    "network_isolation": st.booleans(),
    "environment": st.dictionaries(st.text("AB_é1", max_size=4), st.text(max_size=600), max_size=110),
    "tags": st.dictionaries(st.text(max_size=200), st.text(max_size=300), max_size=60),
    "volume_gb": st.integers(1, 16384),
}
OPTIONS = st.sets(st.sampled_from(sorted(VALUES)), max_size=4).flatmap(
    lambda names: st.fixed_dictionaries({name: VALUES[name] for name in sorted(names)})
)


def hyperparameters(**values: object) -> Hyperparameters:
    return Hyperparameters.parse({**PROMPTS, **values})


def make(
    channels: dict[str, S3Uri] | None = None, values: dict[str, object] | None = None, **resources: object
) -> dict[str, Any]:
    return training_request(
        hyperparameters(**(values or {})),
        Resources.parse({**RESOURCES, **resources}),
        CHANNELS if channels is None else channels,
    )


def test_the_plainest_job_is_one_that_sagemaker_takes() -> None:
    request = make()
    assert refusals("CreateTrainingJob", request) == []
    assert request["HyperParameters"] == PROMPTS
    assert request["OutputDataConfig"] == {"S3OutputPath": "s3://models/dreambooth-sm/jobs", "CompressionType": "NONE"}
    assert request["CheckpointConfig"] == {"S3Uri": "s3://models/dreambooth-sm/checkpoints/zwx"}
    assert request["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] == "s3://models/pictures/"


def test_a_job_with_everything_is_one_that_sagemaker_takes() -> None:
    request = make(
        values={"pretrained_model_name_or_path": "/opt/ml/input/data/model"},
        instance_type="ml.p3.2xlarge",
        instance_count=2,
        spot=True,
        max_minutes=60,
        max_wait_minutes=90,
        output="s3://models/zwx",
        checkpoint="s3://models/earlier",
        vpc=list(VPC),
        kms="1234abcd",
        network_isolation=True,
        environment={"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:32", "TOKENIZERS_PARALLELISM": "false"},
        tags={"team": "toys"},
        volume_gb=80,
    )
    assert refusals("CreateTrainingJob", request) == []
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 5400}
    assert request["ResourceConfig"] == {
        "InstanceType": "ml.p3.2xlarge",
        "InstanceCount": 2,
        "VolumeSizeInGB": 80,
        "VolumeKmsKeyId": "1234abcd",
    }
    assert request["OutputDataConfig"]["S3OutputPath"] == "s3://models/zwx"
    assert request["VpcConfig"] == {"SecurityGroupIds": ["sg-0b"], "Subnets": ["subnet-0a"]}


def test_every_value_is_encoded_as_the_job_reads_it() -> None:
    values = {"train_text_encoder": False, "learning_rate": 1e-6, "max_train_steps": 400, "snr_gamma": None}
    request = make(values=values)
    assert all(isinstance(value, str) for value in request["HyperParameters"].values())
    assert Hyperparameters.parse(request["HyperParameters"]) == hyperparameters(**values)


def test_disks_of_their_own_have_no_key() -> None:
    assert "VolumeKmsKeyId" not in make(kms="1234abcd")["ResourceConfig"]


def test_a_model_that_the_job_uploads_is_not_packed_as_well() -> None:
    request = make(values={"manual_upload_model_path": "s3://models/zwx"}, output="s3://models/zwx")
    assert request["OutputDataConfig"]["S3OutputPath"] == "s3://models/dreambooth-sm/jobs"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "zwx_1"}, "not the name of a job"),
        ({"name": "-zwx"}, "not the name of a job"),
        ({"name": "z" * 64}, "not the name of a job"),
        ({"role": "train"}, "not the ARN of a role"),
        ({"image_uri": "x" * 256}, "not an image"),
        ({"instance_type": "ml.g5.xlage"}, "ml.g5.xlarge"),
        ({"instance_type": "ml.trn1.2xlarge"}, "no instance type that this job can run on"),
        ({"bucket": "Models"}, "is not a bucket name"),
        ({"output": "models/zwx"}, "output: 'models/zwx' is not an S3 URI"),
        ({"checkpoint": "models/zwx"}, "checkpoint: 'models/zwx' is not an S3 URI"),
        ({"output": "s3://models/" + "x" * 1020}, "less than 1024"),
        ({"max_wait_minutes": 90}, "is for spot=True"),
        ({"spot": True, "max_minutes": 60, "max_wait_minutes": 59}, "less than max_minutes=60"),
        ({"spot": True, "keep_alive": 60}, "can't keep its instance"),
        ({"volume_gb": 100}, "disks of its own"),
        ({"kms": "my key"}, "not the id or ARN of a KMS key"),
        ({"vpc": ["subnet-0a"]}, "1 subnets and 0 security groups"),
        ({"vpc": ["subnet-0a", "sg-0b", "vpc-0c"]}, "'vpc-0c'"),
        ({"vpc": ["subnet-0a", *(f"sg-{n}" for n in range(6))]}, "6 security groups"),
        ({"environment": {f"V{n}": "" for n in range(101)}}, "at most 100, and this one has 101"),
        ({"environment": {"A-B": ""}}, "not the name of a variable"),
        ({"environment": {"A": "x" * 513}}, "longer than 512"),
        ({"tags": {f"t{n}": "" for n in range(51)}}, "at most 50"),
        ({"tags": {"": "x"}}, "tags: ''"),
        ({"tags": {"a": "x" * 257}}, "tags: 'a'"),
        ({"tags": {"a": "b;c"}}, "tags: 'a'"),
        ({"tags": {"aws:x": "y"}}, "AWS's own"),
        ({"channels": {}}, "1 to 20 input channels, and this one 0"),
        ({"channels": {f"c{n}": S3Uri("models") for n in range(21)}}, "this one 21"),
        ({"channels": {"a b": S3Uri("models")}}, "channel 'a b'"),
        ({"channels": {"images": S3Uri("models", "x" * 1024)}}, "channel images"),
        ({"values": {"revision": "x" * 257}}, "revision has 257 characters"),
        ({"values": {"revision": "a\nb"}}, "holds a line break"),
        ({"values": {"manual_upload_model_path": "s3://models/x"}, "network_isolation": True}, "can't reach S3 itself"),
        ({"values": {"output_mode": "archive"}}, "output_mode=archive and compression=False"),
        ({"values": {"output_mode": "uncompressed"}, "compression": True}, "output_mode=uncompressed and compression"),
        ({"network_isolation": True}, "can't fetch pretrained_model_name_or_path=stable-diffusion-v1-5"),
        ({"values": {"pretrained_vae_name_or_path": "a/b"}, "network_isolation": True}, "pretrained_vae_name_or_path"),
        ({"values": {"class_cache": "s3://models/cache"}, "network_isolation": True}, "class_cache"),
        ({"values": {"fidelity_encoders": "dino=a/b"}, "network_isolation": True}, "fidelity_encoders=dino=a/b"),
        ({"environment": {"HF_TOKEN": "x"}}, "HF_TOKEN is the name of a secret"),
        ({"environment": {"A": HF_TOKEN}}, "request.Environment.A holds a secret"),
        ({"tags": {"key": AWS_KEY}}, "holds a secret"),
        ({"values": {"model_name": HF_TOKEN}}, "request.HyperParameters.model_name holds a secret"),
    ],
)
def test_each_rule_is_told(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        make(**change)
    assert any(words in problem for problem in caught.value.problems)
    assert HF_TOKEN not in str(caught.value)
    assert AWS_KEY not in str(caught.value)


def test_everything_is_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        make(name="_", role="", spot=True, keep_alive=1, volume_gb=1, vpc=["x"], tags={"": ""})
    assert len(caught.value.problems) == 6


def test_what_is_no_option_is_told_with_what_would_be() -> None:
    with pytest.raises(UserError) as caught:
        Resources.parse({"keep_alive": 3601, "instance_count": 0, "spot": "yes", "tags": "a=b", "vpc": "subnet-1"})
    assert caught.value.problems == [
        "instance_count: this value is not valid; set a whole number, at least 1",
        "spot: this value is not valid; set true or false",
        "keep_alive: this value is not valid; set a whole number, at least 0, at most 3600",
        "vpc: this value is not valid; set a list of subnet-... and sg-...",
        "tags: this value is not valid; set names and values, as a dictionary or NAME=VALUE",
    ]


@settings(max_examples=300)
@given(options=OPTIONS, prompt=st.text("a \\é\n", min_size=1, max_size=300))
def test_what_passes_here_passes_there(options: dict[str, Any], prompt: str) -> None:
    problems = Problems()
    resources = Resources.read({**RESOURCES, **options}, problems)
    try:
        h, _ = move_long_values(hyperparameters(instance_prompt=prompt))
        request = training_request(h, resources, CHANNELS)
    except UserError:
        return
    assert refusals("CreateTrainingJob", request) == []
    assert all(len(value) <= 256 for value in request["HyperParameters"].values())
    json.dumps(request)


def test_a_metrics_line_of_the_job_holds_every_metric() -> None:
    stream = io.StringIO()
    values: dict[str, object] = {name: 10**-n / 3 for n, name in enumerate(TRAINING_METRICS)}
    Reporter(stream).metrics(**values)
    for definition in metric_definitions():
        (number,) = re.findall(definition["Regex"], stream.getvalue())
        assert float(number) == pytest.approx(values[definition["Name"]], rel=1e-3)


def test_a_job_that_measures_its_model_says_so() -> None:
    names = [
        definition["Name"]
        for definition in make(values={"fidelity_encoders": "judge"})["AlgorithmSpecification"]["MetricDefinitions"]
    ]
    assert names == [*TRAINING_METRICS, *MEASURES]
    plain = make()["AlgorithmSpecification"]["MetricDefinitions"]
    assert [definition["Name"] for definition in plain] == list(TRAINING_METRICS)


def test_prompts_that_are_too_long_go_into_a_file(tmp_path: Any) -> None:
    prompt = "photo of zwx toy, " + "very " * 60 + "old"
    before = hyperparameters(instance_prompt=prompt, max_train_steps=10)
    after, content = move_long_values(before)
    assert content is not None
    assert all(len(value) <= 256 for value in after.to_sagemaker().values())
    assert "instance_prompt" not in after.to_sagemaker()
    file = tmp_path / CONCEPTS_FILE
    file.write_text(content, encoding="utf-8")
    (concept,) = read_concepts(after.model_copy(update={"concepts_list": str(file)})).inline_concepts
    assert concept.instance_prompt == prompt
    assert concept.class_prompt == "photo of a toy"
    assert after.max_train_steps == 10


def test_short_prompts_stay_where_they_are() -> None:
    assert move_long_values(hyperparameters()) == (hyperparameters(), None)


def test_secrets_of_the_environment_are_found_and_hidden() -> None:
    environment = {"MY_API_TOKEN": "correct-horse-battery", "HOME": "/home/somebody", "SHORT_TOKEN": "abc"}
    request = {"Tags": [{"Key": "note", "Value": "see correct-horse-battery"}]}
    (problem,) = find_secrets(request, environment)
    assert problem.startswith("request.Tags[0].Value holds a secret")
    assert "horse" not in problem
    assert redact("see correct-horse-battery in /home/somebody", environment) == "see *** in /home/somebody"
    assert redact(f"token {HF_TOKEN}, key {AWS_KEY}", {}) == "token ***, key ***"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:hunter2@s3.example.com/x", "https://***@s3.example.com/x"),
        ('connect to "http://me:p@ss@[::1]:9000/" failed', 'connect to "http://***@[::1]:9000/" failed'),
        ("proxy http://token@proxy:8080", "proxy http://***@proxy:8080"),
        ("mail me@example.com about https://example.com/a@b", "mail me@example.com about https://example.com/a@b"),
    ],
)
def test_passwords_of_addresses_are_not_shown(text: str, shown: str) -> None:
    assert redact(text, {}) == shown


def test_an_address_with_a_password_is_a_secret() -> None:
    endpoint = {"HyperParameters": {"s3_endpoint_url": "https://me:hunter2@s3.example.com"}}
    (problem,) = find_secrets(endpoint)
    assert problem.startswith("request.HyperParameters.s3_endpoint_url holds a secret")
    assert "hunter2" not in problem
    assert find_secrets({"HyperParameters": {"s3_endpoint_url": "https://s3.example.com:9000"}}) == []
