"""One thread that draws: requests join the pictures that are being drawn at the next step of the denoiser."""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from dreambooth_sm import sources
from dreambooth_sm.errors import UserError
from dreambooth_sm.latents import latent_channels
from dreambooth_sm.memory import free_memory
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.sampling import decode
from dreambooth_sm.serving.adapter_disk import AdapterDisk
from dreambooth_sm.serving.adapter_store import AdapterStore
from dreambooth_sm.serving.broken import show
from dreambooth_sm.serving.full_models import ModelSeat, ModelStore
from dreambooth_sm.serving.offer import Offer
from dreambooth_sm.serving.orders import Order, Shown, Withheld
from dreambooth_sm.serving.predictor import Predictor, Rows, recorder_for
from dreambooth_sm.serving.prompts import PromptEncoder, side_by_side
from dreambooth_sm.serving.refusal import Refusal
from dreambooth_sm.serving.requests import PictureRequest
from dreambooth_sm.serving.runs import PictureRun
from dreambooth_sm.serving.safety import SafetyCheck
from dreambooth_sm.serving.served_model import ServedModel
from dreambooth_sm.serving.settings import ServingSettings
from dreambooth_sm.serving.slots import AdapterSlots, busy_slots
from dreambooth_sm.stored.schedulers import BY_NAME, scheduler_by_name
from dreambooth_sm.training.placement import speed_up_drawing

_USUAL, _MODELS = "default", "model"
# That are kept, ready for a number of steps.
_MOST_SCHEDULERS = 64
# Pictures of the model that draws begin before those of another that wait, until these have waited for so long.
_OVERTAKING_S = 5.0


@dataclass(frozen=True)
class _Place:
    """A picture of an order."""

    order: Order
    number: int


