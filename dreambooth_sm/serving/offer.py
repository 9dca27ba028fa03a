"""What a served model can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dreambooth_sm.serving.settings import ServingSettings


@dataclass(frozen=True)
class KnownSubject:
    """A subject that the model, or an adapter, was taught.

    Attributes:
        prompt: that it was taught with.
        adapter: name of the adapter that knows it; None: the model itself.
    """

    prompt: str
    adapter: str | None = None


@dataclass(frozen=True)
class Offer:
    """What requests may ask for, and what they get where they don't say.

    Attributes:
        steps, guidance, size: of pictures where nobody says otherwise; width and height in pixels.
        multiple: of which sides have to be, in pixels.
        schedulers: names; the first is used where none is named.
        subjects: by name.
        settings: with the limits.
    """

    steps: int
    guidance: float
    size: tuple[int, int]
    multiple: int
    schedulers: tuple[str, ...]
    subjects: Mapping[str, KnownSubject] = field(default_factory=dict)
    settings: ServingSettings = field(default_factory=ServingSettings)
