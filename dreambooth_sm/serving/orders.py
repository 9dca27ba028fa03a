"""Requests that were taken, while their pictures are drawn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL.Image import Image

from dreambooth_sm.serving.full_models import HostModel
from dreambooth_sm.serving.host_adapter import HostAdapter
from dreambooth_sm.serving.requests import PictureRequest


@dataclass(frozen=True)
class Withheld:
    """What is answered in place of a picture that the safety check does not let through.

    Attributes:
        label: that the check gives it.
        certainty: from 0 to 1.
    """

    label: str
    certainty: float


@dataclass(frozen=True)
class Shown:
    """A picture that whoever waits may see.

    Attributes:
        number: among those of its request, from 0.
        picture: or why it is not shown, of one that is done.
        step, steps: that were taken, and of how many; None: it is done.
    """

    number: int
    picture: Image | Withheld
    step: int | None = None
    steps: int | None = None


@dataclass(eq=False)
class Order:
    """A request that was taken.

    Attributes:
        adapters: that draw it, with their strengths.
        model: that draws it; None: the one that is served.
        show: is told of each picture that is done or to be looked at, in the thread that draws.
        pictures: the future of all of its pictures, in their order.
        reading: seconds that its adapters took to be there.
        taken, begun: when it came, and when its first picture was begun; None: it waits.
        batch: most pictures, of whatever request, that were drawn together with one of its own.
    """

    request: PictureRequest
    adapters: Sequence[tuple[HostAdapter, float]] = ()
    model: HostModel | None = None
    show: Callable[[Shown], None] | None = None
    pictures: Future[list[Image | Withheld]] = field(default_factory=Future)
    reading: float = 0.0
    taken: float = field(default_factory=time.monotonic)
    begun: float | None = None
    batch: int = 0
    _drawn: dict[int, Image | Withheld] = field(default_factory=dict)
    _given_up: threading.Event = field(default_factory=threading.Event)

    def give_up(self) -> None:
        """Nobody waits for it any more: what is not drawn yet is not drawn."""
        self._given_up.set()

    @property
    def is_over(self) -> bool:
        """Whether nothing more has to be drawn of it."""
        return self._given_up.is_set() or self.pictures.done()

    def add(self, number: int, picture: Image | Withheld) -> None:
        """Gives it one of its pictures, or says why not."""
        if self.show:
            self.show(Shown(number, picture))
        self._drawn[number] = picture
        if len(self._drawn) == len(self.request.prompts) and not self.pictures.done():
            self.pictures.set_result([self._drawn[each] for each in sorted(self._drawn)])

    def fail(self, error: BaseException) -> None:
        """Ends it without pictures."""
        if not self.pictures.done():
            self.pictures.set_exception(error)
