"""The methods of teaching a model, a file each: which of its parameters are trained, how, and what is exported.

A method meets a model only at named parameters: their names are the keys of checkpoints, and their order is that of
optimizers and averages. The files are light: plan and launcher read them, so that torch is imported where it is used.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from dreambooth_sm.planning.ladder import Rung

if TYPE_CHECKING:
    import torch

    from dreambooth_sm.families import ModelFootprint
    from dreambooth_sm.hyperparameters import Hyperparameters
    from dreambooth_sm.models import PretrainedModel
    from dreambooth_sm.planning.plan import Plan


class Trainable(Protocol):
    """A base model with what is trained of it.

    Attributes:
        model: the base model, or one that shares its weights and reads other prompts than it. What is added to it for
            training is in it from :meth:`place` on, and stays.
        parameters: what is trained, by names that stay: full-precision values before training and after it. On the
            meta device, as long as they are not loaded.
        rates: by what factor of ``learning_rate`` parameters are trained, by their names; by 1 where nothing is said.
    """

    model: PretrainedModel

    @property
    def rates(self) -> Mapping[str, float]: ...

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]: ...

    def load(self) -> None:
        """Reads what the training step runs into memory, to stay there."""

    def place(self, plan: Plan, device: torch.device) -> None:
        """Puts what the training step runs on the device, in the plan's precision, with gradients where it trains.
        May be called again, with a smaller plan.

        Raises:
            torch.OutOfMemoryError: the caller puts the parameters' values back.
        """

    def drawable(self, dtype: torch.dtype) -> Trainable:
        """One that pictures are drawn with while this one is trained: its parameters take the values of training, in
        ``dtype``, and leave training's own alone."""

    def export(self, directory: Path, h: Hyperparameters, dtype: torch.dtype | None) -> None:
        """Writes what was trained, in the formats that are asked for.

        Args:
            dtype: of the files' values; None leaves them as they are.

        Raises:
            OutOfRange: where values are too large for ``dtype``.
        """

    def exported_values(self, h: Hyperparameters) -> int:
        """Counts the values that :meth:`export` writes."""


@runtime_checkable
class Removable(Protocol):
    """What is trained beside a base model, and can be left out while something is computed."""

    def untrained(self) -> AbstractContextManager[None]:
        """Inside, the model computes what its base does, and encodes prompts as that does."""


@runtime_checkable
class Resettable(Protocol):
    """What is trained again and again, from the beginning each time, without loading the base model again."""

    def reset(self, seed: int) -> None:
        """Gives the parameters, which stay the same objects, the values on the CPU that they would begin with."""


@runtime_checkable
class Measurable(Protocol):
    """What is trained beside a base model, and says how far that makes the model another one."""

    def distance(self) -> torch.Tensor:
        """The squared difference of all weights that a merged model has from the base's, added up: float32 ``()``, with
        its graph."""


@runtime_checkable
class Watching(Protocol):
    """What is trained in a way that depends on the rows of a step."""

    def watch(self, noise: torch.Tensor, times: torch.Tensor, count: int) -> None:
        """Is told the rows of each forward pass of training before it; on the device, and they stay until the backward
        pass is over.

        Args:
            noise: ``(rows, channels, height, width)`` float32.
            times: int64 ``(rows,)``, below ``count``.
        """


class Method(Protocol):
    """One way of teaching.

    Attributes:
        name: as the hyperparameter ``method`` says it, and of its file.
        trains: what it trains of the denoiser, in a word.
        title: what was done to the base model, for model cards.
        hub: what the front matter of model cards says of it, and ``tags``, which come after the family's.
        ladder: its settings, from the most generous to the smallest.
        leaves_base: whether the base model stays as it is, and what is trained lies beside it.
        trains_text_encoder: whether it can train the text encoders beside the denoiser.
        encodes_prompts: whether what it trains changes how frozen text encoders read prompts, so that every step has to
            encode its own.
        has_live_base: whether what it trains is :class:`Removable`, so that training steps can ask the base model.
    """

    @property
    def name(self) -> str: ...

    @property
    def trains(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def hub(self) -> Mapping[str, str]: ...

    @property
    def tags(self) -> tuple[str, ...]: ...

    @property
    def ladder(self) -> tuple[Rung, ...]: ...

    @property
    def leaves_base(self) -> bool: ...

    @property
    def trains_text_encoder(self) -> bool: ...

    @property
    def encodes_prompts(self) -> bool: ...

    @property
    def has_live_base(self) -> bool: ...

    def trained_millions(self, footprint: ModelFootprint, h: Hyperparameters, text_encoder: bool) -> float:
        """Millions of parameters that are trained.

        Args:
            text_encoder: whether the text encoders are trained.
        """

    def activations(self, h: Hyperparameters) -> str:
        """Begins the names of the figures of what a step keeps of a picture: ``activations_gb`` where it keeps all,
        ``checkpointed_gb`` where it recomputes."""

    def attach(self, model: PretrainedModel, plan: Plan, h: Hyperparameters, seed: int) -> Trainable:
        """Makes what is trained; on the CPU, and the model stays as it is."""

    def usage(self, pipeline: str, base: str, prompt: str, hyperparameters: Mapping[str, Any]) -> str:
        """Tells model cards how to draw with what is exported: Markdown, with the prompt and all names in code alone.

        Args:
            pipeline: the class of diffusers that draws with the base model.
            base: the base model, as that class takes it.
            prompt: to draw.
            hyperparameters: of the job, by name.
        """


# Every file beside this one is a method.
METHODS: dict[str, Method] = {
    name: importlib.import_module(f"{__name__}.{name}").METHOD for _, name, _ in pkgutil.iter_modules(__path__)
}


def encodes_in_steps(plan: Plan, h: Hyperparameters) -> bool:
    """Whether training steps encode their prompts; otherwise all are encoded once, before training."""
    return plan.train_text_encoder or METHODS[h.method].encodes_prompts


def exports_base(h: Hyperparameters) -> bool:
    """Whether the base model's weights are in what is exported."""
    return not METHODS[h.method].leaves_base or h.export in ("merged", "both")


def asks_base(h: Hyperparameters) -> bool:
    """Whether training steps ask the base model what it says of some of their rows."""
    return h.prior == "dco" or asks_base_of_classes(h)


def asks_base_of_classes(h: Hyperparameters) -> bool:
    """Whether training steps ask the base model for what it says of the class, and train towards that."""
    return h.prior_preservation and h.prior == "output" and METHODS[h.method].has_live_base
