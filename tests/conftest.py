"""Shared by all tests: the tiny base model, the example pictures, an S3 server, and jobs to run on them."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported, here or in a job: a core is shared by workers and jobs, and sums keep their order.
os.environ["OMP_NUM_THREADS"] = "1"

import dreambooth_sm.quiet  # noqa: F401 - before the libraries that it quiets
import launcher
from dreambooth_sm.storage import S3Uri
from launcher.local import server_process, training_job
from launcher.local.s3 import EmbeddedS3, embedded_s3
from launcher.local.services import EmbeddedServices
from tests.helpers import forks
from tests.helpers.aws_descriptions import remembered
from tests.helpers.hub import STEMS, Hub
from tests.helpers.jobs import JobTree

_modules = 0  # imported when garbage was last collected of all of them
EXAMPLES = Path(__file__).parent / "data" / "duck_toy"
# The same examples in every run, and no clock: a failure comes from the change that it shows up with.
settings.register_profile(
    "all", derandomize=True, deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("check", settings.get_profile("all"), max_examples=20)  # `make check`
settings.load_profile("all")


def pytest_configure() -> None:
    """What is imported for the tests stays: to look for garbage in it takes seconds."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: trainers, which collect garbage, do not walk millions of their objects."""
    gc.enable()
    _set_aside()


def pytest_runtest_logfinish() -> None:
    """So does what a test has imported."""
    if len(sys.modules) != _modules:
        _set_aside()


def _set_aside() -> None:
    global _modules
    gc.collect()
    gc.freeze()
    _modules = len(sys.modules)


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def forked_jobs() -> Iterator[None]:
    """The embedded SageMaker forks its jobs and servers."""
    forking = SimpleNamespace(**{**vars(subprocess), "Popen": forks.Popen})
    with patch.object(training_job, "subprocess", forking), patch.object(server_process, "subprocess", forking):
        yield


@pytest.fixture(scope="session", autouse=True)
def descriptions_of_aws() -> Iterator[None]:
    with remembered():
        yield


@pytest.fixture
def terminal() -> Iterator[None]:
    """Signals come as in a terminal, also where the tests run in the background or under ``nohup``."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline of 0.4 M parameters; not to be written to."""
    from tests.helpers.tiny import save_tiny_pipeline

    return save_tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tiny_xl_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL pipeline of 3 M parameters; not to be written to."""
    from tests.helpers.tiny import save_tiny_xl_pipeline

    return save_tiny_xl_pipeline(tmp_path_factory.mktemp("base") / "tiny-xl")


@pytest.fixture(scope="session")
def tiny_z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Z-Image pipeline of 0.7 M parameters; not to be written to."""
    from tests.helpers.tiny import save_tiny_z_image_pipeline

    return save_tiny_z_image_pipeline(tmp_path_factory.mktemp("base") / "tiny-z-image")


@pytest.fixture(scope="session")
def tiny_flux2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.2 klein pipeline of 1 M parameters; not to be written to."""
    from tests.helpers.tiny import save_tiny_flux2_pipeline

    return save_tiny_flux2_pipeline(tmp_path_factory.mktemp("base") / "tiny-flux2-klein-base")


@pytest.fixture(scope="session")
def tiny_flux1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1 pipeline of 1 M parameters that is told its guidance; not to be written to."""
    from tests.helpers.tiny import save_tiny_flux1_pipeline

    return save_tiny_flux1_pipeline(tmp_path_factory.mktemp("base") / "tiny-flux1")


@pytest.fixture(scope="session")
def tiny_qwen_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen-Image pipeline of 0.4 M parameters; not to be written to."""
    from tests.helpers.tiny import save_tiny_qwen_image_pipeline

    return save_tiny_qwen_image_pipeline(tmp_path_factory.mktemp("base") / "tiny-qwen-image")


@pytest.fixture(scope="session")
def tiny_krea2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Krea 2 pipeline of 0.3 M parameters; not to be written to."""
    from tests.helpers.tiny import save_tiny_krea2_pipeline

    return save_tiny_krea2_pipeline(tmp_path_factory.mktemp("base") / "tiny-single-stream")


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3.5 pipeline of 1 M parameters; not to be written to."""
    from tests.helpers.tiny import save_tiny_sd3_pipeline

    return save_tiny_sd3_pipeline(tmp_path_factory.mktemp("base") / "tiny-mmdit")


@pytest.fixture(scope="session")
def tiny_chroma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Chroma pipeline of 1 M parameters; not to be written to."""
    from tests.helpers.tiny import save_tiny_chroma_pipeline

    return save_tiny_chroma_pipeline(tmp_path_factory.mktemp("base") / "tiny-chroma")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pictures of the example subject, scaled down; not to be written to."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for path in sorted(EXAMPLES.glob("*.jpg"))[:2]:
        with Image.open(path) as picture:
            picture.resize((96, 80)).save(folder / path.name)
    return folder


@pytest.fixture(scope="session")
def s3() -> Iterator[EmbeddedS3]:
    with embedded_s3() as server:
        yield server


@pytest.fixture
def target(s3: EmbeddedS3) -> S3Uri:
    """A prefix in a fresh, empty bucket."""
    bucket = f"models-{uuid.uuid4().hex}"
    s3.client().create_bucket(Bucket=bucket)
    return S3Uri(bucket, "jobs/duck")


@pytest.fixture
def lay_out_job(tmp_path: Path, s3: EmbeddedS3, tiny_base: Path, pictures: Path) -> Callable[..., JobTree]:
    """Lays out the tree of a small job: ``lay_out_job(max_train_steps="3")``; values go over the small job's own."""

    def lay_out(name: str = "opt-ml", **hyperparameters: str) -> JobTree:
        channels = {"images": pictures, "model": tiny_base}
        return JobTree.lay_out(tmp_path / name, hyperparameters, channels, s3.environment())

    return lay_out


@pytest.fixture(scope="session")
def image() -> str:
    """The training image on a base with a CPU torch; for tests that need a Docker engine."""
    from tests.helpers.containers import TAG, build

    done = build()
    assert done.returncode == 0, done.stderr[-4000:]
    return TAG


@pytest.fixture(scope="module")
def services() -> Iterator[EmbeddedServices]:
    """An embedded SageMaker that this process' environment leads to."""
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            environment.delenv(name)
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        with launcher.local_services() as services:
            yield services


@pytest.fixture
def hub(tiny_base: Path) -> Iterator[Hub]:
    """A repository as SD 1.5's: several formats and variants, a single file, a safety checker, a licence."""
    files = {str(path.relative_to(tiny_base)): path.read_bytes() for path in tiny_base.rglob("*") if path.is_file()}
    for part, stem in STEMS.items():
        whole = files[f"{part}/{stem}.safetensors"]
        files[f"{part}/{stem}.fp16.safetensors"] = whole
        files[f"{part}/{stem}.fp16.bin"] = b"pickle"
        files[f"{part}/{stem}.non_ema.safetensors"] = b"other"
    files |= {"v1-5-pruned.ckpt": b"pickle", "safety_checker/model.safetensors": b"x", "README.md": b"x"}
    served = Hub(files)
    yield served
    served.moves.set()
    served.server.shutdown()
