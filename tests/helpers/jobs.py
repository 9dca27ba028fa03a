"""Training jobs as processes: the container's entrypoint on an ``/opt/ml`` tree."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_sm.errors import EXIT_STOPPED
from dreambooth_sm.report import parse_metrics
from launcher.local.program import ENTRYPOINT
from launcher.local.tree import lay_out
from tests.helpers import forks
from tests.helpers.patience import PATIENCE

# The smallest job that goes through every phase.
SMALL = {
    "pretrained_model_name_or_path": "/opt/ml/input/data/model",
    "instance_prompt": "photo of zwx toy",
    "class_prompt": "photo of toy",
    "resolution": "64",
    "center_crop": "true",
    "num_class_images": "2",
    "sample_batch_size": "2",
    "max_train_steps": "2",
    "logging_steps": "1",
    "learning_rate": "1e-3",
    "seed": "7",
}
# The seed notebook's hyperparameters, with all their names, types and spellings; only the sizes are scaled down, and
# a seed is added so that runs can be compared.
SEED_NOTEBOOK: dict[str, object] = {
    "model_name": "aws-trained-dreambooth-model",
    "mixed_precision": "fp16",
    "pretrained_model_name_or_path": "/opt/ml/input/data/model",
    "instance_data_dir": "/opt/ml/input/data/images/",
    "class_data_dir": "/opt/ml/input/data/class_images/",
    "with_prior_preservation": True,
    "models_path": "/opt/ml/model/",
    "instance_prompt": "photo\\ of\\ zwx\\  toy",
    "class_prompt": "photo\\ of\\ a\\ cat toy",
    "resolution": 64,
    "train_batch_size": 1,
    "sample_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-06,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "num_class_images": 2,
    "max_train_steps": 6,
    "save_steps": 2,
    "attention": "xformers",
    "prior_loss_weight": 0.5,
    "use_ema": True,
    "train_text_encoder": False,
    "not_cache_latents": True,
    "gradient_checkpointing": True,
    "save_use_epochs": False,
    "use_8bit_adam": False,
    "seed": 7,
}
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@dataclass(frozen=True)
class Ended:
    """A job that has ended; ``log`` is its standard output and error, in the order they came."""

    code: int
    log: str

    @property
    def steps(self) -> list[dict[str, str]]:
        """The metric line of each training step."""
        lines = [parse_metrics(line) for line in self.log.splitlines()]
        return [pairs for pairs in lines if "step" in pairs and "loss" in pairs]

    @property
    def losses(self) -> dict[int, str]:
        """The loss of each step, as the log has it."""
        return {int(step["step"]): step["loss"] for step in self.steps}

    @property
    def checkpoints(self) -> list[int]:
        """Steps at which the log says that a checkpoint was written."""
        return [int(step) for step in re.findall(r"^checkpoint=\S+ step=(\d+)$", self.log, flags=re.MULTILINE)]


@dataclass(frozen=True)
class JobTree:
    """An ``/opt/ml`` tree, and the environment that the job finds."""

    base: Path
    environment: Mapping[str, str]

    @classmethod
    def lay_out(
        cls,
        base: Path,
        hyperparameters: Mapping[str, str],
        channels: Mapping[str, Path],
        environment: Mapping[str, str],
        defaults: Mapping[str, str] = SMALL,
    ) -> JobTree:
        lay_out(base, {**defaults, **hyperparameters}, {name: str(path) for name, path in channels.items()})
        return cls(base, environment)

    @property
    def model(self) -> Path:
        return self.base / "model"

    @property
    def images(self) -> Path:
        return self.base / "input" / "data" / "images"

    @property
    def config(self) -> Path:
        return self.base / "input" / "config"

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.base / "checkpoints").iterdir())

    @property
    def failure(self) -> str | None:
        path = self.base / "output" / "failure"
        return path.read_text(encoding="utf-8") if path.exists() else None

    def write(self, path: str, content: str | bytes) -> None:
        """Puts a file into the tree; one that is there already is left to whoever else it is linked to."""
        file = self.base / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    def set(self, **hyperparameters: object) -> None:
        """Changes hyperparameters."""
        before = json.loads((self.config / "hyperparameters.json").read_text())
        self.write("input/config/hyperparameters.json", json.dumps(before | hyperparameters))

    def get(self, hyperparameter: str) -> str:
        """The value that it is laid out with."""
        return str(json.loads((self.config / "hyperparameters.json").read_text())[hyperparameter])

    def start(self, *arguments: str, fork: bool = True) -> subprocess.Popen[str]:
        """Starts the job; ``fork=False``: as the image does, with a Python of its own."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "SAGEMAKER_", "TRAINING_JOB"))}
        return (forks.Popen if fork else subprocess.Popen)(
            [sys.executable, str(ENTRYPOINT), *arguments],
            env={**inherited, "CUDA_VISIBLE_DEVICES": "", "SAGEMAKER_BASE_DIR": str(self.base), **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str) -> Ended:
        return end(self.start(*arguments))

    def stop_after(self, step: int) -> Ended:
        """Runs the job until it has told of a step, and asks it to stop: it ends with a checkpoint."""
        process = self.start("train")
        log = read_until(process, rf"^step={step} ")
        process.send_signal(signal.SIGTERM)
        stopped = end(process, log)
        assert stopped.code == EXIT_STOPPED, stopped.log
        return stopped


def end(process: subprocess.Popen[str], log: str = "") -> Ended:
    """Waits for a job; ``log`` is what was read of it before."""
    try:
        rest, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return Ended(process.returncode, log + rest)


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Reads a job's log up to and with the first line that matches."""
    assert process.stdout is not None
    log = ""
    for line in process.stdout:
        log += line
        if re.search(pattern, line):
            return log
    raise AssertionError(f"the job ended with {process.wait()} before a line matched {pattern!r}:\n{log}")


def read_weights(directory: Path, part: str) -> dict[str, Any]:
    """The tensors of one part of a diffusers directory; text encoders have names with a prefix or without."""
    from safetensors.torch import load_file

    weights = load_file(directory / WEIGHTS[part])
    return {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}


def same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sets of tensors have the same names, types and bits."""
    import torch

    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )
