"""What the files of a family's models have to be like, where they are not those of Stable Diffusion. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, TypeGuard


class FileRules(Protocol):
    """One kind of pipeline directory."""

    @property
    def classes(self) -> Mapping[str, str]:
        """The classes of diffusers and transformers that its modules and tokenizers are of, by part."""

    def config_problems(self, part: str, config: Mapping[str, Any], where: str) -> list[str]:
        """What of a module's configuration training does not know.

        Args:
            where: what messages call the configuration.
        """

    def fit_problems(self, pipeline: Any) -> list[str]:
        """What keeps the parts of a pipeline from belonging together."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a configuration is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
