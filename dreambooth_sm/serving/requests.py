"""Requests for pictures, in the JSON of this project, of JumpStart's endpoints and of the quick kit's notebook."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.knobs.messages import short
from dreambooth_sm.s3_uri import S3Uri
from dreambooth_sm.serving.answer_size import check_size
from dreambooth_sm.serving.fields import Fields, is_adapter_name
from dreambooth_sm.serving.offer import Offer
from dreambooth_sm.serving.refusal import Refusal

PictureFormat = Literal["png", "jpeg", "webp"]
Manner = Literal["ours", "picture", "lines", "arrays", "encoded", "locations"]
_OWN: tuple[Manner, ...] = ("ours", "picture", "lines")
FORMATS: tuple[PictureFormat, ...] = ("png", "jpeg", "webp")
LONGEST_PROMPT = 2000
_MOST_PREVIEWS = 20
_SUBJECT = "{subject}"
_JSON, _TEXT = "application/json", "application/x-text"
LINES = "application/jsonlines"
# Their names of fields that are called otherwise here, and what tells a request of theirs.
_JUMPSTART = {"number": "num_images_per_prompt", "steps": "num_inference_steps", "guidance": "guidance_scale"}
_QUICK_KIT = {"number": "count", "scheduler": "sampler", "output": "output_s3uri"}
_OURS = {name: name for name in (*_JUMPSTART, *_QUICK_KIT)}
_QUICK_KIT_SAMPLERS = {"eular": "euler"}


@dataclass(frozen=True)
class PictureRequest:
    """What is to be drawn, and how it is answered.

    Attributes:
        prompts, seeds: of each picture.
        guidance: of classifier-free guidance; up to 1 there is none.
        size: width and height in pixels.
        adapters: strengths by name.
        model: that draws it, by its name; None: the one that is served.
        manner: of the answer: this project's JSON, a picture as it is, a line of JSON for each picture as soon as it
            is drawn, JumpStart's arrays of numbers or encoded pictures, or the quick kit's locations.
        output: the prefix in S3 that the pictures go to; None: into the answer.
        single: whether JumpStart's answer is of one picture.
        previews: of each picture, shown while it is drawn.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative_prompt: str
    steps: int
    guidance: float
    size: tuple[int, int]
    scheduler: str
    adapters: Mapping[str, float]
    format: PictureFormat
    manner: Manner
    output: S3Uri | None = None
    single: bool = False
    previews: int = 0
    model: str | None = None

    def shows_after(self, step: int, steps: int) -> bool:
        """Whether a picture is shown after so many of its steps: those that part them evenly."""
        return step in {steps * part // (self.previews + 1) for part in range(1, self.previews + 1)} - {0}


def _takes_all(place: S3Uri) -> None:
    pass


def read_request(
    body: bytes,
    offer: Offer,
    *,
    content_type: str = _JSON,
    accept: str = "",
    adapter: str | None = None,
    check_output: Callable[[S3Uri], None] = _takes_all,
) -> PictureRequest:
    """Reads and checks a request.

    Args:
        content_type, accept: of its headers.
        adapter: that a header names.
        check_output: raises UserError where a place that pictures are to go to does not take them.

    Raises:
        Refusal: with everything that is wrong with it.
        TransferError: S3 does not answer.
    """
    kind = content_type.partition(";")[0].strip().lower() or _JSON
    if kind == _TEXT:
        values: dict[str, Any] = {"prompt": _decoded(body)}
    elif kind == _JSON:
        values = _json(body)
    else:
        raise Refusal(f"Content-Type: {short(kind)} is not taken; send {_JSON}, or {_TEXT} with a prompt alone", 415)
    wanted = _wanted(accept)
    if _QUICK_KIT.keys() & {name for name, theirs in _QUICK_KIT.items() if theirs in values}:
        return _Reading(values, offer, _OURS | _QUICK_KIT, "locations", wanted, adapter, check_output).request()
    jumpstart = kind == _TEXT or wanted == "json;jpeg" or {*_JUMPSTART.values()} & values.keys()
    manner: Manner = "ours" if not jumpstart else "encoded" if wanted == "json;jpeg" else "arrays"
    names = _OURS | (_JUMPSTART if jumpstart else {})
    return _Reading(values, offer, names, manner, wanted, adapter, check_output, single=kind == _TEXT).request()


@dataclass(frozen=True)
class Addition:
    """Where an adapter lies.

    Attributes:
        preload: whether it is read at once.
        pin: whether it stays in memory.
    """

    name: str
    source: str
    preload: bool
    pin: bool


def read_addition(body: bytes) -> Addition:
    """Reads a request that adds an adapter.

    Raises:
        Refusal: with everything that is wrong with it.
    """
    problems: list[str] = []
    fields = Fields(_json(body), problems)
    name, source = fields.text("name", None, 100), fields.text("src", None, 1024)
    preload, pin = fields.flag("preload", True), fields.flag("pin", False)
    missing = {"name": name, "src": source}
    problems += [f"{each}: it is missing" for each, said in missing.items() if not said and each not in fields.failed]
    fields.check_all_taken()
    if problems or not name or not source:
        raise Refusal(problems)
    return Addition(name, source, preload, pin)


def _decoded(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise Refusal("the body is not a text in UTF-8") from None


def _json(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(_decoded(body))
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not JSON: {error!s:.200}") from None
    if not isinstance(values, dict):
        raise Refusal('the body is not a JSON object; send one such as {"prompt": "photo of zwx toy"}')
    return values


def _wanted(accept: str) -> str:
    """``json``, ``json;jpeg``, ``lines`` or the format of a picture; the first of those that are named and known.

    Raises:
        Refusal: where nothing is known that is named.
    """
    types = [
        "".join(part.split()).lower().partition(";q=")[0] for part in accept.split(",")
    ]  # in the order that clients name them
    known = {_JSON: "json", f"{_JSON};jpeg": "json;jpeg", "*/*": "json", "application/*": "json", "": "json"}
    known[LINES] = "lines"
    known |= {f"image/{name}": name for name in FORMATS} | {"image/*": "png"}
    found = next((known[each] for each in types if each in known), None)
    if found is None:
        raise Refusal(
            f"Accept: {short(accept)} can't be answered; ask for {_JSON}, {_JSON};jpeg, {LINES}, "
            f"{', '.join(f'image/{name}' for name in FORMATS)}",
            406,
        )
    return found


class _Reading:
    """One request, while it is read."""

    def __init__(
        self,
        values: Mapping[str, Any],
        offer: Offer,
        names: Mapping[str, str],
        manner: Manner,
        wanted: str,
        adapter: str | None,
        check_output: Callable[[S3Uri], None],
        *,
        single: bool = False,
    ) -> None:
        self._offer, self._names, self._manner, self._wanted = offer, names, manner, wanted
        self._problems = Problems()
        self._fields = Fields(values, self._problems.found)
        self._adapter, self._single, self._check_output = adapter, single, check_output
        self._model = self._fields.text("model", None, 200) if manner in _OWN else None
        self._status = 400

    def request(self) -> PictureRequest:
        fields, offer, limits = self._fields, self._offer, self._offer.settings
        prompts, adapters = self._prompts(), self._adapters()
        number = fields.whole(self._names["number"], 1, 1, limits.max_pictures)
        pictures = tuple(prompt for prompt in prompts for _ in range(number))
        if len(pictures) > limits.max_pictures >= number:
            self._problems.found.append(
                f"{len(prompts)} prompts in {number} pictures each are {len(pictures)} pictures; ask for "
                f"{limits.max_pictures} at a time"
            )
            pictures = pictures[: limits.max_pictures]
        negative = fields.text("negative_prompt", "", LONGEST_PROMPT) or ""
        steps = fields.whole(self._names["steps"], offer.steps, 1, limits.max_steps)
        guidance = fields.number(self._names["guidance"], offer.guidance, 0, 100)
        width, height = (
            fields.whole(name, usual, offer.multiple, limits.max_side, offer.multiple)
            for name, usual in zip(("width", "height"), offer.size, strict=True)
        )
        scheduler = self._scheduler()
        seeds = self._seeds(len(pictures))
        form = self._format()
        output = self._output()
        previews = self._previews()
        if self._manner == "picture" and len(pictures) > 1:
            self._problems.found.append(
                f"Accept: one picture is asked for, and these are {len(pictures)}; ask for one, or accept {_JSON}"
            )
        fields.check_all_taken()
        if not self._problems.found and output is None:
            with self._problems.collected():
                at_a_time = pictures[:1] if self._manner == "lines" else pictures
                check_size(self._manner, form, (width, height), at_a_time, limits.answer_bytes)
        if self._problems.found:
            raise Refusal(dict.fromkeys(self._problems.found), self._status)
        return PictureRequest(
            pictures,
            seeds,
            negative,
            steps,
            guidance,
            (width, height),
            scheduler,
            adapters,
            form,
            self._manner,
            output,
            self._single,
            previews,
            self._model,
        )

    def _prompts(self) -> Sequence[str]:
        """The prompts; of a subject, its own where nothing else is said."""
        fields, ours = self._fields, self._manner in _OWN
        known = self._known_subject() if ours else ""
        several = fields.texts("prompts", LONGEST_PROMPT, self._offer.settings.max_pictures) if ours else None
        one: Sequence[str] | None
        if self._manner in ("arrays", "encoded"):  # JumpStart's prompt may be several
            one = fields.text_or_texts("prompt", LONGEST_PROMPT, self._offer.settings.max_pictures)
        else:
            text = fields.text("prompt", None, LONGEST_PROMPT)
            one = None if text is None else [text]
        if several is not None and one is not None:
            self._problems.found.append("prompt, prompts: both are there; leave one out")
        found = several if several is not None else one
        if found is None:
            if not known and not fields.failed & {"prompt", "prompts", "subject"}:
                self._problems.found.append('prompt: it is missing; set it, such as "photo of zwx toy"')
            return [known or ""]
        if any(_SUBJECT in prompt for prompt in found) and ours and not known and "subject" not in fields.failed:
            self._problems.found.append(f"prompt: {_SUBJECT} stands for a subject, and none is named; set subject")
        return [prompt.replace(_SUBJECT, known) for prompt in found] if known else found

    def _known_subject(self) -> str:
        name = self._fields.text("subject", None, 200)
        subjects = self._subjects()
        if name is None:
            return next(iter(subjects.values()), "") if self._model else ""
        if prompt := subjects.get(name):
            return prompt
        why = "none: it has no report.json"
        if self._offer.find_prompt and is_adapter_name(name) and not self._model:
            try:
                prompt = self._offer.find_prompt(name)
            except UserError as error:
                why = f"none of this name ({error})"
            else:
                self._adapter = name
                if prompt:
                    return prompt
                why = "none of this name: its adapter says no prompt"
        known = ", ".join(sorted(subjects)[:10]) or why
        self._problems.found.append(f"subject: {short(name)} is not known; the model knows {known}")
        self._fields.failed.add("subject")
        return ""

    def _subjects(self) -> Mapping[str, str]:
        """Those of the model that is asked for."""
        if not self._model or not self._offer.find_subjects:
            return self._offer.subjects
        try:
            return self._offer.find_subjects(self._model)
        except Refusal as error:
            self._problems.found += error.problems
            self._fields.failed.add("subject")
            self._status = error.status
            return {}

    def _adapters(self) -> Mapping[str, float]:
        asked = self._fields.strengths("adapters") if self._manner in _OWN else {}
        return asked or ({self._adapter: 1.0} if self._adapter else {})

    def _scheduler(self) -> str:
        name = self._names["scheduler"]
        if self._manner in ("arrays", "encoded"):
            return self._offer.schedulers[0]
        others = _QUICK_KIT_SAMPLERS if self._manner == "locations" else {}
        return self._fields.choice(name, self._offer.schedulers, others)

    def _seeds(self, count: int) -> tuple[int, ...]:
        first = self._fields.whole("seed", None, 0, 2**63 - 1)
        several = self._fields.seeds("seeds", count) if self._manner in _OWN else None
        if several is not None and first is not None:
            self._problems.found.append("seed, seeds: both are there; leave one out")
        if several is not None:
            return several
        start = secrets.randbits(32) if first is None else first
        return tuple((start + number) % 2**63 for number in range(count))

    def _previews(self) -> int:
        asked = self._fields.whole("previews", 0, 0, _MOST_PREVIEWS) if self._manner in _OWN else 0
        if asked and self._manner != "lines":
            self._problems.found.append(f"previews: they come before the picture; accept {LINES}, or leave it out")
        return asked

    def _format(self) -> PictureFormat:
        if self._manner == "locations":
            return "jpeg"
        if self._manner in ("arrays", "encoded"):
            return "jpeg" if self._manner == "encoded" else "png"
        asked = self._fields.choice("format", ("", *FORMATS), {"jpg": "jpeg"}, "png")
        picture = next((name for name in FORMATS if name == self._wanted), None)
        if picture is not None:
            self._manner = "picture"
            if asked and asked != picture:
                self._problems.found.append(f"format: {asked} is asked for, and Accept says image/{picture}")
            return picture
        if self._wanted == "lines":
            self._manner = "lines"
        return next(name for name in FORMATS if name == (asked or "png"))

    def _output(self) -> S3Uri | None:
        name = self._names["output"]
        if self._manner in ("arrays", "encoded"):
            return None
        text = self._fields.text(name, None, 1024)
        if text is None:
            if self._manner == "locations":
                self._problems.found.append(f"{name}: it is missing; set it to s3://bucket/prefix/")
            return None
        if self._manner == "picture":
            self._problems.found.append(f"{name}: the picture is the answer, as Accept says; leave it out")
        with self._problems.collected():
            place = S3Uri.parse(text)
            self._check_output(place)
            return place
        return None
