"""Knobs for what is kept of a run while it lasts."""

from __future__ import annotations

from typing import Literal

from dreambooth_sm.knobs.declare import Knobs, knob
from dreambooth_sm.knobs.ranges import Few, Steps, StepsOrNone


class CheckpointKnobs(Knobs):
    """Checkpoints, and the lines of the log."""

    group = "Checkpoints and logs"

    save_steps: StepsOrNone = knob(
        0,
        "Save a checkpoint every so many steps (or epochs, see save_use_epochs) and at the end; 0: only when stopped "
        "and at the end.",
        resume="free",
    )
    save_use_epochs: bool = knob(False, "Count save_steps in epochs.", resume="free")
    checkpoints_total_limit: Few = knob(2, "Checkpoints kept; older ones are removed.", resume="free")
    resume_from_checkpoint: Literal["latest", "no"] = knob(
        "latest",
        "latest: resume from the newest whole checkpoint, if there is one; the job has to be the same as far as the "
        "weights can tell, and may take more steps. no: start again.",
        resume="free",
    )
    logging_steps: Steps = knob(10, "Steps between two metric lines.", resume="free")
