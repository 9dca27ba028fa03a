"""Models of several subjects, trained as a whole, in one server: what differs between them is swapped from the host's
memory, and what was not trained they share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dreambooth_sm import storage
from dreambooth_sm.errors import UserError
from dreambooth_sm.knobs.messages import short
from dreambooth_sm.models import PretrainedModel, read_stored
from dreambooth_sm.resume import NOISE_SETTINGS, digest_of_weights
from dreambooth_sm.s3_uri import S3Uri
from dreambooth_sm.serving.fields import is_adapter_name
from dreambooth_sm.serving.refusal import Refusal
from dreambooth_sm.serving.served_model import adapter_file, learned_words, read_report, subject_prompts
from dreambooth_sm.serving.shelf import Shelf
from dreambooth_sm.sources import is_s3
from dreambooth_sm.stored.locate import INDEX
from dreambooth_sm.stored.model import state_of


@dataclass(frozen=True, eq=False)
class HostModel:
    """What a model has otherwise than the one that is served, in the host's memory.

    Attributes:
        name: that requests call it by.
        parts: values of the parts that differ, by part and name.
        prompts: of its subjects, by their names.
    """

    name: str
    parts: Mapping[str, Mapping[str, Tensor]]
    prompts: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(value.nbytes for values in self.parts.values() for value in values.values())


class ModelSeat:
    """The modules that draw, whose values other models take the place of: in their memory, as graphs know it.

    Args:
        served: the model that is served, as it was opened.
        placed: the same on the device, before layers are replaced for adapters.

    Attributes:
        model: that draws now; None: the one that is served.
    """

    def __init__(self, served: PretrainedModel, placed: PretrainedModel) -> None:
        self.model: HostModel | None = None
        self._served = served
        self._tensors = {part: state_of(module) for part, module in placed.modules.items()}
        self._own: dict[str, Mapping[str, Tensor]] = {}

    @torch.no_grad()
    def take(self, model: HostModel | None) -> None:
        """Lets another model draw; None: the one that is served."""
        wanted = model.parts if model else {}
        for part in (self.model.parts.keys() if self.model else set()) - wanted.keys():
            self._put(part, self._own[part])
        for part, values in wanted.items():
            if part not in self._own:
                self._own[part] = {name: _on_host(value) for name, value in self._tensors[part].items()}
            self._put(part, values)
        self.model = model

    def read(self, name: str, directory: Path) -> HostModel:
        """Reads a model that lies on this machine.

        Raises:
            UserError: where it is damaged, or can't take the place of the one that is served.
        """
        if not (directory / INDEX).is_file() and adapter_file(directory):
            raise UserError("it is an adapter, which SERVE_ADAPTERS serves")
        found, report = PretrainedModel.of(str(directory), read_stored(directory)), read_report(directory)
        if found.family is not self._served.family:
            raise UserError(
                f"it is a {found.family.facts.title} model, and this endpoint serves {self._served.family.facts.title}"
            )
        if learned_words(directory, report):
            raise UserError("it has learned words, which only an endpoint of its own serves")
        configs = [each.scheduler.config for each in (found, self._served)]
        if other := [key for key in NOISE_SETTINGS if configs[0].get(key) != configs[1].get(key)]:
            raise UserError(f"its noise is another one than that of the served model ({', '.join(other)})")
        parts = {part: self._differing(found, part) for part in self._tensors}
        return HostModel(name, {part: values for part, values in parts.items() if values}, subject_prompts(report))

    def _differing(self, found: PretrainedModel, part: str) -> dict[str, Tensor]:
        """The values of a part, in the precision that they are computed with; none where they are the served ones."""
        own = self._tensors[part]
        weights = found.weights(part)
        if {name: weight.shape for name, weight in weights.items()} != {name: (*t.shape,) for name, t in own.items()}:
            raise UserError(f"its {part} has other layers than that of the served model")
        digest = digest_of_weights({name: weights[name].cast(value.dtype) for name, value in own.items()})
        if digest == self._digests[part]:
            return {}
        host = torch.device("cpu")
        return {name: _on_host(weights[name].load(value.dtype, host), copy=False) for name, value in own.items()}

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {
            part: digest_of_weights({name: self._served.weights(part)[name].cast(t.dtype) for name, t in own.items()})
            for part, own in self._tensors.items()
        }

    def _put(self, part: str, values: Mapping[str, Tensor]) -> None:
        for name, place in self._tensors[part].items():
            place.copy_(values[name], non_blocking=True)


class ModelStore:
    """Finds models, reads them when they are asked for, and lets go of those that were not asked for lately.

    Args:
        place: folder or ``s3://`` prefix: the model ``zwx`` lies below ``zwx`` there. None: none can be had.
        size: bytes of the host's memory that they may take.
    """

    def __init__(self, place: str | None, seat: ModelSeat, size: int) -> None:
        self._place, self._seat = place, seat
        self._shelf: Shelf[HostModel] = Shelf(size)

    def get(self, name: str) -> HostModel:
        """A model; read, where it is not in memory.

        Raises:
            Refusal: 404 where there is none of this name, 422 where it can't be drawn with.
            TransferError: S3 does not answer.
        """
        if self._place is None or not is_adapter_name(name):
            raise _unknown(name)
        return self._shelf.get(name, self._read)

    def _read(self, name: str) -> HostModel:
        try:
            with _files(f"{str(self._place).rstrip('/')}/{name}", name) as directory:
                return self._seat.read(name, directory)
        except Refusal:
            raise
        except UserError as error:
            raise Refusal([f"model: {name}: {problem}" for problem in error.problems], 422) from None


@contextmanager
def _files(source: str, name: str) -> Iterator[Path]:
    """A directory with a model's files, which come from S3 as their manifest says."""
    if not is_s3(source):
        if not Path(source).is_dir():
            raise _unknown(name)
        yield Path(source)
        return
    client = storage.s3_client()
    if not storage.find_objects(S3Uri.parse(source), client=client):
        raise _unknown(name)
    with tempfile.TemporaryDirectory(prefix="model-", ignore_cleanup_errors=True) as folder:
        storage.download_directory(S3Uri.parse(source), Path(folder), client=client)
        yield Path(folder)


def _unknown(name: str) -> Refusal:
    return Refusal(f"model: {short(name)} is not known here", 404)


def _on_host(value: Tensor, *, copy: bool = True) -> Tensor:
    """In memory that the device reads by itself, where there is one."""
    there = value.to("cpu", copy=copy)
    return there.pin_memory() if torch.cuda.is_available() else there
