"""Parts of a model are in memory while somebody computes with them."""

from __future__ import annotations

import gc
import io
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dreambooth_sm import job, models
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.models import PretrainedModel, load_base, open_base
from dreambooth_sm.report import Reporter
from dreambooth_sm.sagemaker import Contract
from tests.helpers.training import hyperparameters, paint_pictures, same, weights

KINDS: dict[type, str] = {
    UNet2DConditionModel: "denoiser",
    AutoencoderKL: "VAE",
    CLIPTextModel: "text encoder",
    CLIPTextModelWithProjection: "text encoder",
}


class Watch:
    """Which kinds of parts are in memory with values, beside those of models that tests share.

    Attributes:
        seen: what was there whenever a part was read.
    """

    def __init__(self) -> None:
        gc.collect()
        self._shared = self._parts()
        self.seen: list[set[str]] = []

    def _parts(self) -> list[tuple[str, torch.nn.Module]]:
        parts = [(KINDS[type(found)], found) for found in gc.get_objects() if type(found) in (*KINDS,)]
        return [(kind, module) for kind, module in parts if not next(module.parameters()).is_meta]

    def now(self) -> set[str]:
        return {kind for kind, module in self._parts() if all(module is not shared for _, shared in self._shared)}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch, fill = Watch(), models.fill

    def filling(*arguments: Any) -> None:
        fill(*arguments)
        watch.seen.append(watch.now())

    monkeypatch.setattr(models, "fill", filling)
    return watch


@pytest.mark.slow
@pytest.mark.usefixtures("quick_drawing")
@pytest.mark.parametrize(
    "values",
    [
        {"prior": "images", "validation_steps": 1, "use_ema": True},
        {"prior": "output", "validation_steps": 1},
        {"method": "hypernetwork", "validation_steps": 1},
        {"method": "lora", "validation_steps": 1, "export": "both"},
    ],
    ids=["full", "output", "hypernetwork", "lora"],
)
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_job_never_has_all_parts_in_memory(
    family: str, values: dict[str, object], request: pytest.FixtureRequest, tmp_path: Path, watched: Watch
) -> None:
    if values.get("method", "full") not in FAMILIES[family].facts.methods:
        pytest.skip("the method is not for this family")
    model = request.getfixturevalue({"sd": "tiny_base", "sdxl": "tiny_xl_base"}[family])
    paint_pictures(tmp_path / "pictures", 2, size=(64, 64))
    h = hyperparameters(
        pretrained_model_name_or_path=str(model),
        base_architecture=family,
        instance_data_dir=str(tmp_path / "pictures"),
        class_data_dir=str(tmp_path / "classes"),
        class_prompt="photo of a toy",
        with_prior_preservation=True,
        num_class_images=2,
        models_path=str(tmp_path / "model"),
        validation_prompt="photo of zwx toy",
        max_train_steps=2,
        **values,
    )
    job.run(h, Contract(tmp_path / "opt-ml"), report=Reporter(io.StringIO()), stop=threading.Event())
    kinds = {*KINDS.values()}
    assert set().union(*watched.seen) == kinds, "every kind of part was read"
    assert all(seen < kinds for seen in watched.seen)
    gc.collect()
    assert not watched.now()


@pytest.mark.slow
def test_a_part_is_read_for_whoever_computes_with_it_and_stays_in_its_files(tiny_base: Path) -> None:
    h = hyperparameters(pretrained_model_name_or_path=str(tiny_base))
    lazy, whole = open_base(h), load_base(h)
    for name, module in whole.modules.items():
        assert same(weights(lazy.part(name, "cpu", torch.float32)), weights(module))
        assert lazy.part(name, "cpu", torch.float16).dtype == torch.float16
        assert next(lazy.modules[name].parameters()).is_meta
        assert whole.part(name, "cpu", torch.float32) is module
        assert whole.part(name, "cpu", torch.float16) is not module
        copied = whole.copy_of(name, "cpu", torch.float32)
        assert same(weights(copied), weights(module))
        assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in module.parameters()}


def saved(base: PretrainedModel, root: Path) -> dict[str, bytes]:
    root.mkdir()
    base.save(root / "model", None)
    base.save_single_file(root / "model.safetensors", torch.float16)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kept", [None, torch.float32], ids=str)
def test_files_are_the_same_wherever_the_weights_were(
    stored: torch.dtype, kept: torch.dtype | None, loaded_base: PretrainedModel, tmp_path: Path
) -> None:
    base = loaded_base.with_parts({name: loaded_base.copy_of(name, "cpu", stored) for name in loaded_base.modules})
    base.save(tmp_path / "base", None)
    h = Hyperparameters.parse(
        {"instance_prompt": "photo of zwx toy", "pretrained_model_name_or_path": str(tmp_path / "base")}
    )
    lazy, partly, whole = open_base(h, kept), open_base(h, kept), load_base(h, kept)
    partly.load("unet")
    expected = saved(whole, tmp_path / "whole")
    for number, other in enumerate((lazy, partly)):
        found = saved(other, tmp_path / str(number))
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] in ([], ["model.safetensors"])
