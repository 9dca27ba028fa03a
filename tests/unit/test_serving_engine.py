"""The pictures of an endpoint: those of diffusers' own pipelines, whatever is drawn beside them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL.Image import Image

from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.peft_file import write_peft
from dreambooth_sm.convert import merge_into
from dreambooth_sm.errors import UserError
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.sampling import draw as draw_one_by_one
from dreambooth_sm.serving.engine import Engine
from dreambooth_sm.serving.refusal import Refusal
from dreambooth_sm.serving.served_model import open_served
from dreambooth_sm.stored.schedulers import scheduler_by_name
from tests.helpers.adapters import ATTENTION, pipeline, trained
from tests.helpers.serving import difference, draw, engine_of, opened, pictures, request, wait_until


@pytest.fixture(scope="module")
def alone(tiny_base: Path) -> Iterator[Engine]:
    with engine_of(tiny_base, batch=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def together(tiny_base: Path) -> Iterator[Engine]:
    with engine_of(tiny_base, batch=8) as engine:
        yield engine


def of_diffusers(directory: Path, scheduler: Any = None, **values: Any) -> Image:
    pipe = copy.copy(opened(directory))
    pipe.scheduler = scheduler or type(pipe.scheduler).from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(values.pop("seed", 5))
    options = {"prompt": "photo of a toy", "width": 32, "height": 32, "num_inference_steps": 3, **values}
    picture: Image = pipe(**options, generator=generator).images[0]
    return picture


@pytest.mark.parametrize("name", ["default", "model", "euler_a", "heun", "ddim", "unipc"])
def test_one_at_a_time_the_pictures_are_those_of_diffusers_to_the_bit(
    alone: Engine, tiny_base: Path, name: str
) -> None:
    own = opened(tiny_base).scheduler
    usual = DPMSolverMultistepScheduler.from_config(own.config, algorithm_type="dpmsolver++", use_karras_sigmas=True)
    scheduler = usual if name == "default" else scheduler_by_name(own, name)
    ours = draw(alone, scheduler=name, negative_prompt="a dog", guidance=5)
    theirs = of_diffusers(tiny_base, scheduler, negative_prompt="a dog", guidance_scale=5)
    assert difference(ours, theirs) == 0


@pytest.mark.slow
def test_so_are_those_of_two_text_encoders(tiny_xl_base: Path) -> None:
    with engine_of(tiny_xl_base, batch=1) as engine:
        for guidance in (1, 4):
            ours = draw(engine, scheduler="model", guidance=guidance, steps=2, width=48)
            theirs = of_diffusers(tiny_xl_base, guidance_scale=guidance, num_inference_steps=2, width=48)
            assert difference(ours, theirs) == 0


@pytest.mark.slow
def test_other_families_are_drawn_together_as_well(tiny_flux2: Path) -> None:
    """Their own functions, by which validation pictures are drawn, one at a time."""
    wishes = [("a toy", 5, 2, 4.0), ("photo of a dog on the toy", 6, 4, 4.0), ("a cat", 7, 3, 1.0)]
    with engine_of(tiny_flux2) as engine:
        orders = [
            engine.submit(request(engine, prompt=prompt, seed=seed, steps=steps, guidance=guidance))
            for prompt, seed, steps, guidance in wishes
        ]
        found = [pictures(order)[0] for order in orders]
        pipe = engine.model.pipeline()
        for (prompt, seed, steps, guidance), picture in zip(wishes, found, strict=True):
            (own,) = next(draw_one_by_one(pipe, prompt, [seed], resolution=32, steps=steps, guidance=guidance))
            assert difference(picture, own) <= 1
        assert orders[-1].batch > 1
        with pytest.raises(Refusal, match="scheduler: 'euler' is not valid; set one of default"):
            request(engine, scheduler="euler")


WISHES: list[dict[str, Any]] = [
    {"prompt": "a dog", "seed": 1, "steps": 4},
    {"prompt": "a cat", "seed": 2, "guidance": 1},
    {"prompt": "photo of the duck", "seed": 3, "steps": 2, "scheduler": "euler_a", "guidance": 3},
    {"prompt": "toy", "seed": 4, "steps": 2, "width": 48},
    {"prompt": "toy on toy", "seed": 5, "width": 48, "negative_prompt": "a cat"},
    {"prompt": "a toy " * 14, "seed": 6, "steps": 1},
    {"prompt": "a dog", "seed": 7, "steps": 2, "number": 3, "scheduler": "heun"},
]


def test_what_is_drawn_together_is_what_is_drawn_alone(alone: Engine, together: Engine) -> None:
    """Products of larger matrices are summed in another order: not more than a level of brightness."""
    orders = [together.submit(request(together, **wish)) for wish in WISHES]
    found = [picture for order in orders for picture in pictures(order)]
    by_itself = [picture for wish in WISHES for picture in pictures(alone.submit(request(alone, **wish)))]
    assert len(found) == len(by_itself) == 9
    assert max(difference(*pair) for pair in zip(found, by_itself, strict=True)) <= 1
    assert max(order.batch for order in orders) >= 4


def test_a_request_joins_what_is_being_drawn(together: Engine) -> None:
    """It does not wait for the end of a longer one, and is the first to end."""
    long = together.submit(request(together, steps=60))
    wait_until(lambda: long.begun is not None)
    short = together.submit(request(together, steps=1))
    pictures(short)
    assert not long.pictures.done()
    pictures(long)
    assert (long.batch, short.batch) == (2, 2)


def test_too_many_are_refused_at_once_and_what_nobody_waits_for_is_dropped(tiny_base: Path) -> None:
    with engine_of(tiny_base, batch=1, queue=2, max_steps=1000) as engine:
        running = engine.submit(request(engine, steps=999))
        wait_until(lambda: not engine.waiting)
        waiting = engine.submit(request(engine, number=2, steps=1))
        with pytest.raises(Refusal) as caught:
            engine.submit(request(engine))
        assert caught.value.status == 429
        running.give_up()
        assert len(pictures(waiting)) == 2
        assert not running.pictures.done()


def test_where_memory_is_short_fewer_are_drawn_at_a_time(
    together: Engine, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, rows = type(together.model.family), []
    predict = kind.predict

    def short_of_memory(self: Any, denoiser: Any, noised: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(noised))
        if len(noised) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(self, denoiser, noised, *rest)

    wishes = [{"seed": seed, "prompt": "a dog", "steps": 2} for seed in range(3)]
    before = [draw(together, **wish) for wish in wishes]
    monkeypatch.setattr(kind, "predict", short_of_memory)
    with engine_of(tiny_base) as engine:
        orders = [engine.submit(request(engine, **wish)) for wish in wishes]
        found = [pictures(order)[0] for order in orders]
    assert max(difference(*pair) for pair in zip(found, before, strict=True)) <= 1
    assert max(rows) > 2 == rows[-1]


def test_what_breaks_one_request_leaves_the_engine_at_work(
    together: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = type(together.model.family)

    def broken(*rest: Any) -> torch.Tensor:
        raise ArithmeticError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(kind, "predict", broken)
        with pytest.raises(ArithmeticError):
            draw(together)
    assert "ArithmeticError: broken" in capsys.readouterr().err
    draw(together)


def test_steps_that_a_scheduler_does_not_take_are_refused_before_anything_is_drawn(alone: Engine) -> None:
    with pytest.raises(Refusal, match="scheduler: lcm takes no 60 steps"):
        alone.submit(request(alone, scheduler="lcm", steps=60))


@pytest.fixture(scope="module")
def adapter_job(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a job leaves that trains an adapter: its file, and a report."""
    from peft import LoraConfig

    directory = tmp_path_factory.mktemp("adapter")
    layers = trained(pipeline(tiny_base).unet, LoraConfig(r=4, target_modules=ATTENTION))
    write_peft(directory / FILE, Adapter({"unet": layers}))
    report = {
        "model_name": "duck",
        "subjects": [{"instance_prompt": "photo of zwx toy", "class_prompt": "photo of toy"}],
        "hyperparameters": {
            "pretrained_model_name_or_path": str(tiny_base),
            "instance_prompt": "photo of zwx toy",
            "method": "lora",
            "resolution": 96,
        },
    }
    (directory / "report.json").write_text(json.dumps(report))
    return directory


