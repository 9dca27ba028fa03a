"""A method unlike those there are runs whole jobs with no code but its own file, its knob and the families' consent."""

from __future__ import annotations

import dataclasses
import io
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth_sm import job
from dreambooth_sm.errors import StopRequested, UserError
from dreambooth_sm.families import FAMILIES, ModelFootprint
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.declare import knob
from dreambooth_sm.methods import METHODS, Method
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.cards import CARDS
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.planning.ladder import Rung
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.report import Reporter
from dreambooth_sm.sagemaker import Contract
from dreambooth_sm.training.placement import place, speed_up
from dreambooth_sm.training.precision import weights_dtype
from tests.helpers.training import SMALL, paint_pictures


class Biases:
    """Trains the biases of the denoiser alone (Ben Zaken et al. 2022, "BitFit")."""

    name = "biases"
    trains = "biases"
    title = "with other biases"
    hub: Mapping[str, str] = {}
    tags = ("bitfit",)
    leaves_base = True
    trains_text_encoder = False
    encodes_prompts = False
    has_live_base = False
    ladder = (Rung("only", 0, "residual", 8, True, True, False, False),)

    def trained_millions(self, footprint: ModelFootprint, h: Hyperparameters, text_encoder: bool) -> float:
        return 1e-3 * footprint.denoiser

    def activations(self, h: Hyperparameters) -> str:
        return ""

    def attach(self, model: PretrainedModel, plan: Plan, h: Hyperparameters, seed: int) -> TrainedBiases:
        return TrainedBiases(model)

    def usage(self, pipeline: str, base: str, prompt: str, hyperparameters: Mapping[str, Any]) -> str:
        return "Put them into the denoiser."


# In place of biases, the weights of queries' norms, where layers have none.
BIASES = ("bias", "norm_q.weight")


class TrainedBiases:
    rates: Mapping[str, float] = {}

    def __init__(self, model: PretrainedModel) -> None:
        self.model = model

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.denoiser.named_parameters() if name.endswith(BIASES)}

    def load(self) -> None:
        self.model.load(self.model.family.facts.denoiser)

    def place(self, plan: Plan, device: torch.device) -> None:
        place(self.model.denoiser, plan, device, trained=False)
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(weights_dtype(plan))
            parameter.requires_grad_(True)
        speed_up(self.model.denoiser, plan)

    def drawable(self, dtype: torch.dtype) -> TrainedBiases:
        name = self.model.family.facts.denoiser
        return TrainedBiases(self.model.with_parts({name: self.model.copy_of(name, "cpu", dtype)}))

    def export(self, directory: Path, h: Hyperparameters, dtype: torch.dtype | None) -> None:
        values = {name: p.detach().to(dtype or p.dtype) for name, p in self.parameters.items()}
        save_file(values, directory / f"{h.model_name}.safetensors")

    def exported_values(self, h: Hyperparameters) -> int:
        return sum(p.numel() for p in self.parameters.values())


class Knobs(Hyperparameters):
    method: Literal["full", "hypernetwork", "biases"] = knob("full", "What is trained.")  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _there(monkeypatch: pytest.MonkeyPatch) -> None:
    method: Method = Biases()
    monkeypatch.setitem(METHODS, "biases", method)
    for family in FAMILIES.values():
        methods = {**family.facts.methods, "biases": {"learning_rate": 1e-2}}
        monkeypatch.setattr(family, "facts", dataclasses.replace(family.facts, methods=methods), raising=True)


def run(root: Path, base: Path, family: str, stop_at: int | None = None, **values: object) -> str:
    """The log of a job."""
    if not (root / "pictures").exists():
        paint_pictures(root / "pictures", 2, size=(64, 64))
    places = {"instance_data_dir": str(root / "pictures"), "models_path": str(root / "model"), "model_name": "zwx"}
    given = {name: value for name, value in SMALL.items() if name != "learning_rate"}
    h = Knobs.parse(
        {
            **given,
            **places,
            "pretrained_model_name_or_path": str(base),
            "base_architecture": family,
            "method": "biases",
            "export_precision": "fp32",
            "max_train_steps": 3,
            **values,
        }
    )
    log, stop = io.StringIO(), threading.Event()

    class Stopping(Reporter):
        def metrics(self, **told: object) -> None:
            super().metrics(**told)
            if told.get("step") == stop_at and "loss" in told:
                stop.set()

    job.run(h, Contract(root / "opt-ml"), report=Stopping(log), stop=stop)
    return log.getvalue()


# One of each objective; `test_every_family.py` resumes all families with the methods that are there.
RESUMED = ("sd", "flux2")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_drawing")
@pytest.mark.parametrize("family", FAMILIES)
def test_it_runs_whole_jobs_and_is_resumed(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    base = request.getfixturevalue(
        {
            "sd": "tiny_base",
            "sdxl": "tiny_xl_base",
            "z_image": "tiny_z_image",
            "flux2": "tiny_flux2",
            "flux1": "tiny_flux1",
            "qwen_image": "tiny_qwen_image",
            "chroma": "tiny_chroma",
            "sd3": "tiny_sd3",
            "krea2": "tiny_krea2",
        }[family]
    )
    drawn = {"validation_prompt": "photo of zwx toy", "validation_steps": 2}
    log = run(tmp_path / "whole", base, family, use_ema=True, **drawn)
    assert "validation=2" in log
    model = tmp_path / "whole" / "model"
    exported = load_file(model / "zwx.safetensors")
    assert exported
    assert all(name.endswith(BIASES) for name in exported)
    assert "with other biases" in (model / "README.md").read_text()
    assert "bitfit" in (model / "README.md").read_text()
    assert json.loads((model / "report.json").read_text())["hyperparameters"]["learning_rate"] == 1e-2
    if family not in RESUMED:
        return
    with pytest.raises(StopRequested):
        run(tmp_path / "parts", base, family, stop_at=1, use_ema=True)
    assert "resumed after step 1" in run(tmp_path / "parts", base, family, use_ema=True)
    again = load_file(tmp_path / "parts" / "model" / "zwx.safetensors")
    assert exported.keys() == again.keys()
    assert all(torch.equal(exported[name], again[name]) for name in exported)


def test_its_plan_is_made_of_its_own_ladder_and_footprint() -> None:
    h = Knobs.parse({"instance_prompt": "photo of zwx toy", "base_architecture": "sd", "method": "biases"})
    plan = make_plan(h, CARDS["T4"])
    full = make_plan(h.model_copy(update={"method": "full"}), CARDS["T4"])
    assert plan.tier == "only"
    assert plan.predicted_peak_gb < full.predicted_peak_gb / 2


def test_knobs_of_other_methods_are_refused_with_its_name() -> None:
    with pytest.raises(UserError, match="export belongs to method=full or lora or pivotal, and this job's is biases"):
        Knobs.parse({"instance_prompt": "photo of zwx toy", "method": "biases", "export": "both"})
