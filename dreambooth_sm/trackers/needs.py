"""The needs of trackers: what has to be installed, set and readable before a job starts. Imports none of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from dreambooth_sm.aws_secrets import read_secret
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.tracking import MANAGED_MLFLOW, MLFLOW, WANDB

_URI, _KEY = "MLFLOW_TRACKING_URI", "WANDB_API_KEY"
# What tracker_secret may hold.
_SECRETS = (_KEY, "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
# Of W&B, what keeps its files on the job's own disk, or does nothing.
_NOT_ONLINE = ("offline", "dryrun", "disabled")


def tracking_uri(h: Hyperparameters, environment: Mapping[str, str]) -> str | None:
    """MLflow's server; None where nobody named one."""
    return h.mlflow_tracking_uri or environment.get(_URI)


def is_online(environment: Mapping[str, str]) -> bool:
    """Whether W&B sends what it is told."""
    return environment.get("WANDB_MODE", "online") not in _NOT_ONLINE


def find_missing_settings(h: Hyperparameters, environment: Mapping[str, str]) -> Iterator[str]:
    """Says what a tracker can't do without.

    Args:
        environment: variables of the job.
    """
    if MLFLOW in h.trackers and not tracking_uri(h, environment):
        yield "report_to=mlflow needs a server; set mlflow_tracking_uri, or MLFLOW_TRACKING_URI in its environment"
    if WANDB in h.trackers and is_online(environment) and h.tracker_secret is None and not environment.get(_KEY):
        yield (
            "report_to=wandb needs a key; store it in AWS Secrets Manager and set the secret's name as tracker_secret, "
            "or set WANDB_MODE=offline in the job's environment"
        )


def find_missing_packages(h: Hyperparameters, environment: Mapping[str, str]) -> Iterator[str]:
    """Says which trackers are not installed here."""
    uri = tracking_uri(h, environment) or ""
    needed = [(name, name) for name in h.trackers]
    if MLFLOW in h.trackers and MANAGED_MLFLOW.fullmatch(uri):
        needed.append((MLFLOW, "sagemaker_mlflow"))
    for tracker, module in needed:
        found = find_spec(module)
        if found is None or found.origin is None:  # W&B makes folders of its own name
            name = module.replace("_", "-")
            argument = f"WITH_{tracker.upper()}=1"
            yield (
                f"report_to={tracker}: {name} is not installed here; build the image with --build-arg {argument} "
                f"(elsewhere: pip install 'dreambooth-sm[{tracker}]'), or leave {tracker} out"
            )


def take_secrets(h: Hyperparameters) -> None:
    """Puts what ``tracker_secret`` holds where trackers look for it: into this process's environment, from which logs
    know what they must not show.

    Raises:
        UserError: where the secret can't be read.
    """
    if h.tracker_secret is not None:
        os.environ.update(read_secret("tracker_secret", h.tracker_secret, _SECRETS, "W&B's key"))
