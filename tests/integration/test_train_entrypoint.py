"""The entrypoint as SageMaker runs it: a process on an ``/opt/ml`` tree, with an S3 server on loopback."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import urlsplit

import pytest

from dreambooth_sm.checksums import checksum_of, encoded
from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_OK, EXIT_STOPPED
from dreambooth_sm.report import parse_metrics
from dreambooth_sm.results import REPORT_FILES
from dreambooth_sm.storage import MANIFEST_NAME, Manifest, S3Uri, download_directory, list_objects
from launcher.local.s3 import EmbeddedS3
from tests.helpers.checkpoints import as_format_1, rewrite_state
from tests.helpers.jobs import SEED_NOTEBOOK, WEIGHTS, Ended, JobTree, end, read_until, read_weights, same_weights
from tests.helpers.services import eventually

# For jobs that are about something else than class images, which take long.
NO_CLASS = {"class_prompt": "None"}


def assert_trained(model: Path, base: Path) -> None:
    """A pipeline that loads, in fp16 safetensors, with another UNet than the base model's and the same VAE."""
    import torch
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(model)
    for part in WEIGHTS:
        tensors = read_weights(model, part)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        before = {name: tensor.half() for name, tensor in read_weights(base, part).items()}
        assert same_weights(tensors, before) == (part != "unet"), part


def through(url: str, job: JobTree) -> JobTree:
    """The job with S3 at another address."""
    return JobTree(job.base, {**job.environment, "AWS_ENDPOINT_URL": url, "AWS_ENDPOINT_URL_S3": url})


def files_below(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


# --- Where the model goes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "arguments"),
    [("manual_upload_model_path", ["train"]), ("manul_upload_model_path", [])],
    ids=["our spelling, train", "the seed's spelling, no argument"],
)
def test_uploads_the_model_and_leaves_a_pointer(
    option: str,
    arguments: list[str],
    lay_out_job: Callable[..., JobTree],
    tiny_base: Path,
    target: S3Uri,
    s3: EmbeddedS3,
    tmp_path: Path,
) -> None:
    with proxy(s3) as (url, puts):
        job = through(url, lay_out_job(**NO_CLASS, **{option: str(target)}))
        ended = job.run(*arguments)
    assert ended.code == EXIT_OK, ended.log
    assert job.failure is None

    client = s3.client()
    pipeline = sorted([*files_below(job.base / "input" / "data" / "model"), *REPORT_FILES])
    keys = sorted(f"{target.prefix}/{name}" for name in [*pipeline, MANIFEST_NAME])
    assert sorted(list_objects(S3Uri(target.bucket), client=client)) == keys
    assert sorted(puts) == [f"/{target.bucket}/{key}" for key in keys], "each file is sent once"
    assert puts[-1].endswith(f"/{MANIFEST_NAME}"), "the manifest is sent last"

    body = client.get_object(Bucket=target.bucket, Key=f"{target.prefix}/{MANIFEST_NAME}")["Body"].read()
    manifest = Manifest.from_json(body)
    assert [entry.path for entry in manifest.files] == pipeline
    here = tmp_path / "downloaded"
    download_directory(target, here, client=client)
    for entry in manifest.files:
        content = (here / entry.path).read_bytes()
        assert (len(content), encoded(checksum_of(content))) == (entry.size, entry.crc64nvme)
    assert_trained(here, tiny_base)

    assert files_below(job.model) == ["model_location.txt"]
    assert (job.model / "model_location.txt").read_text().strip() == str(target)


