"""Pictures of an endpoint on a CUDA device: those of CUDA graphs are those of kernels that are launched one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.peft_file import write_peft
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.serving import engine as engines
from tests.helpers.adapters import ATTENTION, pipeline, trained
from tests.helpers.serving import difference, engine_of, pictures, request
from tests.helpers.tiny import save_tiny_pipeline, save_tiny_xl_pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("save", [save_tiny_pipeline, save_tiny_xl_pipeline])
def test_graphs_draw_what_single_kernels_draw(
    save: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig

    base = save(tmp_path / "base")  # type: ignore[operator]
    for rank in (2, 4):
        (tmp_path / "adapters" / f"rank{rank}").mkdir(parents=True)
        layers = trained(pipeline(base).unet, LoraConfig(r=rank, target_modules=ATTENTION))
        write_peft(tmp_path / "adapters" / f"rank{rank}" / FILE, Adapter({"unet": layers}))
    wishes = [{"prompt": f"a toy {seed}", "seed": seed, "steps": 2 + seed} for seed in range(5)]
    wishes += [{"adapters": ["rank2"]}, {"adapters": {"rank4": 0.5}}, {"width": 48, "adapters": ["rank4", "rank2"]}]

    def drawn() -> list[object]:
        with engine_of(base, adapters=str(tmp_path / "adapters"), precision="fp32") as engine:
            orders = [engine.submit(request(engine, **wish)) for wish in wishes]
            return [pictures(order)[0] for order in orders]

    by_graphs = drawn()
    assert "without a CUDA graph" not in capsys.readouterr().err
    monkeypatch.setattr(engines, "recorder_for", lambda device: None)
    one_by_one = drawn()
    # TF32 rounds as the number of rows has it.
    assert max(difference(*pair) for pair in zip(by_graphs, one_by_one, strict=True)) <= 3  # type: ignore[arg-type]
