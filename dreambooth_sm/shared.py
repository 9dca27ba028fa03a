"""An open base model, and what else is made once for all subjects of a fleet."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dreambooth_sm.fidelity import Encoders
from dreambooth_sm.memory import free_memory
from dreambooth_sm.methods import Resettable, Trainable
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.training.train import Bench


@dataclass(frozen=True)
class Opened:
    """A base model that is open, with what belongs to its training, whoever the subject is.

    Attributes:
        base: the base model. In a fleet what is trained lies beside it, so that it stays as it is.
        trainable: what is trained of it.
        reader: encodes pictures and prompts.
        digests: of its parts, see :func:`dreambooth_sm.resume.fingerprint`.
        encoders: that measure fidelity; None where nothing is measured.
    """

    base: PretrainedModel
    trainable: Trainable
    reader: PretrainedModel
    digests: dict[str, str]
    encoders: Encoders | None


@dataclass
class Shared:
    """What is made for the first subject of a fleet, and serves for the others.

    Attributes:
        scratch: directory for class images that can't go elsewhere.
        bench: that the trainings follow each other on.
    """

    scratch: Path
    bench: Bench = field(default_factory=Bench)
    _opened: Opened | None = None
    _plan: Plan | None = None

    def opened_for(self, plan: Plan, seed: int) -> Opened | None:
        """The model as it was before any training, if it is open for this plan; another one is let go of.

        Args:
            seed: that what is trained begins with.
        """
        if self._opened is None or self._plan != plan:
            self.forget()
            return None
        assert isinstance(self._opened.trainable, Resettable)
        self._opened.trainable.reset(seed)
        return self._opened

    def keep(self, opened: Opened, plan: Plan) -> None:
        """Remembers the model for later subjects, if what is trained of it can begin again."""
        if isinstance(opened.trainable, Resettable):
            self._opened, self._plan = opened, plan

    def forget(self) -> None:
        """Lets go of the model."""
        self.bench.clear()
        self._opened = self._plan = None
        free_memory()
