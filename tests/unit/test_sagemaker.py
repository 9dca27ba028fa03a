"""The platform's contract: what a container finds under /opt/ml, and what it leaves there."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreambooth_sm import sagemaker
from dreambooth_sm.errors import UserError
from dreambooth_sm.sagemaker import Contract, read_contract, write_failure
from tests.helpers.patience import PATIENCE

HYPERPARAMETERS = {"instance_prompt": "photo of zwx toy", "use_ema": "True"}
RESOURCES = {
    "current_host": "algo-2",
    "current_instance_type": "ml.g5.xlarge",
    "hosts": ["algo-1", "algo-2"],
    "network_interface_name": "eth0",
    "instance_groups": [],
}
CHANNELS = {"images": {"TrainingInputMode": "File"}, "model": {"TrainingInputMode": "FastFile"}}
FILES = {
    "hyperparameters.json": HYPERPARAMETERS,
    "resourceconfig.json": RESOURCES,
    "inputdataconfig.json": CHANNELS,
}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("TRAINING_JOB_NAME", raising=False)
    config = tmp_path / "input" / "config"
    config.mkdir(parents=True)
    for name, content in FILES.items():
        (config / name).write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def test_a_whole_contract(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINING_JOB_NAME", "toy-1")
    assert read_contract(base) == Contract(
        base=base,
        hyperparameters=HYPERPARAMETERS,
        channels={"images": base / "input/data/images", "model": base / "input/data/model"},
        current_host="algo-2",
        hosts=("algo-1", "algo-2"),
        instance_type="ml.g5.xlarge",
        job_name="toy-1",
        network_interface="eth0",
    )


def test_a_trial_has_checkpoints_of_its_own(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINING_JOB_NAME", "toy-001")
    assert read_contract(base).checkpoint_directory == base / "checkpoints"
    tuned = json.dumps({**HYPERPARAMETERS, "_tuning_objective_metric": "score"})
    (base / "input/config/hyperparameters.json").write_text(tuned, encoding="utf-8")
    assert read_contract(base).checkpoint_directory == base / "checkpoints" / "toy-001"


def test_hyperparameters_are_needed_unless_the_command_line_has_them(base: Path) -> None:
    (base / "input/config/hyperparameters.json").unlink()
    with pytest.raises(UserError, match=r"hyperparameters\.json is missing"):
        read_contract(base)
    contract = read_contract(base, need_hyperparameters=False)
    assert contract.hyperparameters == {}
    assert contract.hosts == ("algo-1", "algo-2")


def test_without_the_other_files_the_job_is_one_local_host(base: Path) -> None:
    (base / "input/config/resourceconfig.json").unlink()
    (base / "input/config/inputdataconfig.json").unlink()
    assert read_contract(base) == Contract(base=base, hyperparameters=HYPERPARAMETERS)
    assert not read_contract(base).has_gpu_instance


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "can't be read as JSON"),
        (b'{"a": ', "can't be read as JSON"),
        (b"\xff\xfe{}", "can't be read as JSON"),
        (b"[]", "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
    ],
)
def test_a_broken_file_is_named(base: Path, name: str, content: bytes, said: str) -> None:
    (base / "input/config" / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_contract(base, need_hyperparameters=False)
    (line,) = caught.value.problems
    assert name in line
    assert said in line


def test_all_broken_files_are_named_at_once(base: Path) -> None:
    for name in FILES:
        (base / "input/config" / name).write_text("{")
    with pytest.raises(UserError) as caught:
        read_contract(base)
    assert [name in line for name, line in zip(FILES, caught.value.problems, strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("resources", "hosts", "current"),
    [
        ({}, ("algo-1",), "algo-1"),
        ({"hosts": []}, ("algo-1",), "algo-1"),
        ({"hosts": ["algo-1"]}, ("algo-1",), "algo-1"),
        ({"hosts": ["algo-1", "algo-2"], "current_host": "algo-2"}, ("algo-1", "algo-2"), "algo-2"),
    ],
)
def test_hosts(base: Path, resources: dict[str, object], hosts: tuple[str, ...], current: str) -> None:
    (base / "input/config/resourceconfig.json").write_text(json.dumps(resources))
    contract = read_contract(base)
    assert (contract.hosts, contract.current_host) == (hosts, current)


@pytest.mark.parametrize("current", ["algo-3", 7, ["algo-1"]])
def test_a_host_that_is_not_among_the_hosts_is_told(base: Path, current: object) -> None:
    resources = {"hosts": ["algo-1", "algo-2"], "current_host": current}
    (base / "input/config/resourceconfig.json").write_text(json.dumps(resources))
    with pytest.raises(UserError, match=r"current_host .* is not one of hosts"):
        read_contract(base)


@pytest.mark.parametrize(
    ("instance_type", "expected"),
    [("ml.g4dn.xlarge", True), ("ml.p4d.24xlarge", True), ("ml.m5.large", False), ("ml.c5.xlarge", False), ("", False)],
)
def test_instance_types_with_a_gpu(instance_type: str, expected: bool) -> None:
    assert Contract(Path("/opt/ml"), instance_type=instance_type).has_gpu_instance is expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/opt/ml", "/base"),
        ("/opt/ml/", "/base"),
        ("/opt/ml/input/data/images/", "/base/input/data/images"),
        ("/opt/mlx/model", "/opt/mlx/model"),
        ("/opt", "/opt"),
        ("opt/ml/model", "opt/ml/model"),
        ("owner/model", "owner/model"),
        ("s3://bucket/opt/ml", "s3://bucket/opt/ml"),
    ],
)
def test_standard_paths_move_with_the_base_and_others_stay(path: str, expected: str) -> None:
    assert Contract(Path("/base")).localize(path) == expected


def test_standard_paths_stay_in_a_container() -> None:
    assert Contract(Path("/opt/ml")).localize("/opt/ml/model/") == "/opt/ml/model"


def test_the_base_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", "/elsewhere")
    assert sagemaker.base_directory() == Path("/elsewhere")
    for unset in ("", None):
        monkeypatch.delenv("SAGEMAKER_BASE_DIR")
        if unset is not None:
            monkeypatch.setenv("SAGEMAKER_BASE_DIR", unset)
        assert sagemaker.base_directory() == Path("/opt/ml")
        monkeypatch.setenv("SAGEMAKER_BASE_DIR", "/elsewhere")


@pytest.mark.parametrize("letter", ["a", "ü", "字", "🦆"])
@pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 5000])
def test_the_failure_file_holds_at_most_1024_characters(tmp_path: Path, letter: str, length: int) -> None:
    write_failure(tmp_path, letter * length)
    written = (tmp_path / "output" / "failure").read_bytes().decode("utf-8")
    if length <= 1024:
        assert written == letter * length
    else:
        assert len(written) == 1024
        assert written == letter * 1022 + " …"


def test_a_file_name_that_is_no_utf_8_does_not_cost_the_reason(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    write_failure(tmp_path, f"{name} is damaged")
    assert (tmp_path / "output" / "failure").read_text(encoding="utf-8") == "caf\\udce9.jpg is damaged"


def test_a_reason_carries_no_password_and_no_command(tmp_path: Path) -> None:
    write_failure(tmp_path, "https://me:hunter2@host \x1b[2J\nstep=1 loss=0")
    assert (tmp_path / "output" / "failure").read_text() == "https://***@host \\x1b[2J\nstep=1 loss=0"


@pytest.mark.usefixtures("_sigterm_restored", "terminal")
def test_a_closed_terminal_asks_for_a_stop() -> None:
    stop = sagemaker.stop_event()
    signal.raise_signal(signal.SIGHUP)
    assert stop.wait(5)


@pytest.mark.usefixtures("_sigterm_restored")
def test_under_nohup_the_terminal_does_not_matter() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = sagemaker.stop_event()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.is_set()


def test_a_second_reason_replaces_the_first(tmp_path: Path) -> None:
    write_failure(tmp_path, "long " * 100)
    write_failure(tmp_path, "short")
    assert (tmp_path / "output" / "failure").read_text() == "short"


@pytest.fixture
def _sigterm_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_sigterm_restored")
def test_sigterm_asks_for_a_stop_and_ends_nothing() -> None:
    stop = sagemaker.stop_event()
    assert not stop.is_set()
    signal.raise_signal(signal.SIGTERM)
    assert stop.wait(PATIENCE)
