"""Chooses the best checkpoint: by measure, not by being the last.

Every kept checkpoint draws the same pictures, of each subject in several places and of its class. They are measured
with :mod:`dreambooth_sm.fidelity`, and scored against the untrained base model: subject fidelity, less what it cost in
diversity, prompt fidelity and drift of the class towards the subject (:func:`dreambooth_sm.fidelity.score`).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.data.pictures import View, crop, open_picture
from dreambooth_sm.fidelity import Encoders, Fidelity, measure, measure_real, score, verdict
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import Trainable, encodes_in_steps
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.onlookers import DrawingCopy
from dreambooth_sm.planning.measuring import CLASS_PICTURES, PLACES
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.report import Reporter
from dreambooth_sm.sampling import draw, embed_prompts, make_sampler
from dreambooth_sm.training.checkpoint import Checkpoint, all_checkpoints

_GUIDANCE = 3.0
_SEED = 1_000


@dataclass(frozen=True)
class Candidate:
    """One state of the model.

    Attributes:
        step: optimizer steps done; 0 for the base model.
        fidelities: one for each subject.
        score: mean over the subjects.
    """

    step: int
    fidelities: tuple[Fidelity, ...]
    score: float

    def metrics(self) -> dict[str, float | None]:
        """For the log; means over the subjects."""
        return {"score": self.score} | {
            field.name: _mean([getattr(fidelity, field.name) for fidelity in self.fidelities])
            for field in fields(Fidelity)
        }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


class Examiner:
    """Measures a model again and again, in the same way; with ``fidelity_steps`` while training continues as well.

    Args:
        trained: the model; it is measured as it is now, before training.
        subjects: with their class pictures.
    """

    def __init__(
        self,
        trained: Trainable,
        subjects: tuple[Subject, ...],
        encoders: Encoders,
        h: Hyperparameters,
        plan: Plan,
        report: Reporter,
    ) -> None:
        self._trained, self._subjects, self._encoders, self._h, self._plan = trained, subjects, encoders, h, plan
        self._report = report
        square = (h.resolution, h.resolution)
        self._real = [[crop(open_picture(path, square), square, View()) for path in s.pictures] for s in subjects]
        self._own = [[f"{subject.prompt} {place}".strip() for place in PLACES] for subject in subjects]
        classes = [subject.class_prompt for subject in subjects if subject.class_prompt]
        self._prompts = [*itertools.chain(*self._own), *classes]
        self._copy = DrawingCopy(trained, plan) if h.fidelity_steps else None
        # Unless training changes it: text encoders may be larger than what training leaves of a card.
        embeds = self._copy is not None and not encodes_in_steps(plan, h)
        self._embedded = embed_prompts(trained.model, plan, self._prompts, _GUIDANCE) if embeds else None
        # Measured while training continued, by their steps.
        self._seen: dict[int, Candidate] = {}
        self._before = self._measure(trained.model, plan.sample_batch_size)
        self.examine(0)

    def examine(self, step: int) -> Candidate:
        """Measures the model as it is now, after ``step`` steps, and logs what it finds."""
        found = self._measure(self._trained.model, self._plan.sample_batch_size) if step else self._before
        return self._candidate(step, found)

    def _candidate(self, step: int, found: tuple[Fidelity, ...]) -> Candidate:
        scores = [score(now, before) for now, before in zip(found, self._before, strict=True)]
        candidate = Candidate(step, found, statistics.fmean(scores))
        self._report.metrics(candidate=step, **candidate.metrics())
        return candidate

    def is_due(self, step: int) -> bool:
        """See :class:`~dreambooth_sm.onlookers.Onlooker`."""
        return self._copy is not None and step % self._h.fidelity_steps == 0

    def look(self, weights: Iterable[tuple[str, Tensor]], step: int) -> None:
        """See :class:`~dreambooth_sm.onlookers.Onlooker`."""
        assert self._copy is not None
        model = self._copy.take(weights)
        try:
            found = self._measure(model, 1)  # the plan counts the memory for one
        except torch.OutOfMemoryError:
            self._copy = None
            self._report.warn(f"no memory to measure at step {step}; the next measures come after training")
        else:
            self._seen[step] = self._candidate(step, found)

    def choose(self, checkpoints: Sequence[Checkpoint], final_step: int) -> Candidate:
        """Puts the weights of the best of ``checkpoints`` and the present state into the model; the later one wins
        a draw.

        Args:
            checkpoints: of this job, other than the present state.
            final_step: steps that the present state has taken.
        """
        present = self.examine(final_step)
        parameters = self._trained.parameters
        final = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        candidates = [present]
        for checkpoint in checkpoints:
            if checkpoint.step not in self._seen:
                restore(parameters, checkpoint.load())
                self._seen[checkpoint.step] = self.examine(checkpoint.step)
            candidates.append(self._seen[checkpoint.step])
        best = max(candidates, key=lambda candidate: (candidate.score, candidate.step))
        if best is present:
            restore(parameters, {"weights": final, "ema": None})
        else:
            restore(parameters, next(c for c in checkpoints if c.step == best.step).load())
        self._report.metrics(best=best.step, **best.metrics(), of=len(candidates))
        return best

    def conclude(self, steps: int, identity: dict[str, Any], checkpoints: Path) -> None:
        """Says how well the model was trained; with ``select_best``, goes back to the best checkpoint before.

        Args:
            steps: that the present state has taken.
            identity: of the job, whose checkpoints alone are candidates.
            checkpoints: where they lie.
        """
        if self._h.select_best:
            own = [c for c in all_checkpoints(checkpoints) if c.belongs_to(identity) and c.step < steps]
            candidate = self.choose([c for c in own if c.is_undamaged()], steps)
        else:
            candidate = self.examine(steps)
        self.say_verdict(candidate)

    def say_verdict(self, candidate: Candidate) -> None:
        """Says in words whether the model was trained too little or too much."""
        rows = zip(self._subjects, candidate.fidelities, self._before, self._real, strict=True)
        for subject, found, before, real in rows:
            if len(real) > 1:
                words = verdict(found, before, measure_real(self._encoders, real))
                self._report.verdict(f'{words.word}: "{subject.prompt}": {words.reason}')

    def _measure(self, model: PretrainedModel, batch_size: int) -> tuple[Fidelity, ...]:
        sampler = make_sampler(model, self._plan, self._prompts, _GUIDANCE, self._embedded)

        def pictures(prompt: str, seeds: Sequence[int]) -> list[Image.Image]:
            batches = draw(
                sampler,
                prompt,
                list(seeds),
                resolution=self._h.resolution,
                batch_size=batch_size,
                guidance=_GUIDANCE,
            )
            return [picture for batch in batches for picture in batch]

        found = []
        for subject, real, prompts in zip(self._subjects, self._real, self._own, strict=True):
            found.append(
                measure(
                    self._encoders,
                    training=real,
                    generated=[pictures(prompt, [_SEED + n])[0] for n, prompt in enumerate(prompts)],
                    prompts=prompts,
                    class_pictures=pictures(subject.class_prompt, range(_SEED, _SEED + CLASS_PICTURES))
                    if subject.class_prompt
                    else (),
                )
            )
        return tuple(found)


def restore(parameters: Mapping[str, torch.nn.Parameter], state: Mapping[str, Any]) -> None:
    """Puts the weights of a checkpoint into the parameters: the average's where it has one."""
    values: Iterable[Tensor] = (state["weights"][name] for name in parameters)
    if state["ema"]:
        values = state["ema"]["average"]
    with torch.no_grad():
        for parameter, value in zip(parameters.values(), values, strict=True):
            parameter.copy_(value)
