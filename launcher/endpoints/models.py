"""What an endpoint serves: a model, or the adapters of many."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dreambooth_sm.errors import UserError


class HasModel(Protocol):
    """What knows where its model lies, such as a job."""

    @property
    def model_uri(self) -> str: ...


# What can be served, one by one.
Servable = HasModel | str | Path


@dataclass(frozen=True)
class Served:
    """Where it lies: in directories of this machine, or below ``s3://`` prefixes.

    Attributes:
        model: what a job left; None: nothing but adapters, or the base model alone.
        base_model: that adapters lie beside; None: the one that the job's report names.
        adapters: holds the adapter ``zwx`` below ``zwx/``.
    """

    model: str | None
    base_model: str | None = None
    adapters: str | None = None

    def changed(self, **places: str | Path | None) -> Served:
        """The same with other places."""
        return dataclasses.replace(self, **{name: _text(place) for name, place in places.items()})


def served_of(
    models: Servable | Sequence[Servable],
    base_model: str | Path | None = None,
    adapters: str | Path | None = None,
) -> Served:
    """Finds what is to be served.

    Args:
        models: a job, a directory or a prefix; several of them are adapters that lie side by side.

    Raises:
        UserError: several that do not lie side by side, or none.
    """
    if isinstance(models, str | Path) or not isinstance(models, Sequence):
        return Served(_place(models), _text(base_model), _text(adapters))
    places = [_place(each).rstrip("/") for each in models]
    if len(places) == 1:
        return Served(places[0], _text(base_model), _text(adapters))
    folders = {place.rpartition("/")[0] for place in places}
    problems = []
    if len(folders) != 1 or "" in folders or folders & {"s3:/", "s3:"}:
        problems.append("models: several are served as adapters, and have to lie below one prefix, each in a folder")
    if adapters is not None:
        problems.append("adapters: several models are adapters already; leave it out, or name one model")
    if base_model is None:
        problems.append("base_model is missing; name the model that the adapters lie beside")
    if problems:
        raise UserError(problems)
    return Served(None, _text(base_model), folders.pop())


def _place(model: Any) -> str:
    return str(model) if isinstance(model, str | Path) else str(model.model_uri)


def _text(place: str | Path | None) -> str | None:
    return None if place is None else str(place)
