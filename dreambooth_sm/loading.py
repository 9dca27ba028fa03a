"""Opens the base model of a job, with what is trained of it."""

from __future__ import annotations

import torch

from dreambooth_sm import fetching
from dreambooth_sm.context import Context
from dreambooth_sm.fidelity import load_encoders
from dreambooth_sm.methods import Resettable, encodes_in_steps
from dreambooth_sm.models import PretrainedModel, open_base
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.resume import fingerprint
from dreambooth_sm.shared import Opened


def open_model(job: Context, plan: Plan, seed: int) -> Opened:
    """The base model with what is trained of it: loaded or, in a fleet, what the subject before has left.

    Args:
        seed: that what is trained begins with.
    """
    if job.shared and (kept := job.shared.opened_for(plan, seed)):
        return kept
    from dreambooth_sm.stored import classes  # noqa: F401 - imports the libraries while the files are on their way

    fetching.wait(job.h, job.stop)
    job.stop_if_asked()
    # Host memory is short where cards are small: weights wait in the precision of their files, unless they are
    # drawn with as they are.
    on_host = torch.float32 if plan.device == "cpu" or plan.precision == "fp32" else None
    base = open_base(job.h, on_host)
    for remark in base.remarks:
        job.report.warn(remark)
    trained_in = base.apart() if job.shared else base
    trainable = job.method.attach(trained_in, plan, job.h, seed)
    resident = job.shared and isinstance(trainable, Resettable)
    reader = _resident_reader(base, plan, job) if resident else trainable.model
    encoders = None
    if job.h.fidelity_encoders and job.world.is_main:
        # Before class images are made: encoders that can't be had end the job here. On the CPU: the card's memory is
        # planned for training.
        encoders = load_encoders(job.h.fidelity_encoders)
    opened = Opened(base, trainable, reader, fingerprint(base), encoders)
    if job.shared:
        job.shared.keep(opened, plan)
    return opened


def _resident_reader(base: PretrainedModel, plan: Plan, job: Context) -> PretrainedModel:
    """The base model with parts on the device that encode the pictures and prompts of all subjects."""
    stays = ["vae"]
    if not encodes_in_steps(plan, job.h) and not base.family.facts.footprint.has_language_model:
        stays += base.text_parts
    return base.with_parts({part: base.part(part, plan.device, torch.float32) for part in stays})
