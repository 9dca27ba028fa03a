"""What is drawn to measure a model."""

from __future__ import annotations

from dreambooth_sm.hyperparameters import Hyperparameters

# What the pictures of a subject show beside it; DreamBooth's paper asks for such places as well.
PLACES: tuple[str, ...] = (
    "",
    "on the beach",
    "in the snow",
    "on a table",
    "at night",
    "in a room",
    "in the meadow",
    "on the street",
)
CLASS_PICTURES = 16


def measured_pictures(h: Hyperparameters, steps: int) -> tuple[int, int]:
    """How many pictures a job of so many steps draws to measure its model: before and after training, and, one by one,
    while it continues."""
    if h.fidelity_encoders is None:
        return 0, 0
    concepts = h.inline_concepts
    classes = sum(bool(each.class_prompt or h.class_prompt) for each in concepts) if concepts else bool(h.class_prompt)
    pictures = len(PLACES) * max(1, len(concepts)) + CLASS_PICTURES * classes
    on_the_way = (steps - 1) // h.fidelity_steps if h.fidelity_steps else 0
    chooses = h.select_best and h.save_steps and not h.fidelity_steps
    kept = min(h.checkpoints_total_limit, (steps - 1) // h.save_steps) if chooses else 0
    return pictures * (2 + kept), pictures * on_the_way