# --- The seed notebook ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encode", [json.dumps, str], ids=["json_encode", "str"])
def test_the_seed_notebooks_hyperparameters(
    encode: Callable[[object], str],
    tiny_base: Path,
    pictures: Path,
    s3: EmbeddedS3,
    tmp_path: Path,
    plain_prompts: JobTree,
) -> None:
    job = JobTree.lay_out(
        tmp_path / "opt-ml",
        {name: encode(value) for name, value in SEED_NOTEBOOK.items()},
        {"images": pictures, "model": tiny_base},
        s3.environment(),
        defaults={},
    )
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert job.failure is None

    # "False" is not true, and a checkpoint is written where save_steps says so, not each epoch.
    plan = parse_metrics(
        next(line for line in ended.log.splitlines() if "train_text_encoder=" in line).removeprefix("plan: ")
    )
    assert plan["train_text_encoder"] == "False"
    assert plan["gradient_checkpointing"] == "True"
    assert plan["cache_latents"] == "False"
    assert plan["optimizer"] != "adamw8bit"
    assert plan["ema"] != "no"
    assert f"model_name={SEED_NOTEBOOK['model_name']}" in ended.log.splitlines()
    assert ended.checkpoints == [2, 4, 6]
    assert job.checkpoints == ["step-00000004", "step-00000006"]

    assert_trained(job.model, tiny_base)

    # What reaches the tokenizer is what a job with plain prompts gives it: every weight comes out the same.
    identity = json.loads((job.base / "checkpoints" / "step-00000004" / "state.json").read_text())["identity"]
    assert identity["instance_prompt"] == "photo of zwx toy"
    assert identity["class_prompt"] == "photo of a cat toy"
    assert same_weights(read_weights(job.model, "unet"), read_weights(plain_prompts.model, "unet"))


@pytest.fixture(scope="module")
def plain_prompts(tiny_base: Path, pictures: Path, s3: EmbeddedS3, tmp_path_factory: pytest.TempPathFactory) -> JobTree:
    """The seed notebook's job with plain prompts, and its other values as arguments on the command line."""
    base = tmp_path_factory.mktemp("plain") / "opt-ml"
    channels = {"images": pictures, "model": tiny_base}
    job = JobTree.lay_out(base, {"max_train_steps": "999"}, channels, s3.environment(), defaults={})
    values = SEED_NOTEBOOK | {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a cat toy"}
    arguments = [word for name, value in values.items() for word in (f"--{name}", *str(value).split())]
    ended = job.run("train", *arguments)
    assert ended.code == EXIT_OK, ended.log
    return job


# --- Being stopped, and resumed --------------------------------------------------------------------------------------

STEPS = 24
SAVE_STEPS = 8
LONG = {"max_train_steps": str(STEPS), "save_steps": str(SAVE_STEPS), "use_ema": "true", "lr_scheduler": "cosine"}


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_base: Path, pictures: Path, s3: EmbeddedS3, tmp_path_factory: pytest.TempPathFactory
) -> tuple[JobTree, Ended]:
    base = tmp_path_factory.mktemp("uninterrupted") / "opt-ml"
    job = JobTree.lay_out(base, LONG, {"images": pictures, "model": tiny_base}, s3.environment())
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert [step["step"] for step in ended.steps] == [str(step) for step in range(1, STEPS + 1)]
    return job, ended


@pytest.fixture(scope="module")
def stopped(
    tiny_base: Path, pictures: Path, s3: EmbeddedS3, tmp_path_factory: pytest.TempPathFactory
) -> tuple[JobTree, Ended, float]:
    """A job that got SIGTERM early in training, and the seconds that it took to end. Not to be written to."""
    base = tmp_path_factory.mktemp("stopped") / "opt-ml"
    job = JobTree.lay_out(base, LONG, {"images": pictures, "model": tiny_base}, s3.environment())
    process = job.start("train")
    log = read_until(process, r"^step=3 ")
    signalled = time.monotonic()
    process.send_signal(signal.SIGTERM)
    ended = end(process, log)
    return job, ended, time.monotonic() - signalled


def copy_of(job: JobTree, base: Path) -> JobTree:
    shutil.copytree(job.base, base)
    return JobTree(base, job.environment)


def assert_same_end(job: JobTree, ended: Ended, uninterrupted: tuple[JobTree, Ended]) -> None:
    reference, whole = uninterrupted
    assert same_weights(read_weights(job.model, "unet"), read_weights(reference.model, "unet"))
    first = int(ended.steps[0]["step"])
    assert [step["loss"] for step in ended.steps] == [step["loss"] for step in whole.steps[first - 1 :]]


