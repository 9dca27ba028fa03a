"""What a served model can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dreambooth_sm.serving.settings import ServingSettings


@dataclass(frozen=True)
class Offer:
    """What requests may ask for, and what they get where they don't say.

    Attributes:
        steps, guidance, size: of pictures where nobody says otherwise; width and height in pixels.
        multiple: of which sides have to be, in pixels.
        schedulers: names; the first is used where none is named.
        subjects: prompts that the model was taught with, by the names of their subjects.
        settings: with the limits.
        find_prompt: the prompt of an adapter's subject, by the adapter's name; it may have to be read for that. It
            raises :class:`~dreambooth_sm.serving.refusal.Refusal` where an adapter can't be found.
        find_subjects: as ``subjects``, of another model by its name; likewise.
    """

    steps: int
    guidance: float
    size: tuple[int, int]
    multiple: int
    schedulers: tuple[str, ...]
    subjects: Mapping[str, str] = field(default_factory=dict)
    settings: ServingSettings = field(default_factory=ServingSettings)
    find_prompt: Callable[[str], str] | None = None
    find_subjects: Callable[[str], Mapping[str, str]] | None = None
