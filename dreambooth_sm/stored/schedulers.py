"""The schedulers of diffusers that a diffusion model is trained and drawn with, by the noise schedule of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

# Schedulers that pictures can be drawn with by name, and their classes.
BY_NAME = {
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_a": "KDPM2AncestralDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}


def training_scheduler(scheduler: Any) -> DDPMScheduler:
    """Makes the scheduler that the model was trained with, whatever it draws with."""
    from dreambooth_sm.stored.classes import DDPMScheduler

    made: DDPMScheduler = DDPMScheduler.from_config(scheduler.config)
    return made


def drawing_scheduler(scheduler: Any) -> DPMSolverMultistepScheduler:
    """Makes the scheduler that pictures are drawn with, whatever the model's is: DPM-Solver++ on its schedule."""
    from dreambooth_sm.stored.classes import DPMSolverMultistepScheduler

    options = {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True}
    others = dict.fromkeys(("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"), False)
    made: DPMSolverMultistepScheduler = DPMSolverMultistepScheduler.from_config(scheduler.config, **options, **others)
    return made


def scheduler_by_name(scheduler: Any, name: str) -> Any:
    """Makes another scheduler on the noise schedule of a model's.

    Args:
        scheduler: the model's.
        name: one of ``BY_NAME``, or ``model``: another one like the model's.
    """
    from dreambooth_sm.stored.classes import named

    kind = type(scheduler) if name == "model" else named(BY_NAME[name])
    return kind.from_config(scheduler.config)
