"""Jobs in the image, as the platform runs it and stricter: read-only, another user, no capabilities, no network."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_STOPPED
from dreambooth_sm.toybox import BASE
from dreambooth_sm.training.checkpoint import latest_checkpoint
from tests.helpers.containers import ROOT, STRICT, TAG, build, docker, mounts, needs_engine, running
from tests.helpers.hub import Hub
from tests.helpers.jobs import JobTree, end, read_until, read_weights

pytestmark = needs_engine


def test_toybox_is_fine_tuned_without_a_network(image: str, lay_out_job: Callable[..., JobTree]) -> None:
    job = lay_out_job(pretrained_model_name_or_path="toybox", resolution="128", class_prompt="None")
    with running(*STRICT, *mounts(job.base), image, "train") as container:
        ended = end(container.process)
    assert ended.code == EXIT_OK, ended.log
    assert [step["step"] for step in ended.steps] == ["1", "2"]
    assert all(tensor.isfinite().all() for tensor in read_weights(job.model, "unet").values())


def test_sigterm_reaches_the_job(image: str, lay_out_job: Callable[..., JobTree]) -> None:
    job = lay_out_job(max_train_steps="5000", class_prompt="None")
    with running(*STRICT, *mounts(job.base), image, "train") as container:
        log = read_until(container.process, r"step=2 ")
        container.process.send_signal(signal.SIGTERM)  # which `docker run` passes on to the container
        ended = end(container.process, log)
    assert ended.code == EXIT_STOPPED, ended.log
    checkpoint = latest_checkpoint(job.base / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == int(ended.steps[-1]["step"])


def test_out_of_memory_leaves_checkpoints_to_resume_from(image: str, lay_out_job: Callable[..., JobTree]) -> None:
    job = lay_out_job(max_train_steps="5000", save_steps="2", class_prompt="None")
    memory = ["--memory=700m", "--memory-swap=700m"]
    with running(*STRICT, *memory, *mounts(job.base), image, "train") as container:
        log = read_until(container.process, r"^checkpoint=")
        # Another process takes the memory, and the kernel ends the job for it, at whatever it is doing.
        docker("exec", container.name, "sh", "-c", "echo 1000 >/proc/1/oom_score_adj; python -c 'b\"x\" * 2**30'")
        killed = end(container.process, log)
    assert killed.code == 128 + signal.SIGKILL, killed.log
    checkpoint = latest_checkpoint(job.base / "checkpoints")
    assert checkpoint is not None
    job.set(max_train_steps=str(checkpoint.step + 2))
    with running(*STRICT, *mounts(job.base), image, "train") as container:
        ended = end(container.process)
    assert ended.code == EXIT_OK, ended.log
    assert [int(step["step"]) for step in ended.steps] == [checkpoint.step + 1, checkpoint.step + 2]
    assert read_weights(job.model, "unet")


def test_too_little_memory_is_an_exit_code_and_no_model(image: str, lay_out_job: Callable[..., JobTree]) -> None:
    job = lay_out_job()
    with running(*STRICT, "--memory=96m", "--memory-swap=96m", *mounts(job.base), image, "train") as container:
        killed = end(container.process)
    assert killed.code == 128 + signal.SIGKILL, killed.log
    assert not list(job.model.iterdir())


def test_it_serves_what_lies_in_opt_ml_model(image: str, tmp_path: Path) -> None:
    """As strictly as it trains, and without a network: the loopback interface is all there is."""
    shutil.copytree(BASE, tmp_path / "model")
    ask = """
import json, urllib.request as http
assert http.urlopen("http://127.0.0.1:8080/ping").status == 200
asked = json.dumps({"prompt": "photo of a hat", "steps": 2}).encode()
headers = {"Content-Type": "application/json", "Accept": "image/png"}
print(http.urlopen(http.Request("http://127.0.0.1:8080/invocations", asked, headers)).read()[:4])
"""
    with running(*STRICT, *mounts(tmp_path), image, "serve") as container:
        log = read_until(container.process, "^ready: ")
        asked = docker("exec", container.name, "python", "-c", ask)
        container.process.send_signal(signal.SIGTERM)
        ended = end(container.process, log)
    assert asked.stdout.strip() == repr(b"\x89PNG"), asked.stderr
    assert ended.code == EXIT_OK, ended.log


def test_serve_without_a_model_ends_with_one_line(image: str, tmp_path: Path) -> None:
    done = docker("run", "--rm", *STRICT, *mounts(tmp_path), image, "serve")
    assert done.returncode == EXIT_BAD_INPUT
    (line,) = done.stderr.strip().splitlines()
    assert "/opt/ml/model" in line


def test_a_gpu_instance_without_its_driver_is_told_of_it(image: str, lay_out_job: Callable[..., JobTree]) -> None:
    job = lay_out_job()
    job.write("input/config/resourceconfig.json", '{"hosts": ["algo-1"], "current_instance_type": "ml.g4dn.xlarge"}')
    with running(*STRICT, *mounts(job.base), image, "train") as container:
        ended = end(container.process)
    assert ended.code == EXIT_BAD_INPUT, ended.log
    assert "the instance is a ml.g4dn.xlarge, and torch sees no GPU: no NVIDIA driver" in (job.failure or "")


def test_a_base_model_that_is_baked_in_is_found_by_its_id(
    hub: Hub, lay_out_job: Callable[..., JobTree], tmp_path: Path
) -> None:
    tag = f"{TAG}-baked"
    (tmp_path / "token").write_text("hf_swordfish\n")
    secret = f"--secret=id=hf_token,src={tmp_path}/token"
    done = build("BASE_MODEL=owner/model", f"HF_ENDPOINT={hub.url}", tag=tag, options=[secret])
    assert done.returncode == 0, done.stderr[-4000:]
    assert hub.tokens == {"Bearer hf_swordfish"}
    assert "swordfish" not in docker("history", "--no-trunc", tag).stdout
    job = lay_out_job(pretrained_model_name_or_path="owner/model", class_prompt="None")
    with running(*STRICT, *mounts(job.base), tag, "train") as container:
        ended = end(container.process)
    docker("rmi", tag)
    assert ended.code == EXIT_OK, ended.log
    assert read_weights(job.model, "unet")


def test_a_change_of_our_code_neither_fetches_the_base_model_again_nor_makes_its_layer_again(
    hub: Hub, tmp_path: Path
) -> None:
    context = tmp_path / "context"
    for name in ("container", "dreambooth_sm", "requirements"):
        shutil.copytree(ROOT / name, context / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".dockerignore", "Dockerfile", "LICENSE"):
        shutil.copy(ROOT / name, context / name)
    tag, layers = f"{TAG}-changed", []
    for change in ("first", "second"):
        hub.fetched.clear()
        (context / "dreambooth_sm" / "checksums.py").open("a").write(f"# {change}\n")
        done = build("BASE_MODEL=owner/model", f"HF_ENDPOINT={hub.url}", tag=tag, context=context)
        assert done.returncode == 0, done.stderr[-4000:]
        layers.append(json.loads(docker("image", "inspect", "--format={{json .RootFS.Layers}}", tag).stdout))
    docker("rmi", tag)
    assert not {name for name in hub.fetched if name.endswith(".safetensors")}
    changed = [one != other for one, other in zip(*layers, strict=True)]
    assert changed == sorted(changed), "the layers of our code are the last"
    assert changed.count(True) == 3, "the package, the entrypoint and their bytecode"
