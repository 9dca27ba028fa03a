"""What jobs need whose models are measured and compared: trials of a search, executions of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreambooth_sm import toybox
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import asks_base_of_classes

# Pictures are measured with these where nothing else is said.
_ENCODERS = "dino=facebook/dinov2-base clip=openai/clip-vit-large-patch14"
# Below the launcher's own prefix: class images that such jobs share.
CLASS_CACHE = "class-cache"


def measuring(h: Hyperparameters, *, isolated: bool = False) -> dict[str, object]:
    """Hyperparameters that a job is measured by, as far as it does not have them.

    Args:
        isolated: whether the job has no network.

    Raises:
        UserError: nothing can measure it.
    """
    is_toybox = h.pretrained_model_name_or_path in toybox.SHIPPED
    if isolated and h.fidelity_encoders is None and not is_toybox:
        raise UserError(
            "fidelity_encoders: jobs without a network can't fetch what they are measured with; name directories of "
            "the image or of a channel, such as dino=/opt/ml/input/data/dino"
        )
    added: dict[str, object] = {}
    if h.fidelity_encoders is None:
        added["fidelity_encoders"] = "judge" if is_toybox else _ENCODERS
    if h.validation_prompt is None and h.instance_prompt is not None:
        added["validation_prompt"] = h.instance_prompt
    return added


def caching(h: Hyperparameters, class_cache: str | None, *, isolated: bool = False) -> dict[str, object]:
    """The hyperparameter by which jobs share class images, where they draw some.

    Args:
        class_cache: where; None: nowhere.
        isolated: whether the jobs have no network.
    """
    draws_classes = h.prior_preservation and not asks_base_of_classes(h)
    if class_cache and h.class_cache is None and draws_classes and not isolated:
        return {"class_cache": class_cache}
    return {}


def with_values(h: Hyperparameters, values: Mapping[str, Any]) -> Hyperparameters:
    """Hyperparameters with others in place of some of them.

    Raises:
        UserError: where they are refused.
    """
    return Hyperparameters.parse({**h.model_dump(exclude_unset=True), **values})
