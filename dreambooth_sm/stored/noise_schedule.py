"""The noise schedule that a model was trained with, as its scheduler's configuration tells it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from dreambooth_sm.errors import UserError
from dreambooth_sm.stored.configs import class_name, make, plainly
from dreambooth_sm.stored.schedulers import drawing_scheduler, training_scheduler

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

PREDICTIONS = ("epsilon", "v_prediction")
# What a schedule is made of. Schedulers have defaults of their own for it, so that all of it is said.
_BETAS = ("beta_start", "beta_end", "beta_schedule")
_SCHEDULE = (*_BETAS, "trained_betas", "num_train_timesteps", "prediction_type", "rescale_betas_zero_snr")
_MOST_STEPS = 100_000
# Of straight ways from noise.
_FLOW_SCHEDULER, _FLOW_TIMES = "FlowMatchEulerDiscreteScheduler", 1000
_OTHERWISE = ("invert_sigmas", "stochastic_sampling", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_WANTED = "this project trains models that predict epsilon or v over steps of rising noise (betas), as DDPM has them"


def make_scheduler(config: Mapping[str, Any], where: str) -> tuple[SchedulerMixin, list[str]]:
    """The scheduler of a configuration, all of whose schedule is in its own, and remarks on what was left to defaults.

    Args:
        where: what messages call the configuration.

    Raises:
        UserError: where it names no scheduler of diffusers, or values that make none.
    """
    from dreambooth_sm.stored.classes import EulerDiscreteScheduler, SchedulerMixin, diffusers

    name = class_name(config)
    kind: Any = getattr(diffusers, name, None) if name else None
    # What diffusers has in place of a class whose library is not installed.
    needed = getattr(kind, "_backends", None) if name.endswith("Scheduler") else None
    known = inspect.isclass(kind) and issubclass(kind, SchedulerMixin)
    if not (known or needed):
        raise UserError(f"{where}: {name!r} is not a scheduler of diffusers {diffusers.__version__}; {_WANTED}")
    steps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    problems = [
        f"{where}: {key} is {plainly(config[key])} and should be a number from 0 to before 1"
        for key in ("beta_start", "beta_end")
        if key in config and not _is_beta(config[key])
    ]
    if type(steps) is not int or not 1 < steps <= _MOST_STEPS:
        problems.append(f"{where}: num_train_timesteps is {plainly(steps)} and should be a number such as 1000")
    if betas is not None and not (isinstance(betas, list) and betas and all(map(_is_beta, betas))):
        problems.append(f"{where}: trained_betas is {plainly(betas)} and should be numbers from 0 to before 1")
    if problems:
        raise UserError(problems)
    remarks = []
    if needed:
        if not set(_BETAS) <= config.keys():
            raise UserError(f"{where}: {name} needs {needed[-1]}, which is not installed; {_WANTED}")
        kind = EulerDiscreteScheduler
        remarks = [f"{where}: {name} needs {needed[-1]}, which is not installed; the model gets {kind.__name__}"]
    settings = {key: value for key, value in config.items() if key != "_class_name"}
    scheduler = make(kind.from_config, settings, where, name)
    said = {key: scheduler.config[key] for key in _SCHEDULE if key in scheduler.config}
    scheduler = make(kind.from_config, settings | said, where, name)
    missing = [key for key in _BETAS if key in said and key not in config] if betas is None else []
    defaults = ", ".join(f"{key}={said[key]}" for key in missing)
    return scheduler, remarks + ([f"{where} does not say {defaults}, which is diffusers' default"] if missing else [])


def _is_beta(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value < 1


def check_schedule(scheduler: Any, where: str) -> None:
    """Raises UserError where training would be with another schedule or target than the model's own."""
    name, config = type(scheduler).__name__, scheduler.config
    own = getattr(scheduler, "alphas_cumprod", None)
    flow = config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous"
    if not isinstance(own, torch.Tensor) or flow:
        kind = f"{name} with continuous times" if flow else name
        raise UserError(f"{where}: its scheduler is {kind}; {_WANTED}")
    if config.get("prediction_type") not in PREDICTIONS:
        predicted = plainly(config.get("prediction_type"))
        raise UserError(
            f"{where}: prediction_type is {predicted}; {_WANTED}. If it is wrong, set prediction_type to epsilon or "
            "v_prediction"
        )
    try:
        trained = training_scheduler(scheduler).alphas_cumprod
    except Exception as error:  # of another kind of schedule than DDPM knows
        raise UserError(
            f"{where}: its scheduler is {name}, whose schedule DDPM does not have ({error!r:.100}); {_WANTED}"
        ) from None
    # Some let the last step, which is noise alone, keep a trace of the picture.
    same = trained.shape == own.shape and torch.allclose(trained.double(), own.double(), rtol=1e-4, atol=1e-6)
    if not same or len(trained) != config.num_train_timesteps:
        raise UserError(f"{where}: its scheduler is {name}, whose schedule is not what DDPM makes of its settings")
    if not (bool((trained[1:] <= trained[:-1]).all()) and 0 <= trained[-1] < trained[0] <= 1):
        raise UserError(f"{where}: its betas make no schedule, in which noise rises from step to step")
    try:
        drawing_scheduler(scheduler).set_timesteps(2)
    except Exception as error:
        raise UserError(f"{where}: pictures can't be drawn with its settings ({error!r:.200})") from None


def check_flow(scheduler: Any, where: str) -> None:
    """Raises UserError where a model is not drawn by straight ways from noise, as it was trained."""
    name, config = type(scheduler).__name__, scheduler.config
    problems = []
    if name != _FLOW_SCHEDULER:
        problems.append(f"its scheduler is {name}, and the model is drawn with {_FLOW_SCHEDULER}")
    problems += [f"{key} is true, which the model was not trained with" for key in _OTHERWISE if config.get(key)]
    if config.get("num_train_timesteps") != _FLOW_TIMES:
        problems.append(f"num_train_timesteps is {config.get('num_train_timesteps')!r:.60} and should be {_FLOW_TIMES}")
    shift = config.get("shift")
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift <= 100:
        problems.append(f"shift is {shift!r:.60} and should be a number such as 6.0")
    if problems:
        raise UserError(f"{where}: {problem}; take the model's own scheduler_config.json" for problem in problems)