def test_an_adapter_is_drawn_with_in_its_base_model(adapter_job: Path, tiny_base: Path, tmp_path: Path) -> None:
    merge_into(str(adapter_job / FILE), str(tiny_base), tmp_path / "merged")
    with engine_of(adapter_job, batch=1) as engine:
        assert (engine.offer.size, set(engine.offer.subjects)) == ((96, 96), {"zwx", "duck"})
        ours = draw(engine, prompt=None, subject="zwx", scheduler="model")
    theirs = of_diffusers(tmp_path / "merged", prompt="photo of zwx toy", guidance_scale=7.5)
    assert difference(ours, theirs) <= 1  # the sum of weight and change is rounded to the file's precision
    assert difference(ours, of_diffusers(tiny_base, prompt="photo of zwx toy", guidance_scale=7.5)) > 1


def test_an_adapter_without_its_base_model_says_what_to_set(adapter_job: Path, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes((adapter_job / FILE).read_bytes())
    with pytest.raises(UserError, match="SERVE_BASE_MODEL"):
        open_served(tmp_path, None)
    report = json.loads((adapter_job / "report.json").read_text())
    report["hyperparameters"]["pretrained_model_name_or_path"] = "/opt/ml/input/data/model"
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"/opt/ml/input/data/model, which is not here; set SERVE_BASE_MODEL"):
        open_served(tmp_path, None)
    assert open_served(tmp_path, str(tiny_base)).prompts["zwx"] == "photo of zwx toy"
