"""The local mode of both SageMaker SDKs: each runs the image with docker compose, as it would on an instance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dreambooth_sm.storage import S3Uri, download_directory, upload_directory
from launcher.local.services import EmbeddedServices
from tests.helpers.containers import needs_engine
from tests.helpers.jobs import SEED_NOTEBOOK, SMALL, read_weights
from tests.helpers.sdks import run_script

pytestmark = needs_engine


@pytest.mark.parametrize(
    ("backend", "hyperparameters", "last"),
    [("estimator", SEED_NOTEBOOK, 6), ("model_trainer", SMALL, 2)],
    ids=["estimator, as in the seed's notebook", "model_trainer"],
)
def test_a_job_runs_in_the_image_and_its_model_is_in_s3(
    backend: str,
    hyperparameters: dict[str, Any],
    last: int,
    image: str,
    services: EmbeddedServices,
    tiny_base: Path,
    pictures: Path,
    tmp_path: Path,
) -> None:
    clients = services.clients()
    bucket = S3Uri(f"local-mode-{backend.replace('_', '-')}")
    clients("s3").create_bucket(Bucket=bucket.bucket)
    channels = {"images": pictures, "model": tiny_base}
    for name, folder in channels.items():
        upload_directory(folder, bucket / name, client=clients("s3"))
    target = bucket / "trained"
    (tmp_path / "containers").mkdir()
    job = {
        "image": image,
        "role": services.role,
        "hyperparameters": {**hyperparameters, "manul_upload_model_path": str(target)},
        "channels": {name: str(bucket / name) for name in channels},
        "environment": {"AWS_ENDPOINT_URL_S3": services.endpoint_url},
        "output": str(bucket / "output"),
        "directory": str(tmp_path / "containers"),
    }
    ended = run_script(backend, "local_mode.py", [backend], tmp_path, services.environment(), standard_input=job)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"step={last} loss=" in ended.stdout + ended.stderr
    download_directory(target, tmp_path / "model", client=clients("s3"))
    assert all(tensor.isfinite().all() for tensor in read_weights(tmp_path / "model", "unet").values())
