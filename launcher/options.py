"""The options of the client's functions: data, resources and hyperparameters, all from their schemas."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from dreambooth_sm.errors import Problems
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.declare import COMMON
from launcher.resources import Resources

Images = str | Path | Sequence[str | Path]
Function = TypeVar("Function", bound=Callable[..., Any])


class Data(BaseModel):
    """The data that a job reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: Images | None = Field(
        default=None,
        description="4 to 20 pictures of the subject: a folder, a list of files, or s3://... of a folder, the start of "
        "keys, an object, a manifest, or a list of these.",
    )
    class_images: Images | None = Field(
        default=None, description="Pictures of the class, if there are some, like images.", json_schema_extra=COMMON
    )
    base_model: str | Path | None = Field(
        default=None,
        description="Base model: hub id, diffusers directory, .safetensors or .ckpt file, here or s3://. None: "
        "pretrained_model_name_or_path.",
        json_schema_extra=COMMON,
    )


def all_options() -> dict[str, FieldInfo]:
    """Every option by its name, in the order in which people think of them."""
    hyperparameters = dict(Hyperparameters.model_fields)
    first = {name: hyperparameters.pop(name) for name in ("instance_prompt", "class_prompt", "max_train_steps")}
    return {**Data.model_fields, **first, **Resources.model_fields, **hyperparameters}


def split_options(
    options: Mapping[str, Any], problems: Problems
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Options as those of data, those of resources, and hyperparameters, without those that are None.

    Other names become problems, with the nearest name that is.
    """
    known, aliases = all_options(), Hyperparameters.aliases()
    data, resources, hyperparameters = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for name, value in options.items():
        if name not in known and name not in aliases:
            near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "help(launcher.fit) lists those that exist"
            problems.found.append(f"{name}: unknown option; {hint}")
        elif value is not None:
            group = (
                data if name in Data.model_fields else resources if name in Resources.model_fields else hyperparameters
            )
            group[name] = value
    return data, resources, hyperparameters


def with_options(instance_type: str, without: Collection[str] = ()) -> Callable[[Function], Function]:
    """Gives a function that takes ``**options`` a signature and a help text that name each of them.

    IPython completes from it and ``help()`` shows it; nothing is written twice.

    Args:
        instance_type: the function's default.
        without: names of options that the function sets itself.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
        taken = {parameter.name for parameter in own}
        options = {name: field for name, field in all_options().items() if name not in {*taken, *without}}
        named = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=instance_type if name == "instance_type" else field.default,
                annotation=field.annotation,
            )
            for name, field in options.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *named])  # type: ignore[attr-defined]
        texts = "\n".join(f"        {name}: {field.description}" for name, field in options.items())
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n{inspect.cleandoc(texts)}\n"
        return function

    return decorate