class Engine:
    """Draws what is asked for, with a model on one device.

    At each step of the denoiser it asks about all pictures of one shape together, whatever their prompts, seeds, steps,
    guidance and schedulers; pictures that wait join as soon as there is room. With ``batch=1`` pictures are, on the
    CPU, to the bit those of diffusers' pipeline; in larger batches matrix products may round otherwise.
    """

    def __init__(self, served: ServedModel, settings: ServingSettings) -> None:
        """Reads the model onto the device.

        Raises:
            UserError: where its files are damaged.
        """
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        in_half = self._device.type != "cpu" and settings.precision != "fp32"
        self.model = _on_device(served.model, self._device, in_half)
        self.settings, self._batch = settings, settings.batch
        # Before layers are replaced.
        self._seat = ModelSeat(served.model, self.model)
        self.models = ModelStore(settings.full_models, self._seat, settings.full_model_bytes)
        shapes = {
            part: {k: v.shape for k, v in module.state_dict().items()} for part, module in self.model.modules.items()
        }
        disk = AdapterDisk(settings.adapter_disk, settings.adapter_disk_bytes)
        self.store = AdapterStore(settings.adapters, shapes, self.model.name, settings.adapter_bytes, disk)
        self._pipeline = self.model.pipeline()
        self._slots = AdapterSlots(self.model, settings.adapter_slots)
        self._safety = _safety_check(settings, self._device)
        self._prompts = PromptEncoder(self.model, self._slots)
        self._schedulers: dict[Any, Any] = {}
        self._waiting: deque[_Place] = deque()
        self._running: dict[_Place, PictureRun] = {}
        self._predictor = Predictor(self.model, self._slots, recorder_for(self._device))
        self._together: tuple[tuple[_Place, ...], Rows] | None = None
        self._changed = threading.Condition()
        self._closing = False
        self.offer = _offer(self.model, served, self.store, self.models, settings)
        self._thread = threading.Thread(target=self._work, name="draw", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Pictures that are not begun."""
        return len(self._waiting)

    @property
    def is_drawing(self) -> bool:
        """Whether pictures are begun and not done."""
        return bool(self._running)

    def submit(self, request: PictureRequest, show: Callable[[Shown], None] | None = None) -> Order:
        """Takes a request; as long as its adapters take to be read.

        Args:
            show: see :class:`~dreambooth_sm.serving.orders.Order`.

        Raises:
            Refusal: where too many pictures wait, or a scheduler or an adapter is not to be had.
            TransferError: an adapter can't be had from S3.
        """
        self._check_room(request)
        try:
            self._scheduler(request)
        except (ValueError, ImportError) as error:
            raise Refusal(f"scheduler: {request.scheduler} takes no {request.steps} steps ({error})") from None
        began = time.monotonic()
        adapters = [(self.store.get(name), strength) for name, strength in request.adapters.items()]
        model = self.models.get(request.model) if request.model else None
        order = Order(request, adapters, model, show, reading=time.monotonic() - began)
        with self._changed:
            self._check_room(request)
            self._waiting += [_Place(order, number) for number in range(len(request.prompts))]
            self._changed.notify()
        return order

    def _check_room(self, request: PictureRequest) -> None:
        if self._closing:
            raise Refusal("the server is about to end; ask another one", 503)
        if len(self._waiting) + len(request.prompts) > self.settings.queue:
            raise Refusal(f"{len(self._waiting)} pictures wait, which is as many as may; ask again later", 429)

    def close(self) -> None:
        """Ends the thread; what is not drawn is not drawn any more."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        for place in (*self._waiting, *self._running):
            place.order.fail(Refusal("the server has ended", 503))

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closing):
                    self._changed.wait()
                if self._closing:
                    return
                self._drop_what_is_over()
                joining = self._joining()
            if joining and joining[0].order.model is not self._seat.model:
                self._seat.take(joining[0].order.model)
                self._prompts.forget()
            self._begin_all(joining)
            kinds: dict[Any, list[_Place]] = {}
            for place, run in self._running.items():
                kinds.setdefault(run.kind, []).append(place)
            for places in kinds.values():
                self._advance(tuple(places))

    def _drop_what_is_over(self) -> None:
        self._waiting = deque(place for place in self._waiting if not place.order.is_over)
        for place in [place for place in self._running if place.order.is_over]:
            del self._running[place]

    def _joining(self) -> list[_Place]:
        """Takes those that begin now from those that wait: of one model, which draws until those of another have waited
        for some seconds and all that it has begun is done."""
        if not self._waiting:
            return []
        model = self._seat.model if self._running else self._waiting[0].order.model
        joining: list[_Place] = []
        for place in self._waiting:
            if len(self._running) + len(joining) >= self._batch:
                break
            if place.order.model is model:
                joining.append(place)
            elif time.monotonic() - place.order.taken > _OVERTAKING_S:
                break
        for place in joining:
            self._waiting.remove(place)
        return joining

    def _begin_all(self, places: list[_Place]) -> None:
        """Begins pictures, up to one whose adapters have to wait for those of others."""
        for number, place in enumerate(places):
            if not self._begin(place):
                self._put_off(places[number:])
                return

    def _begin(self, place: _Place) -> bool:
        order, request = place.order, place.order.request
        try:
            busy = busy_slots(run.adapters for run in self._running.values())
            uses = self._slots.take(order.adapters, busy)
            if uses is None:
                return False
            width, height = (side // self.model.latent_scale for side in request.size)
            prompt = request.prompts[place.number]
            self._running[place] = PictureRun(
                self.model.family,
                self._scheduler(request),
                self._prompts.conditions(
                    prompt, request.negative_prompt, request.size, request.guidance, order.adapters, uses
                ),
                seed=request.seeds[place.number],
                guidance=request.guidance,
                shape=(latent_channels(self.model.vae), height, width),
                device=self._device,
                adapters=uses,
            )
            order.begun = order.begun or time.monotonic()
        except Exception as error:
            self._fail([place], error)
        return True

    def _advance(self, places: tuple[_Place, ...]) -> None:
        """One step of pictures of one kind; those that are drawn then are decoded."""
        try:
            if due := tuple(place for place in places if not self._running[place].is_done):
                self._step(due)
            for place in places:
                place.order.batch = max(place.order.batch, len(places))
                if self._running[place].is_done:
                    picture = decode(self._pipeline, self._running[place].latents)[0]
                    del self._running[place]
                    place.order.add(place.number, self._withheld(picture) or picture)
                else:
                    self._show(place)
        except torch.OutOfMemoryError as error:
            there = [place for place in places if place in self._running]
            if self._predictor.stop_recording():
                self._put_off(there)
            elif len(there) == 1:
                self._fail(there, error)
            else:
                self._batch = len(there) // 2
                self._put_off(there[self._batch :])
            self._together = None
            free_memory()
        except Exception as error:
            self._fail(places, error)

    def _show(self, place: _Place) -> None:
        """Shows a picture that is not done, where its request wants that now."""
        run, order = self._running[place], place.order
        if order.show and order.request.shows_after(*run.taken):
            picture = decode(self._pipeline, run.preview())[0]
            if not self._withheld(picture):
                order.show(Shown(place.number, picture, *run.taken))

    def _withheld(self, picture: Image) -> Withheld | None:
        """Why a picture is not to be seen."""
        return self._safety(picture) if self._safety else None

    @torch.no_grad()
    def _step(self, places: tuple[_Place, ...]) -> None:
        runs = [self._running[place] for place in places]
        if self._together is None or self._together[0] != places:
            conditioning = side_by_side([run.conditioning for run in runs])
            self._together = places, Rows(conditioning, [run.adapters for run in runs for _ in range(run.rows)])
        noised = torch.cat([run.noised() for run in runs])
        predicted = self._predictor(noised, torch.cat([run.time for run in runs]), self._together[1])
        for run, rows in zip(runs, predicted.split([run.rows for run in runs]), strict=True):
            run.take(rows)

    def _put_off(self, places: list[_Place]) -> None:
        """Pictures are begun again later: their seeds make them what they would have been."""
        for place in places:
            self._running.pop(place, None)
        with self._changed:
            self._waiting.extendleft(reversed(places))

    def _fail(self, places: Any, error: Exception) -> None:
        if not isinstance(error, Refusal):
            show(error)
        for place in places:
            self._running.pop(place, None)
            place.order.fail(error)

    def _scheduler(self, request: PictureRequest) -> Any:
        """A scheduler of its own for a picture: a copy, which is soon made."""
        key = request.scheduler, request.steps, request.size
        if key not in self._schedulers:
            if len(self._schedulers) == _MOST_SCHEDULERS:
                self._schedulers.clear()
            self._schedulers[key] = self._new_scheduler(request)
        return copy.deepcopy(self._schedulers[key])

    def _new_scheduler(self, request: PictureRequest) -> Any:
        if request.scheduler == _USUAL:
            return self.model.family.sampler(self.model, request.steps, request.size, self._device)
        scheduler = scheduler_by_name(self.model.scheduler, request.scheduler)
        scheduler.set_timesteps(request.steps, device=self._device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        return scheduler


def _safety_check(settings: ServingSettings, device: torch.device) -> SafetyCheck | None:
    if settings.safety_model is None:
        return None
    labels = tuple(label.strip() for label in settings.safety_labels.split(",") if label.strip())
    if not labels:
        raise UserError("SERVE_SAFETY_LABELS: it names none; set the labels whose pictures are withheld")
    return SafetyCheck(sources.fetch(settings.safety_model), labels, settings.safety_percent, device)


def _on_device(model: PretrainedModel, device: torch.device, in_half: bool) -> PretrainedModel:
    types = {part: model.vae_dtype if part == "vae" else model.half for part in model.family.facts.parts}
    parts = {part: model.part(part, device, kind if in_half else torch.float32) for part, kind in types.items()}
    for module in parts.values():
        speed_up_drawing(module)
    return model.with_parts(parts)


def _offer(
    model: PretrainedModel, served: ServedModel, store: AdapterStore, models: ModelStore, settings: ServingSettings
) -> Offer:
    facts = model.family.facts
    side = served.resolution
    if side is None:
        latents = getattr(model.denoiser.config, "sample_size", None)
        side = latents * model.latent_scale if isinstance(latents, int) else facts.resolution
    side = min(side, settings.max_side) // facts.multiple * facts.multiple
    return Offer(
        steps=min(facts.drawing.steps, settings.max_steps),
        guidance=facts.drawing.guidance,
        size=(side, side),
        multiple=facts.multiple,
        schedulers=(_USUAL,) if facts.matches_flow else (_USUAL, _MODELS, *BY_NAME),
        subjects=served.prompts,
        settings=settings,
        find_prompt=lambda name: store.get(name).prompt,
        find_subjects=lambda name: models.get(name).prompts,
    )
