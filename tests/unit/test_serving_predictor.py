"""Steps that are recorded for batches of a shape: what a GPU does with CUDA graphs, done here by computing again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.peft_file import write_peft
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.planning.serving import padded
from dreambooth_sm.serving import engine as engines
from dreambooth_sm.serving.engine import Engine
from dreambooth_sm.serving.predictor import Compute
from tests.helpers.adapters import ATTENTION, pipeline, trained
from tests.helpers.serving import difference, engine_of, pictures, request

WISHES = [{"prompt": f"a toy {seed}", "seed": seed, "steps": steps} for seed, steps in enumerate((2, 3, 1, 2, 4))]


class Recorder:
    """Records as CUDA graphs do: what is computed is read from, and written to, the same memory each time."""

    def __init__(self, error: Exception | None = None) -> None:
        self.recorded, self.replayed, self._error = 0, 0, error

    def __call__(self) -> Callable[[Compute], tuple[Callable[[], object], Tensor]]:
        return self._record

    def _record(self, compute: Compute) -> tuple[Callable[[], object], Tensor]:
        if self._error:
            raise self._error
        self.recorded += 1
        result = compute()

        def replay() -> None:
            self.replayed += 1
            result.copy_(compute())

        return replay, result


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(engines, "recorder_for", lambda device: made)
    return made


@pytest.fixture(scope="module")
def by_itself(tiny_base: Path) -> Iterator[Engine]:
    with engine_of(tiny_base, batch=1) as engine:
        yield engine


@pytest.mark.parametrize(
    ("rows", "computed"), [(1, 1), (2, 2), (3, 4), (9, 12), (12, 12), (13, 16), (17, 24), (33, 48)]
)
def test_rows_are_filled_up_to_few_numbers(rows: int, computed: int) -> None:
    assert padded(rows) == computed


def test_pictures_are_those_of_steps_that_are_computed_one_by_one(
    recorder: Recorder, by_itself: Engine, tiny_base: Path
) -> None:
    """While pictures join and end, and batches become larger and smaller."""
    with engine_of(tiny_base) as engine:
        orders = [engine.submit(request(engine, **wish)) for wish in WISHES]
        found = [pictures(order)[0] for order in orders]
        before = recorder.recorded
        pictures(engine.submit(request(engine, **WISHES[0])))
    alone = [pictures(by_itself.submit(request(by_itself, **wish)))[0] for wish in WISHES]
    assert max(difference(*pair) for pair in zip(found, alone, strict=True)) <= 1
    assert max(order.batch for order in orders) > 2
    assert before <= recorder.recorded <= before + 1 < recorder.replayed


@pytest.mark.slow
def test_adapters_that_come_later_are_drawn_with(
    recorder: Recorder, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig

    for rank in (2, 4):
        layers = trained(pipeline(tiny_base).unet, LoraConfig(r=rank, target_modules=ATTENTION))
        (tmp_path / f"rank{rank}").mkdir()
        write_peft(tmp_path / f"rank{rank}" / FILE, Adapter({"unet": layers}))
    wishes = [{}, {"adapters": ["rank2"]}, {"adapters": {"rank4": 0.5}}, {}, {"adapters": ["rank4", "rank2"]}]
    with engine_of(tiny_base, adapters=str(tmp_path)) as engine:
        recorded = [pictures(engine.submit(request(engine, **wish)))[0] for wish in wishes]
    assert recorder.replayed
    monkeypatch.setattr(engines, "recorder_for", lambda device: None)
    with engine_of(tiny_base, adapters=str(tmp_path)) as engine:
        plain = [pictures(engine.submit(request(engine, **wish)))[0] for wish in wishes]
    assert [difference(*pair) for pair in zip(recorded, plain, strict=True)] == [0] * len(wishes)
    assert difference(plain[0], plain[1]) > 1


@pytest.mark.parametrize(
    ("error", "said"), [(RuntimeError("not permitted\nmore"), "(not permitted)"), (torch.OutOfMemoryError("full"), "")]
)
def test_what_can_not_be_recorded_is_computed(
    error: Exception,
    said: str,
    by_itself: Engine,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(engines, "recorder_for", lambda device: Recorder(error))
    with engine_of(tiny_base) as engine:
        found = pictures(engine.submit(request(engine, **WISHES[1])))[0]
    assert difference(found, pictures(by_itself.submit(request(by_itself, **WISHES[1])))[0]) <= 1
    assert said in capsys.readouterr().err
