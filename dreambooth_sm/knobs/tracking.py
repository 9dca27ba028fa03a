"""Knobs for the trackers that a job tells its measures, pictures and report."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dreambooth_sm.knobs.declare import Knobs, knob, rule
from dreambooth_sm.knobs.messages import short
from dreambooth_sm.printing import has_userinfo

TENSORBOARD, MLFLOW, WANDB = "tensorboard", "mlflow", "wandb"
_TRACKERS = (TENSORBOARD, MLFLOW, WANDB)
MANAGED_MLFLOW = re.compile(r"arn:aws[\w-]*:sagemaker:[\w-]+:\d{12}:mlflow-(tracking-server|app)/\S+", re.ASCII)
_ADDRESS = re.compile(r"https?://[^/\s?#]+(/[^\s?#]*)?")
# Keys of W&B are long and hexadecimal, with a prefix since 2025.
_KEY = re.compile(r"(wandb_v1_\w+|[0-9a-f]{40,})")


class TrackingKnobs(Knobs):
    """Trackers, and where they are."""

    group = "Trackers"

    report_to: str | None = knob(
        None,
        "Trackers that are told measures, validation pictures, hyperparameters and the report: tensorboard, mlflow, "
        "wandb, or several with commas between ([trackers](trackers.md)).",
        resume="free",
    )
    tracking_project: str = knob(
        "dreambooth-sm", "MLflow's experiment and W&B's project that the job's run belongs to.", resume="free"
    )
    mlflow_tracking_uri: str | None = knob(
        None,
        "MLflow's server: `https://mlflow.example`, or the ARN of one that SageMaker manages; None: the environment's "
        "MLFLOW_TRACKING_URI.",
        resume="free",
    )
    tracker_secret: str | None = knob(
        None,
        "Name of the AWS Secrets Manager secret that holds W&B's key, or JSON with the keys WANDB_API_KEY, "
        "MLFLOW_TRACKING_TOKEN, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or some of them; never put a "
        "key here.",
        resume="free",
    )

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers."""
        return _named(self.report_to)

    @rule("report_to")
    def _trackers_are_known(self) -> Iterator[str]:
        if unknown := [name for name in _named(self.report_to) if name not in _TRACKERS]:
            yield (
                f"report_to: {', '.join(map(short, unknown))} is not one of {', '.join(_TRACKERS)}; set one or more of "
                "them, with commas between"
            )

    @rule("report_to", "mlflow_tracking_uri", "tracker_secret")
    def _settings_have_their_tracker(self) -> Iterator[str]:
        trackers = _named(self.report_to)
        if self.mlflow_tracking_uri is not None and MLFLOW not in trackers:
            yield "mlflow_tracking_uri is for report_to=mlflow; leave it out, or add mlflow to report_to"
        if self.tracker_secret is not None and not {MLFLOW, WANDB} & {*trackers}:
            yield "tracker_secret is for report_to=mlflow or wandb; leave it out, or add one of them to report_to"

    @rule("mlflow_tracking_uri")
    def _server_can_be_reached_by_its_address(self) -> Iterator[str]:
        uri = self.mlflow_tracking_uri
        if uri is None:
            return
        if has_userinfo(uri):
            yield (
                "mlflow_tracking_uri holds a user's name or password, which job descriptions and logs would show; set "
                "https://host, and name the secret that holds them with tracker_secret"
            )
        elif not _ADDRESS.fullmatch(uri) and not MANAGED_MLFLOW.fullmatch(uri):
            yield (
                f"mlflow_tracking_uri: {short(uri)} is not an address; set https://host, or "
                "arn:aws:sagemaker:REGION:ACCOUNT:mlflow-tracking-server/NAME"
            )

    @rule("tracker_secret")
    def _key_is_not_written_down(self) -> Iterator[str]:
        if self.tracker_secret is not None and _KEY.fullmatch(self.tracker_secret):
            yield (
                "tracker_secret takes the name of a secret, and this looks like W&B's key, which job descriptions "
                "would show; revoke it, store a new one in AWS Secrets Manager and set the secret's name"
            )

    @rule("tracking_project")
    def _project_can_be_a_name(self) -> Iterator[str]:
        if not re.fullmatch(r"[\w.-]{1,128}", self.tracking_project):
            yield (
                f"tracking_project: {short(self.tracking_project)} is not a name that MLflow and W&B take; set 1 to "
                "128 letters, digits, dots, hyphens and underscores"
            )


def _named(trackers: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in (trackers or "").split(",") if word.strip()))
