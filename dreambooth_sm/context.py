"""Shared by all phases of a job."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_sm import storage
from dreambooth_sm.distributed import World
from dreambooth_sm.errors import StopRequested
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS, Method
from dreambooth_sm.report import Reporter
from dreambooth_sm.sagemaker import Contract

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from dreambooth_sm.shared import Shared


@dataclass
class Context:
    """A job on this machine.

    Attributes:
        h: its hyperparameters, with paths as this machine has them once :func:`dreambooth_sm.preflight.preflight` has
            looked at them.
        asked: the hyperparameters as they were given.
        contract: where SageMaker, or what stands in for it, wants files.
        world: the processes that run it together.
        report: its log and its record.
        stop: set when it should end, with what was trained in a checkpoint.
        background: what works beside it, and is closed with it.
        shared: what it shares with other subjects of a fleet; None for a job by itself.
    """

    h: Hyperparameters
    asked: Hyperparameters
    contract: Contract
    world: World
    report: Reporter
    stop: threading.Event
    background: contextlib.ExitStack
    shared: Shared | None = None

    @property
    def method(self) -> Method:
        """What it trains of the model."""
        return METHODS[self.h.method]

    @property
    def directory(self) -> Path:
        """Where the trained model goes to."""
        return Path(self.h.models_path)

    def stop_if_asked(self) -> None:
        """Raises StopRequested if the job should end; between phases that leave nothing to save."""
        if self.world.any(self.stop.is_set()):
            raise StopRequested("before training began; nothing had to be saved")


def upload_client(h: Hyperparameters, **options: Any) -> S3Client:
    """A client of the server that the job uploads to."""
    return storage.s3_client(endpoint_url=h.s3_endpoint_url, addressing_style=h.s3_addressing_style, **options)
