"""Several processes that train together: on one host, and on two hosts that meet over the network."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.local.s3 import EmbeddedS3
from tests.helpers.jobs import Ended, JobTree, end, read_until, read_weights, same_weights

# With a seed, and without clipping by a norm that sums in another order; images drawn by each process.
JOB = {"max_train_steps": "6", "logging_steps": "1", "num_class_images": "3", "seed": "5", "save_steps": "3"}
# Where class images, which take long to make, are not what it is about.
NO_CLASS = {"class_prompt": "None"}


def losses(ended: Ended) -> list[float]:
    assert ended.code == 0, ended.log
    return [float(pairs["loss"]) for pairs in ended.steps]


@pytest.fixture(scope="module")
def one_process(
    tiny_base: Path, pictures: Path, s3: EmbeddedS3, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses of one process that takes the whole global batch."""
    channels = {"images": pictures, "model": tiny_base}
    base = tmp_path_factory.mktemp("one") / "opt-ml"
    return losses(JobTree.lay_out(base, JOB | {"train_batch_size": "2"}, channels, s3.environment()).run("train"))


def test_two_processes_train_like_one_with_the_whole_batch(
    lay_out_job: Callable[..., JobTree], one_process: list[float]
) -> None:
    """Also of a length in epochs, which two share at twice the rate."""
    shared = JOB | {"max_train_steps": "None", "num_train_epochs": "6", "learning_rate": "5e-4"}
    tree = lay_out_job("two", **shared, train_batch_size="1", num_processes="2")
    ended = tree.run("train")
    assert losses(ended) == pytest.approx(one_process, rel=2e-3)
    assert "2 processes take 6 steps where one takes 12, at 2 times its learning rate; set" in ended.log
    assert ended.log.count("phase=train state=started") == 1, "only one process reports"
    assert "processes=2" in ended.log
    drawn = sorted(path.name for path in tree.base.rglob("class-*.safetensors"))
    assert len(drawn) == len(set(drawn)) == 3, "class images are shared out without repeats"
    assert (tree.model / "model_index.json").is_file()
    assert tree.checkpoints == ["step-00000003", "step-00000006"]


def test_text_encoder_and_accumulation_over_processes(lay_out_job: Callable[..., JobTree]) -> None:
    """The lineage dropped the text encoder's training without a word in this case."""
    options = {**JOB, "train_text_encoder": "true", "gradient_accumulation_steps": "2", "learning_rate": "1e-3"}
    one = lay_out_job("one", **options, train_batch_size="2")
    expected = losses(one.run("train"))
    two = lay_out_job("two", **options, train_batch_size="1", num_processes="2")
    assert losses(two.run("train")) == pytest.approx(expected, rel=2e-3)
    base = read_weights(two.base / "input" / "data" / "model", "text_encoder")
    trained = [read_weights(tree.model, "text_encoder") for tree in (one, two)]
    name = "encoder.layers.0.mlp.fc1.weight"
    moved = [(weights[name].float() - base[name].float()) for weights in trained]
    assert moved[0].norm() > 0.01
    assert (moved[0] - moved[1]).norm() < 0.1 * moved[0].norm()


def test_two_hosts_meet(lay_out_job: Callable[..., JobTree], one_process: list[float]) -> None:
    names = ["127.0.0.1", "localhost"]
    trees = [lay_out_job(name, **JOB, train_batch_size="1") for name in names]
    for tree, name in zip(trees, names, strict=True):
        tree.write("input/config/resourceconfig.json", json.dumps({"current_host": name, "hosts": names}))
    processes = [tree.start("train") for tree in trees]
    first, second = (end(process) for process in processes)
    assert losses(first) == pytest.approx(one_process, rel=2e-3)
    assert second.code == 0, second.log
    assert second.steps == []
    assert (trees[0].model / "model_index.json").is_file()
    assert list(trees[1].model.iterdir()) == [], "only the first host hands the model over"


def test_a_stopped_job_is_resumed(lay_out_job: Callable[..., JobTree]) -> None:
    options = {**JOB, "max_train_steps": "24", "save_steps": "0", "num_processes": "2", **NO_CLASS}
    whole = lay_out_job("whole", **options)
    assert whole.run("train").code == 0
    tree = lay_out_job("stopped", **options)
    process = tree.start("train")
    log = read_until(process, r"step=2 ")
    process.send_signal(signal.SIGTERM)
    ended = end(process, log)
    assert ended.code == 143, ended.log
    assert len(tree.checkpoints) == 1
    assert tree.run("train").code == 0
    assert same_weights(read_weights(tree.model, "unet"), read_weights(whole.model, "unet"))


def test_bad_input_is_reported_once_and_ends_every_process(lay_out_job: Callable[..., JobTree]) -> None:
    tree = lay_out_job("bad", **JOB, num_processes="2", instance_prompt="zwx " * 100)
    ended = tree.run("train")
    assert ended.code == 2, ended.log
    assert tree.failure is not None
    assert "max_token_length" in tree.failure
    assert "Traceback" not in ended.log


def test_a_killed_process_ends_the_job(lay_out_job: Callable[..., JobTree]) -> None:
    tree = lay_out_job("killed", **JOB | NO_CLASS | {"max_train_steps": "100000"}, num_processes="2")
    process = tree.start("train")
    read_until(process, r"step=2 ")
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert end(process).code != 0
