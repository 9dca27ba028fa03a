"""What an endpoint can be told by its environment, which SageMaker sets from ``Environment`` of CreateModel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.knobs.messages import near_name, short

_PREFIX = "SERVE_"
# What SageMaker takes and gives in one real-time invocation, in bytes.
LARGEST_BODY = 6_291_456


def _setting(default: Any, meaning: str, low: int = 0) -> Any:
    return field(default=default, metadata={"meaning": meaning, "low": low})


@dataclass(frozen=True)
class ServingSettings:
    """Settings of a server; each is a variable of the environment, in capitals and after ``SERVE_``."""

    base_model: str | None = _setting(None, "the model that adapters lie beside: a path, `s3://` location or hub id")
    adapters: str | None = _setting(None, "a folder or an `s3://` prefix: the adapter `zwx` lies below `zwx/` in it")
    adapter_slots: int = _setting(16, "adapters that pictures are drawn with at a time", 4)
    adapter_bytes: int = _setting(2 * 2**30, "of the host's memory, for adapters that were asked for lately")
    adapter_disk: str | None = _setting(
        None, "a folder for files of adapters from S3; among temporary files without it"
    )
    adapter_disk_bytes: int = _setting(8 * 2**30, "that they may take there; 0 keeps none")
    full_models: str | None = _setting(
        None, "a folder or an `s3://` prefix of models that were trained as a whole: `zwx` lies below `zwx/` in it"
    )
    full_model_bytes: int = _setting(4 * 2**30, "of the host's memory, for models that were asked for lately")
    host: str = _setting("0.0.0.0", "address that the server listens at")
    batch: int = _setting(8, "pictures that are drawn at a time", 1)
    queue: int = _setting(64, "pictures that may wait; more are answered with 429 at once", 1)
    max_pictures: int = _setting(16, "pictures of one request", 1)
    max_steps: int = _setting(150, "steps of one picture", 1)
    max_side: int = _setting(2048, "width and height of a picture, in pixels", 8)
    answer_bytes: int = _setting(LARGEST_BODY, "the largest answer; asynchronous endpoints may set it higher", 1000)
    precision: str = _setting("auto", "`fp32`, or `auto`: 16 bits on a GPU")
    safety_model: str | None = _setting(
        None, "an image classifier of transformers that pictures are shown to first: a path, `s3://` location or hub id"
    )
    safety_labels: str = _setting("nsfw", "labels of it, with commas between them, whose pictures are withheld")
    safety_percent: int = _setting(50, "of certainty from which on it counts", 1)
    log_prompts: bool = _setting(False, "`true` adds prompts to the line that the log has of each request")

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> ServingSettings:
        """Reads an environment.

        Raises:
            UserError: for every variable that can't be read.
        """
        known = {_PREFIX + each.name.upper(): each for each in fields(cls)}
        values: dict[str, Any] = {}
        problems = []
        for name, text in environment.items():
            if not name.startswith(_PREFIX):
                continue
            if name not in known:
                near = near_name(name, list(known))
                problems.append(f"{name}: unknown setting; {f'did you mean {near}?' if near else 'leave it out'}")
                continue
            try:
                values[known[name].name] = _read(text, known[name].default, known[name].metadata["low"])
            except ValueError as error:
                problems.append(f"{name}: {short(text)} is not valid; set {error}")
        if values.get("precision", "auto") not in ("auto", "fp32"):
            problems.append(f"{_PREFIX}PRECISION: {short(values['precision'])} is not valid; set auto or fp32")
        if problems:
            raise UserError(problems)
        return cls(**values)

    @classmethod
    def table(cls) -> list[tuple[str, str, str]]:
        """Each variable, its default and its meaning, for the documentation."""
        return [
            (_PREFIX + each.name.upper(), str(each.default).lower(), each.metadata["meaning"]) for each in fields(cls)
        ]


def _read(text: str, default: object, low: int) -> object:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    if isinstance(default, int):
        if not text.isascii() or not text.isdecimal() or len(text) > 12 or int(text) < low:
            raise ValueError(f"a whole number from {low}")
        return int(text)
    return text
