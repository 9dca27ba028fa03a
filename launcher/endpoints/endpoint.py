"""What all endpoints can do, wherever they are."""

from __future__ import annotations

import base64
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from dreambooth_sm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


class EndpointFailed(Exception):  # noqa: N818 - what it means is said best like this
    """An endpoint ended, could not be made or changed, or could not draw."""


@dataclass(frozen=True)
class StreamedPicture:
    """A picture of an answer that comes bit by bit.

    Attributes:
        number: among those of the request, from 0.
        step: after which it looks like this; None: it is done.
    """

    number: int
    picture: Image
    step: int | None = None


class Endpoint(ABC):
    """Draws with a trained model on request, until :meth:`delete`. Used as a context, it is deleted at the end of it.

    Attributes:
        name: of the endpoint.
    """

    name: str

    def draw(self, prompt: str | None = None, **options: Any) -> list[Image]:
        """Draws pictures.

        Args:
            options: fields of the request, such as ``number``, ``steps``, ``seed``, ``subject``, ``adapters``.

        Returns:
            the pictures, in the order of the answer.

        Raises:
            UserError: with everything that is wrong with the request; or its safety check withholds a picture.
            EndpointFailed: where the endpoint could not draw.
        """
        from PIL import Image

        drawn = self.invoke({"prompt": prompt, **options})["pictures"]
        _check_shown(drawn)
        return [Image.open(io.BytesIO(base64.b64decode(each["picture"]))) for each in drawn]

    def stream(self, prompt: str | None = None, *, previews: int = 4, **options: Any) -> Iterator[StreamedPicture]:
        """Draws pictures, and shows them while they are drawn.

        Args:
            previews: of each picture, before it is done.
            options: as of :meth:`draw`.

        Yields:
            each picture as soon as it is done, and its previews before it.

        Raises:
            UserError, EndpointFailed: as :meth:`draw`, also after some pictures.
        """
        from PIL import Image

        for line in self.invoke_lines({"prompt": prompt, "previews": previews, **options}):
            if problems := line.get("errors"):
                raise EndpointFailed("\n".join(problems))
            _check_shown([line])
            picture = Image.open(io.BytesIO(base64.b64decode(line["picture"])))
            yield StreamedPicture(line["number"], picture, line.get("step"))

    @abstractmethod
    def invoke_lines(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Sends a request as it is, and yields the lines of its answer as they come; raises what :meth:`draw` raises
        before the first."""

    @abstractmethod
    def invoke(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a request as it is, and returns the answer; raises what :meth:`draw` raises."""

    @abstractmethod
    def wait(self) -> Self:
        """Waits until it can draw.

        Raises:
            EndpointFailed: it never will; with the reason and the end of its log.
        """

    @abstractmethod
    def update(self, model: Any = None, **changes: Any) -> Self:
        """Serves another model, or the same one otherwise. The old one answers until the new one does.

        Args:
            model: what :func:`launcher.deploy` takes; None: the one that is served now.
            changes: other arguments of :func:`launcher.deploy`, for what is not to stay as it is.

        Raises:
            UserError: with everything that is wrong with the changes.
            EndpointFailed: the new one can't draw; the old one still does.
        """

    @abstractmethod
    def delete(self) -> None:
        """Ends it, and removes what was made for it, and nothing else."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.delete()


def _check_shown(pictures: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError where a picture is withheld."""
    if labels := sorted({each["withheld"] for each in pictures if "withheld" in each}):
        raise UserError(
            f"the endpoint's safety check withholds a picture ({', '.join(labels)}); ask with another seed or prompt, "
            "or call invoke, whose answer has the others"
        )