def test_sigterm_ends_the_job_with_a_checkpoint(stopped: tuple[JobTree, Ended, float]) -> None:
    job, ended, seconds = stopped
    assert ended.code == EXIT_STOPPED, ended.log
    assert seconds < 120, "SageMaker's grace"
    assert job.failure is None
    assert "Traceback" not in ended.log
    last = int(ended.steps[-1]["step"])
    assert 3 <= last < STEPS
    assert job.checkpoints[-1] == f"step-{last:08d}"
    assert not files_below(job.model)


@pytest.mark.parametrize("stopped_by", ["this version", "one that wrote format 1"])
def test_a_stopped_job_is_resumed_and_ends_with_the_same_weights(
    stopped: tuple[JobTree, Ended, float], uninterrupted: tuple[JobTree, Ended], tmp_path: Path, stopped_by: str
) -> None:
    original, before, _ = stopped
    job = copy_of(original, tmp_path / "opt-ml")
    if stopped_by != "this version":
        for name in job.checkpoints:
            as_format_1(job.base / "checkpoints" / name)
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert ("is of an earlier version" in ended.log) == (stopped_by != "this version")
    assert int(ended.steps[0]["step"]) == int(before.steps[-1]["step"]) + 1
    assert_same_end(job, ended, uninterrupted)


def test_sigterm_while_class_images_are_made(lay_out_job: Callable[..., JobTree]) -> None:
    job = lay_out_job(num_class_images="400")
    scratch = job.base / "scratch"
    scratch.mkdir()
    job.environment["TMPDIR"] = str(scratch)
    process = job.start("train")
    read_until(process, "phase=class_images state=started")
    assert any(scratch.iterdir()), "pictures to look at"
    process.send_signal(signal.SIGTERM)
    ended = end(process)
    assert ended.code == EXIT_STOPPED, ended.log
    assert "stopped: while class images were made" in ended.log
    assert job.failure is None
    assert not job.checkpoints
    # What was made is whole, and the next job does not make it again.
    from dreambooth_sm.data.class_cache import read_latents

    directory = job.base / "input" / "data" / "class_images"
    made = files_below(directory)
    assert 1 <= len(made) < 400
    for name in made:
        assert read_latents(directory / name).isfinite().all()
    job.set(num_class_images=str(len(made) + 1))
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert f"class_images found={len(made)} missing=1" in ended.log
    assert not any(scratch.iterdir()), "neither job left a file behind"


