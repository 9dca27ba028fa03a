"""Models that were trained as a whole, in one server: each draws what it draws alone, and they share what was not
trained."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth_sm.models import PretrainedModel, read_stored
from dreambooth_sm.serving import engine as engines
from dreambooth_sm.serving.engine import Engine
from dreambooth_sm.serving.refusal import Refusal
from dreambooth_sm.serving.report import REPORT
from dreambooth_sm.storage import S3Uri, upload_directory
from launcher.local.s3 import EmbeddedS3
from tests.helpers.serving import difference, draw, engine_of, pictures, request

pytestmark = pytest.mark.slow
# What each differs in from the base model.
TRAINED = {"duck": ("unet",), "hat": ("unet", "text_encoder"), "same": ()}


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three jobs left; not to be written to."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, parts) in enumerate(TRAINED.items()):
        model = PretrainedModel.of(str(tiny_base), read_stored(tiny_base))
        model.load()
        random = torch.Generator().manual_seed(seed)
        for part in parts:
            for parameter in getattr(model, part).parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=random) * parameter.std()
        model.save(folder / name, None)
        subject = {"instance_prompt": f"photo of zwx {name}", "class_prompt": f"photo of a {name}"}
        (folder / name / REPORT).write_text(json.dumps({"subjects": [subject], "model_name": name}))
    return folder


@pytest.fixture
def engine(tiny_base: Path, folder: Path) -> Iterator[Engine]:
    with engine_of(tiny_base, full_models=str(folder), batch=2) as engine:
        yield engine


def test_each_draws_what_it_draws_alone(engine: Engine, tiny_base: Path, folder: Path) -> None:
    """In whatever order, and the one that is served as well."""
    expected = {}
    for name, directory in {"": tiny_base, **{name: folder / name for name in TRAINED}}.items():
        with engine_of(directory, batch=1) as alone:
            expected[name] = draw(alone)
    assert difference(expected["duck"], expected[""]) > 5
    assert difference(expected["hat"], expected["duck"]) > 5
    for name in ("duck", "", "hat", "duck", "hat", "same", ""):
        values = {"model": name} if name else {}
        assert difference(draw(engine, **values), expected[name]) == 0, name


def test_they_share_what_was_not_trained(engine: Engine) -> None:
    for name, parts in TRAINED.items():
        assert {*engine.models.get(name).parts} == {*parts}
    assert engine.models.get("duck") is engine.models.get("duck")
    assert engine.models.get("duck").size == sum(p.nbytes for p in engine.model.unet.parameters())


def test_many_at_once_are_right_and_those_of_one_model_are_drawn_together(engine: Engine) -> None:
    names = ["duck", "hat", None] * 4
    expected = {name: draw(engine, **({"model": name} if name else {})) for name in {*names}}
    orders: list[Any] = [engine.submit(request(engine, **({"model": name} if name else {}))) for name in names]
    for name, order in zip(names, orders, strict=True):
        assert difference(pictures(order)[0], expected[name]) <= 1
    assert max(order.batch for order in orders) == 2


def test_who_waits_for_another_model_is_not_overtaken_for_ever(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """While others keep asking for the model that draws."""
    monkeypatch.setattr(engines, "_OVERTAKING_S", 0.2)
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            draw(engine, model="duck")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        draw(engine, model="hat")
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_several_are_read_at_a_time(engine: Engine) -> None:
    """By threads; what is made meanwhile, or afterwards, has its weights."""
    with ThreadPoolExecutor(6) as threads:
        for _ in range(3):
            for name in TRAINED:
                engine.models._shelf.remove(name)
            found = list(threads.map(engine.models.get, [*TRAINED] * 2))
            assert [model.name for model in found] == [*TRAINED] * 2
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu"


def test_a_models_own_prompt_is_drawn_where_none_is_said(engine: Engine) -> None:
    def asked(**values: Any) -> tuple[str, ...]:
        return request(engine, prompt=None, **values).prompts

    assert asked(model="duck") == asked(model="duck", subject="duck") == ("photo of zwx duck",)
    assert request(engine, model="hat", subject="zwx", prompt="{subject} at sea").prompts == (
        "photo of zwx hat at sea",
    )
    with pytest.raises(Refusal, match="subject: 'duck' is not known; the model knows hat, zwx"):
        asked(model="hat", subject="duck")


def test_those_that_are_not_there_or_can_not_be_drawn_with_are_refused(
    engine: Engine, tiny_xl_base: Path, folder: Path, tmp_path: Path
) -> None:
    for name in ("cat", "../models/duck", "..", "/duck"):
        with pytest.raises(Refusal, match="is not known here") as refused:
            request(engine, model=name, steps=0)
        assert refused.value.status == 404
        assert len(refused.value.problems) == 2
    (tmp_path / "xl").symlink_to(tiny_xl_base)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    with engine_of(folder / "duck", full_models=str(tmp_path)) as other:
        with pytest.raises(Refusal, match="model: xl: it is a Stable Diffusion XL model, and this endpoint serves"):
            request(other, model="xl")
        with pytest.raises(Refusal, match="model: broken: "):
            request(other, model="broken")


def test_an_endpoint_without_them_says_so(tiny_base: Path) -> None:
    with engine_of(tiny_base) as alone, pytest.raises(Refusal, match="model: 'duck' is not known here"):
        request(alone, model="duck")


def test_they_come_from_s3_as_their_manifest_says(
    s3: EmbeddedS3, target: S3Uri, tiny_base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    upload_directory(folder / "duck", target / "duck")
    with engine_of(folder / "duck", batch=1) as alone, engine_of(tiny_base, full_models=str(target)) as both:
        assert difference(draw(both, model="duck"), draw(alone)) == 0
        with pytest.raises(Refusal, match="model: 'cat' is not known here"):
            request(both, model="cat")
