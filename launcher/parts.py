"""The parts of a job's time beside its steps, each with where its seconds come from.

SageMaker bills from TrainingStartTime to TrainingEndTime, as its API's reference says: the channels, the training image
and the upload are in it, the wait for an instance is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS
from dreambooth_sm.planning.figures import figure
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.toybox import SHIPPED
from launcher.jobs.times import Median, OwnTimes
from launcher.jobs.warm_pools import WarmPool

# Names of parts.
INSTANCE, IMAGE, BASE_MODEL = "instance", "training image", "base model"
# Bytes of a parameter in the files of a base model, and in those that are written: 16 bits.
_BYTES = 2


def in_minutes(minutes: float) -> str:
    """Whole ones in words, at least one."""
    count = max(1, round(minutes))
    return f"{count} minute{'s' * (count > 1)}"


@dataclass(frozen=True)
class JobPart:
    """A part of a job's time.

    Attributes:
        name: for people.
        source: of its seconds: ``measured``, ``computed``, ``assumed``, or the account's own jobs.
        is_billed: whether it is paid for.
    """

    name: str
    seconds: float
    source: str
    is_billed: bool = True

    def line(self) -> str:
        """``training image: 1.2 minutes (4.3 GB, computed, at 60 MB/s, assumed)``."""
        billed = "" if self.is_billed else ", not billed"
        return f"{self.name}: {self.seconds / 60:.1f} minutes{billed} ({self.source})"


@dataclass(frozen=True)
class Known:
    """What an account says about a job before it starts.

    Attributes:
        image_bytes: of the training image, compressed, as ECR has it; None: not asked.
        own: times of the account's last jobs that are like it.
        pools: warm pools of its instance type, those that it matches first.
    """

    image_bytes: int | None = None
    own: OwnTimes = field(default_factory=OwnTimes)
    pools: tuple[WarmPool, ...] = ()

    @property
    def pool(self) -> WarmPool | None:
        """The warm pool that the job will run in."""
        return self.pools[0] if self.pools and not self.pools[0].differences else None


# Where no account is asked.
NOTHING = Known()


def before_training(h: Hyperparameters, known: Known) -> list[JobPart]:
    """From the request to the first phase that depends on the card."""
    parts = _cold(h, known.own, known.image_bytes)
    return parts if known.pool is None else [_warm(part, known.pool, h) for part in parts]


def pool_lines(h: Hyperparameters, known: Known) -> Iterator[str]:
    """What warm pools save, or why the nearest one is of no use."""
    if pool := known.pool:
        parts = [(part, _warm(part, pool, h)) for part in _cold(h, known.own, known.image_bytes)]
        saved = {cold.name: cold.seconds - warm.seconds for cold, warm in parts if warm != cold}
        what = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in saved.items())
        minutes = sum(saved.values()) / 60
        yield f"warm pool: that of {pool.job}, until {pool.until:%H:%M} UTC, saves about {minutes:.1f} minutes ({what})"
    elif known.pools:
        nearest = known.pools[0]
        yield f"warm pool: that of {nearest.job} can't be used ({'; '.join(nearest.differences)})"


def keeping_line(h: Hyperparameters, known: Known, seconds: int, usd_per_hour: float | None) -> str:
    """What it costs that SageMaker keeps the instances of a job for so many seconds, beside what the next job saves.

    Args:
        usd_per_hour: of all instances; None where the price is not known.
    """
    pool = WarmPool("this job", datetime.now(UTC) + timedelta(seconds=seconds), (), has_image=True, has_model=True)
    saved = sum(part.seconds - _warm(part, pool, h).seconds for part in _cold(h, known.own, known.image_bytes)) / 60
    cost = "at an unknown price"
    if usd_per_hour is not None:
        cost = f"${usd_per_hour / 60:.3f} a minute, ${usd_per_hour * seconds / 3600:.2f} at most"
    return (
        f"keep_alive: up to {in_minutes(seconds / 60)} after the job are billed as it is, until another begins there: "
        f"{cost}; one like this would begin about {saved:.1f} minutes sooner"
    )


def _cold(h: Hyperparameters, own: OwnTimes, image_bytes: int | None) -> list[JobPart]:
    return [
        _part(INSTANCE, own.waiting, lambda: (_known("waiting_s"), "assumed"), is_billed=False),
        _part(IMAGE, own.start, lambda: _pull(image_bytes)),
        _part(BASE_MODEL, own.base_model, lambda: _fetch(h)),
        JobPart("checks, loading, encoding", _known("set_up_s"), "measured beside an H200"),
    ]


def _warm(part: JobPart, pool: WarmPool, h: Hyperparameters) -> JobPart:
    """A part of the start in a warm pool. What a channel holds is downloaded again."""
    if part.name == INSTANCE:
        return replace(part, seconds=min(part.seconds, _known("warm_waiting_s")), source="warm pool, assumed")
    is_there = (part.name == IMAGE and pool.has_image) or (
        part.name == BASE_MODEL and pool.has_model and not h.pretrained_model_name_or_path.startswith("/")
    )
    return replace(part, seconds=0.0, source=f"in the warm pool since {pool.job}, assumed") if is_there else part


def after_training(h: Hyperparameters, plan: Plan, known: Known) -> JobPart:
    """Writing the model and sending it, to the end of the job."""
    written = _written_millions(h, plan) * 1e6 * _BYTES

    def computed() -> tuple[float, str]:
        seconds, words = _transfer(written, "computed", "s3_mb_per_s")
        return _known("end_s") + seconds, f"{_known('end_s'):.0f} s, assumed, and {words}"

    return _part("saving and sending", known.own.end, computed)


def _part(
    name: str, own: Median | None, otherwise: Callable[[], tuple[float, str]], *, is_billed: bool = True
) -> JobPart:
    seconds, source = (own.value, own.source) if own else otherwise()
    return JobPart(name, seconds, source, is_billed)


def _pull(size: int | None) -> tuple[float, str]:
    if size is None:
        return _transfer(_known("image_gb") * 1e9, "computed", "image_mb_per_s")
    return _transfer(size, "by ECR", "image_mb_per_s")


def _fetch(h: Hyperparameters) -> tuple[float, str]:
    base, facts = h.pretrained_model_name_or_path, h.facts.footprint
    if base in SHIPPED:
        return 0.0, "in the image"
    from_s3 = base.startswith(("s3://", "/"))  # a channel's files come from S3 as well
    size = (facts.denoiser + facts.text_encoder + facts.vae) * 1e6 * _BYTES
    return _transfer(size, "computed", "s3_mb_per_s" if from_s3 else "hub_mb_per_s")


def _transfer(size: float, source: str, rate: str) -> tuple[float, str]:
    """Seconds of so many bytes, and words for them; rates are assumed."""
    mb_per_s = _known(rate)
    return size / 1e6 / mb_per_s, f"{size / 1e9:.1f} GB, {source}, at {mb_per_s:.0f} MB/s, assumed"


def _written_millions(h: Hyperparameters, plan: Plan) -> float:
    """Millions of parameters that the job writes."""
    method, footprint = METHODS[h.method], h.facts.footprint
    if method.leaves_base:
        return method.trained_millions(footprint, h, plan.train_text_encoder)
    return footprint.denoiser + footprint.text_encoder + footprint.vae


def _known(key: str) -> float:
    return figure("shared", key)