def test_after_sigkill_the_job_is_resumed_from_the_last_whole_checkpoint(
    lay_out_job: Callable[..., JobTree], uninterrupted: tuple[JobTree, Ended]
) -> None:
    job = lay_out_job(**LONG)
    process = job.start("train")
    read_until(process, rf"^step={SAVE_STEPS + 2} ")
    process.kill()
    assert end(process).code == -signal.SIGKILL
    assert job.checkpoints == [f"step-{SAVE_STEPS:08d}"]
    # A newer one, which came half-way before the machine was gone.
    whole = job.base / "checkpoints" / f"step-{SAVE_STEPS:08d}"
    half = job.base / "checkpoints" / f"step-{2 * SAVE_STEPS:08d}"
    shutil.copytree(whole, half)
    tensors = (half / "tensors.pt").read_bytes()
    (half / "tensors.pt").write_bytes(tensors[: len(tensors) // 2])

    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert ended.steps[0]["step"] == str(SAVE_STEPS + 1)
    assert_same_end(job, ended, uninterrupted)


def test_the_checkpoint_of_another_job_is_refused(stopped: tuple[JobTree, Ended, float], tmp_path: Path) -> None:
    original, _, _ = stopped
    job = copy_of(original, tmp_path / "opt-ml")
    before = job.checkpoints
    job.set(learning_rate="2e-3", instance_prompt="photo of sks toy")
    ended = job.run("train")
    assert ended.code == EXIT_BAD_INPUT, ended.log
    assert job.failure is not None
    assert "learning_rate was 0.001 and is 0.002" in job.failure
    assert "instance_prompt was 'photo of zwx toy' and is 'photo of sks toy'" in job.failure
    assert "resume_from_checkpoint=no" in job.failure
    assert "resolution" not in job.failure
    assert "Traceback" not in ended.log
    # Refused before anything that costs money, and nothing of the other job's is touched.
    assert "phase=load_base" not in ended.log
    assert job.checkpoints == before


def test_the_checkpoint_of_a_later_version_is_refused(stopped: tuple[JobTree, Ended, float], tmp_path: Path) -> None:
    original, _, _ = stopped
    job = copy_of(original, tmp_path / "opt-ml")
    (name,) = before = job.checkpoints
    rewrite_state(job.base / "checkpoints" / name, lambda state: state.update(format=99))
    job.set(seed="None")
    ended = job.run("train")
    assert ended.code == EXIT_BAD_INPUT, ended.log
    assert job.failure is not None
    assert "has format 99, and this version reads up to 2" in job.failure
    assert job.checkpoints == before


def test_a_job_that_starts_again_in_anothers_directory_leaves_the_other_what_it_has(
    stopped: tuple[JobTree, Ended, float], uninterrupted: tuple[JobTree, Ended], tmp_path: Path
) -> None:
    """And each is resumed from its own, although both are of the same step."""
    original, _, _ = stopped
    job = copy_of(original, tmp_path / "opt-ml")
    root = job.base / "checkpoints"
    theirs = {name: (root / name).read_bytes() for name in files_below(root)}
    (name,) = job.checkpoints
    steps, learning_rate = int(name.removeprefix("step-")), job.get("learning_rate")
    job.set(learning_rate="2e-3", resume_from_checkpoint="no", max_train_steps=str(steps))
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert f"warning: checkpoints in {root} that are not of this job stay: {name}" in ended.log
    assert ended.steps[0]["step"] == "1"
    assert {name: (root / name).read_bytes() for name in theirs} == theirs
    assert job.checkpoints == [name, f"{name}-2"]

    job.set(resume_from_checkpoint="latest", max_train_steps=str(steps + 1))
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert [step["step"] for step in ended.steps] == [str(steps + 1)]

    job.set(learning_rate=learning_rate, max_train_steps=str(STEPS))
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert_same_end(job, ended, uninterrupted)


def test_a_finished_job_that_is_started_again_writes_the_same_model_without_a_step(
    uninterrupted: tuple[JobTree, Ended], tmp_path: Path
) -> None:
    original, _ = uninterrupted
    job = copy_of(original, tmp_path / "opt-ml")
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert ended.steps == []
    assert same_weights(read_weights(job.model, "unet"), read_weights(original.model, "unet"))
    # Fewer steps than are done would be a success with nothing trained.
    job.set(max_train_steps=str(STEPS - 1))
    ended = job.run("train")
    assert ended.code == EXIT_BAD_INPUT, ended.log
    assert f"has taken {STEPS} steps, and the job is to take {STEPS - 1}" in (job.failure or "")


def test_a_hostile_record_makes_the_job_upload_nothing_of_its_host(
    uninterrupted: tuple[JobTree, Ended], tmp_path: Path
) -> None:
    original, _ = uninterrupted
    job = copy_of(original, tmp_path / "opt-ml")
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"swordfish")
    newest = job.base / "checkpoints" / job.checkpoints[-1]
    state = json.loads((newest / "state.json").read_text())
    del state["state_crc32"]
    state["record"]["samples"] = [{"step": 0, "prompt": "x", "seed": 1, "path": f"../../{secret.name}"}]
    crc32 = zlib.crc32(json.dumps(state, sort_keys=True).encode())
    job.write(f"checkpoints/{newest.name}/state.json", json.dumps(state | {"state_crc32": crc32}))
    (newest / "samples").mkdir(exist_ok=True)
    (newest / "samples" / "step-000000-prompt-0-seed-1-01234567.png").symlink_to(secret)
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert f"{newest.name} is damaged and passed over: state.json: record.samples" in ended.log
    assert ended.steps[0]["step"] == str(2 * SAVE_STEPS + 1)
    assert not [name for name in files_below(job.model) if b"swordfish" in (job.model / name).read_bytes()]


# --- When training or the upload fails -------------------------------------------------------------------------------


def test_a_job_whose_weights_blow_up_fails(lay_out_job: Callable[..., JobTree], target: S3Uri, s3: EmbeddedS3) -> None:
    job = lay_out_job(**NO_CLASS, learning_rate="1e6", max_train_steps="6", manual_upload_model_path=str(target))
    ended = job.run("train")
    assert ended.code == EXIT_FAILURE, ended.log
    assert job.failure is not None
    assert "not finite" in job.failure
    assert "learning_rate" in job.failure
    assert not files_below(job.model)
    assert not list_objects(target, client=s3.client())


def test_a_bucket_that_goes_away_does_not_cost_the_model(
    lay_out_job: Callable[..., JobTree], tiny_base: Path, target: S3Uri, s3: EmbeddedS3
) -> None:
    job = lay_out_job(**NO_CLASS | {"max_train_steps": "12"}, manual_upload_model_path=str(target))
    process = job.start("train")
    log = read_until(process, "step=1 ")
    process.send_signal(signal.SIGSTOP)  # or a busy machine might see the upload begin before the bucket is gone
    s3.client().delete_bucket(Bucket=target.bucket)
    process.send_signal(signal.SIGCONT)
    ended = end(process, log)
    assert ended.code not in (EXIT_OK, EXIT_STOPPED), ended.log
    assert job.failure is not None
    assert str(target) in job.failure
    assert "bucket does not exist" in job.failure
    assert_trained(job.model, tiny_base)


def test_an_upload_that_fails_half_way_does_not_cost_the_model(
    lay_out_job: Callable[..., JobTree], tiny_base: Path, target: S3Uri, s3: EmbeddedS3
) -> None:
    with proxy(s3, good_puts=4) as (url, puts):
        job = through(url, lay_out_job(**NO_CLASS, manual_upload_model_path=str(target)))
        ended = job.run("train")
    assert len(puts) > 4
    assert ended.code == EXIT_FAILURE, ended.log
    assert job.failure is not None
    assert str(target) in job.failure
    assert "the disks are full" in job.failure
    assert files_below(job.model) == sorted([*files_below(job.base / "input" / "data" / "model"), *REPORT_FILES])
    assert_trained(job.model, tiny_base)
    # Without the manifest, nobody takes what is there for a model.
    assert f"{target.prefix}/{MANIFEST_NAME}" not in list_objects(S3Uri(target.bucket), client=s3.client())


@contextmanager
def proxy(s3: EmbeddedS3, good_puts: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """A way to the S3 server that notes the path of each PUT, and refuses those after the first ``good_puts``."""
    upstream = urlsplit(s3.endpoint_url).netloc
    puts: list[str] = []
    lock = Lock()

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            refused = False
            if self.command == "PUT" and "/.upload-check" not in self.path:
                with lock:
                    puts.append(self.path)
                    refused = good_puts is not None and len(puts) > good_puts
            if refused:
                # Not a code that clients retry for a minute.
                status, headers = 501, [("Content-Type", "application/xml")]
                content = b"<Error><Code>NotImplemented</Code><Message>the disks are full</Message></Error>"
            else:
                connection = http.client.HTTPConnection(upstream)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                status, headers, content = response.status, response.getheaders(), response.read()
                connection.close()
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = dict(headers).get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", puts
        finally:
            server.shutdown()


def test_without_a_place_to_upload_to_the_model_stays(uninterrupted: tuple[JobTree, Ended], tiny_base: Path) -> None:
    job, ended = uninterrupted
    assert job.failure is None
    assert_trained(job.model, tiny_base)
    samples = ["samples/class-0.png", "samples/class-1.png"]
    assert files_below(job.model) == sorted([*files_below(tiny_base), *REPORT_FILES, *samples])
    assert ended.checkpoints == [SAVE_STEPS, 2 * SAVE_STEPS, STEPS]


def test_without_a_checkpoint_channel_a_stopped_job_leaves_its_checkpoint_where_sagemaker_saves_it(
    lay_out_job: Callable[..., JobTree],
) -> None:
    job = lay_out_job(**NO_CLASS, max_train_steps=str(STEPS))
    (job.base / "checkpoints").rmdir()
    process = job.start("train", fork=False)
    read_until(process, r"^step=2 ")
    process.send_signal(signal.SIGTERM)
    assert end(process).code == EXIT_STOPPED
    assert len(list((job.model / "checkpoints").glob("step-*/state.json"))) == 1


@pytest.mark.parametrize("end_by", [signal.SIGTERM, signal.SIGKILL])
def test_without_a_checkpoint_channel_a_job_is_resumed_from_what_lies_beside_its_model(
    end_by: signal.Signals,
    lay_out_job: Callable[..., JobTree],
    uninterrupted: tuple[JobTree, Ended],
    target: S3Uri,
    s3: EmbeddedS3,
    tmp_path: Path,
) -> None:
    job = lay_out_job(**LONG, manual_upload_model_path=str(target))
    (job.base / "checkpoints").rmdir()
    process = job.start("train")
    log = read_until(process, rf"^step={SAVE_STEPS + 2} ")
    if end_by == signal.SIGKILL:
        # It is on its way while the next steps run; kill only once it has arrived.
        eventually(
            lambda: f"checkpoints/step-{SAVE_STEPS:08d}/{MANIFEST_NAME}" in list_objects(target, client=s3.client())
        )
    process.send_signal(end_by)
    ended = end(process, log)
    assert ended.code == (EXIT_STOPPED if end_by == signal.SIGTERM else -signal.SIGKILL), ended.log

    # The next instance has nothing of this one's disk.
    shutil.rmtree(job.model)
    job.model.mkdir()
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert int(ended.steps[0]["step"]) > SAVE_STEPS
    download_directory(target, tmp_path / "copy", client=s3.client())
    reference, whole = uninterrupted
    assert same_weights(read_weights(tmp_path / "copy", "unet"), read_weights(reference.model, "unet"))
    first = int(ended.steps[0]["step"])
    assert [step["loss"] for step in ended.steps] == [step["loss"] for step in whole.steps[first - 1 :]]
    assert not [key for key in list_objects(target, client=s3.client()) if key.startswith("checkpoints/")]


# --- The best checkpoint ---------------------------------------------------------------------------------------------


def test_the_best_of_several_checkpoints_is_exported(lay_out_job: Callable[..., JobTree]) -> None:
    settings = {
        "pretrained_model_name_or_path": "toybox",
        "class_prompt": "None",
        "train_text_encoder": "false",
        "max_train_steps": "2",
        "save_steps": "1",
        "checkpoints_total_limit": "2",
    }
    job = lay_out_job(**settings, fidelity_encoders="judge", select_best="true")
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    lines = [parse_metrics(line) for line in ended.log.splitlines()]
    scores = {int(pairs["candidate"]): float(pairs["score"]) for pairs in lines if "candidate" in pairs}
    assert sorted(scores) == [0, 1, 2]
    del scores[0]  # the base model is measured, but is not a candidate
    best = next(int(pairs["best"]) for pairs in lines if "best" in pairs)
    assert scores[best] == max(scores.values())
    assert "verdict: " in ended.log
    # A job that ends at the best step, with nothing to choose from, exports the same.
    short = lay_out_job("short", **settings | {"max_train_steps": str(best), "save_steps": "0"})
    assert short.run("train").code == EXIT_OK
    assert same_weights(read_weights(job.model, "unet"), read_weights(short.model, "unet"))


def test_encoders_that_are_not_there_end_the_job_before_class_images_are_made(
    lay_out_job: Callable[..., JobTree],
) -> None:
    job = lay_out_job(fidelity_encoders="dino=/no/such/model")
    ended = job.run("train")
    assert ended.code == EXIT_BAD_INPUT
    assert "dino=/no/such/model" in (job.failure or "")
    assert "phase=class_images" not in ended.log
