"""What the launcher does with base models that match flows, on the embedded services: each family's directory is sent,
an instance is chosen that trains it, and the adapter comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import launcher
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.methods.lora import FILE
from launcher.local.services import EmbeddedServices

pytestmark = pytest.mark.slow
BUCKET = "flows"


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.facts.matches_flow])
def test_the_launcher_chooses_an_instance_and_gets_the_adapter(
    family: str, services: EmbeddedServices, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    client = services.client()
    if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=BUCKET)
    options: dict[str, Any] = {"max_train_steps": 2, "resolution": 64, "learning_rate": 1e-2, "log": lambda line: None}
    job = launcher.fit(
        pictures,
        instance_prompt="photo of zwx toy",
        method="lora",
        base_model=request.getfixturevalue(f"tiny_{family}"),
        instance_type="auto",
        role=services.role,
        output=f"s3://{BUCKET}/{family}",
        **options,
    )
    assert job.status == "Completed"
    with safe_open(job.download(tmp_path / "zwx") / FILE, "pt") as file:
        assert all(key.startswith("transformer.") for key in file.keys())  # noqa: SIM118 - it can't be iterated
