"""An image classifier of the user's own that looks at pictures before they are answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from dreambooth_sm.errors import UserError
from dreambooth_sm.importing import importing
from dreambooth_sm.knobs.messages import short
from dreambooth_sm.serving.orders import Withheld


class SafetyCheck:
    """Finds pictures that are not to be answered.

    Args:
        directory: holds a model of transformers that classifies images, with its processor.
        labels: of the model; pictures of one of them are withheld.
        percent: of certainty from which on a picture counts as one of a label.
        device: that it computes on.

    Raises:
        UserError: where the model can't be read, or does not know a label.
    """

    def __init__(self, directory: Path, labels: tuple[str, ...], percent: int, device: torch.device) -> None:
        with importing():
            from transformers import AutoImageProcessor, AutoModelForImageClassification
        try:
            self._processor = AutoImageProcessor.from_pretrained(directory)
            self._model: Any = AutoModelForImageClassification.from_pretrained(directory)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"SERVE_SAFETY_MODEL: {directory} can't be read ({reason}); name a model of transformers that "
                "classifies images, with its preprocessor_config.json"
            ) from error
        self._model.to(device).eval()
        known = {str(label): number for number, label in self._model.config.id2label.items()}
        if strangers := [label for label in labels if label not in known]:
            raise UserError(
                f"SERVE_SAFETY_LABELS: {', '.join(map(short, strangers))}: the model knows {', '.join(sorted(known))}"
            )
        self._labels = {label: int(known[label]) for label in labels}
        self._least, self._device = percent / 100, device

    @torch.no_grad()
    def __call__(self, picture: Image) -> Withheld | None:
        """Says why a picture is withheld; None: it is not."""
        seen = self._processor(images=picture.convert("RGB"), return_tensors="pt").to(self._device)
        certainties = self._model(**seen).logits[0].float().softmax(0).tolist()
        label = max(self._labels, key=lambda each: certainties[self._labels[each]])
        certainty = certainties[self._labels[label]]
        return Withheld(label, certainty) if certainty >= self._least else None
