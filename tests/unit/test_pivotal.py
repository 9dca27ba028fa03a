"""Pivotal tuning: word and adapter learn together, and each program finds both."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from dreambooth_sm.adapters.read import read_adapter
from dreambooth_sm.convert import convert
from dreambooth_sm.describe import describe
from dreambooth_sm.errors import StopRequested, UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS, Watching
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.cards import CARDS
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.sampling import draw
from dreambooth_sm.training.checkpoint import latest_checkpoint
from tests.helpers.marks import slow_except
from tests.helpers.readers import comfyui
from tests.helpers.training import Run, attach, cpu_plan, hyperparameters, same, weights

PROMPT, CLASS = "photo of zwx toy", "photo of a toy"
VALUES: dict[str, object] = {
    "method": "pivotal",
    "learning_rate": 1e-2,
    "class_prompt": CLASS,
    "num_vectors": 2,
    "lora_rank": 4,
    "model_name": "toy",
}
BASES = {"sd": ("loaded_base", "tiny_base"), "sdxl": ("loaded_xl_base", "tiny_xl_base")}
BUNDLE = "toy-bundled.safetensors"


def picture(pipeline: Any, prompt: str = PROMPT) -> np.ndarray:
    ((drawn,),) = draw(pipeline, prompt, [3], resolution=64, steps=2)
    return np.asarray(drawn).astype(int)


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """But for rounding."""
    return bool(np.abs(one - other).max() <= 1)


def everything(model: PretrainedModel) -> dict[str, Tensor]:
    return {f"{part}.{k}": v for part, module in model.modules.items() for k, v in weights(module).items()}


@pytest.fixture(scope="module", params=slow_except(["sd"], BASES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path, Path]:
    """A training that has run, its files, and the directory of its base model."""
    base, directory = map(request.getfixturevalue, BASES[request.param])
    root = tmp_path_factory.mktemp(request.param)
    run = Run(base, root / "run", base_architecture=request.param, **VALUES).train()
    run.trainable.export(root, run.h, torch.float32)
    return run, root, directory


def test_words_and_adapters_learn_and_the_base_model_stays(base: PretrainedModel, tmp_path: Path) -> None:
    before = everything(base)
    run = Run(base, tmp_path, **VALUES)
    initial = {name: p.detach().clone() for name, p in run.trainable.parameters.items()}
    run.train()
    after = run.trainable.parameters
    assert list(after) == list(initial)
    assert {name.partition(".")[0] for name in after} == {"text_encoder", "unet"}
    unmoved = [name for name in after if torch.equal(after[name], initial[name])]
    assert not unmoved
    assert same(everything(run.base), before)
    frozen = {
        name.replace(".base_layer", ""): value
        for name, value in everything(run.trainable.model).items()
        if "lora_" not in name
    }
    assert same(frozen, before)


@pytest.mark.slow
def test_it_is_resumed_to_the_bit_with_what_adapters_leave_out(base: PretrainedModel, tmp_path: Path) -> None:
    options = {**VALUES, "max_train_steps": 2, "lora_dropout": 0.5, "lora_min_rank": 1, "use_ema": True}
    whole = Run(base, tmp_path / "whole", **options).train()
    assert isinstance(whole.trainable, Watching)
    with pytest.raises(StopRequested):
        Run(base, tmp_path / "stopped", **options).train(stop_at=1)
    checkpoint = latest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert checkpoint is not None
    resumed = Run(base, tmp_path / "stopped", **options)
    resumed.trainer.resume(checkpoint)
    after = [{k: p.detach() for k, p in run.trainable.parameters.items()} for run in (whole, resumed.train())]
    assert same(*after)


def test_words_have_a_rate_of_their_own(base: PretrainedModel) -> None:
    h = hyperparameters(**VALUES, placeholder_lr=2e-2, lora_plus_ratio=8)
    rates = attach(base, h, cpu_plan(h)).rates
    assert rates.pop("text_encoder.zwx") == 2
    assert {name.split(".")[-2]: rate for name, rate in rates.items()} == {"lora_A": 1, "lora_B": 8}


@pytest.mark.slow
def test_a_smaller_plan_learns_the_same_and_another_one_may_continue(base: PretrainedModel, tmp_path: Path) -> None:
    whole = Run(base, tmp_path / "whole", **VALUES).train()
    stepped = Run(base, tmp_path / "stepped", **VALUES)
    for _ in range(2):
        stepped.trainer.optimizer_step(1e-2)
    state = stepped.trainer.rescue()
    again = stepped.trainer_of(dataclasses.replace(stepped.plan, gradient_checkpointing=True))
    again.load_state(state, 2)
    for _ in range(2):
        again.optimizer_step(1e-2)
    again.finish()
    for name, parameter in whole.trainable.parameters.items():
        torch.testing.assert_close(stepped.trainable.parameters[name], parameter, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_model_that_draws_has_values_of_its_own(trained: tuple[Run, Path, Path]) -> None:
    run, _, _ = trained
    drawn = run.trainable.drawable(torch.float32)
    mine, theirs = drawn.parameters, run.trainable.parameters
    assert same({k: v.detach() for k, v in mine.items()}, {k: v.detach() for k, v in theirs.items()})
    assert not {p.data_ptr() for p in mine.values()} & {p.data_ptr() for p in theirs.values()}
    before, wanted = picture(drawn.model.pipeline()), picture(run.trainable.model.pipeline())
    assert np.array_equal(before, wanted)
    with torch.no_grad():
        for parameter in mine.values():
            parameter += 1
    assert not np.array_equal(picture(drawn.model.pipeline()), before)
    assert np.array_equal(picture(run.trainable.model.pipeline()), wanted)


@pytest.mark.slow
def test_the_code_of_its_card_draws_as_the_trained_model_does(
    trained: tuple[Run, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, root, directory = trained
    assert {path.name for path in root.glob("*.safetensors")} == {FILE, "toy.safetensors", "zwx.safetensors", BUNDLE}
    values = sum(p.numel() for path in root.glob("*.safetensors") for p in load_file(path).values())
    assert run.trainable.exported_values(run.h) == pytest.approx(values, rel=0.02)  # alphas
    kind = run.base.family.facts.pipeline
    text = METHODS["pivotal"].usage(kind, str(directory), "Photo of ZWX toy", run.h.model_dump(mode="json"))
    assert "<lora:NAME:1>" in text
    assert "`embedding:zwx`" in text
    monkeypatch.chdir(root)
    for other in ("", ", weight_name='toy.safetensors'"):
        code = text.split("```python\n")[1].split("```")[0]
        code = code.replace("load_lora_weights('.'", f"load_lora_weights('.'{other}")
        namespace: dict[str, Any] = {}
        exec(code.partition("picture = ")[0], namespace)
        pipeline = namespace["pipeline"]
        spelled = pipeline.maybe_convert_prompt(PROMPT, pipeline.tokenizer)
        assert alike(picture(run.trainable.model.pipeline()), picture(pipeline, spelled))


@pytest.mark.slow
def test_a_merged_model_draws_with_the_word(trained: tuple[Run, Path, Path], tmp_path: Path) -> None:
    run, _, _ = trained
    h = run.h.model_copy(update={"export": "merged"})
    run.trainable.export(tmp_path, h, torch.float32)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["zwx.safetensors"]
    text = METHODS["pivotal"].usage(run.base.family.facts.pipeline, "unused", PROMPT, h.model_dump(mode="json"))
    lines = text.split("```python\n")[1].split("```")[0].replace("'.'", repr(str(tmp_path)))
    lines = lines.replace("'zwx.safetensors'", repr(str(tmp_path / "zwx.safetensors")))
    namespace: dict[str, Any] = {}
    exec(lines.partition("picture = ")[0], namespace)
    pipeline = namespace["pipeline"]
    spelled = pipeline.maybe_convert_prompt(PROMPT, pipeline.tokenizer)
    assert alike(picture(run.trainable.model.pipeline()), picture(pipeline, spelled))


def bundled_as_webui(data: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By its rules: the word up to the next dot, and what an embedding's own file would have."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in data.items():
        first, _, rest = key.partition(".")
        if first == "bundle_emb":
            word, name = rest.split(".", 1)
            found.setdefault(word, {})[name.partition(".")[0]] = value
    return found


def bundled_as_comfyui(data: dict[str, Tensor], encoder: str) -> Tensor:
    """By its rules, with the file among the embeddings."""
    for end in (".string_to_param.*", f".{encoder}"):
        if found := [value for key, value in data.items() if key.startswith("bundle_emb.") and key.endswith(end)]:
            return torch.cat(found)
    raise LookupError(encoder)


def test_other_programs_find_both_in_one_file(trained: tuple[Run, Path, Path], tmp_path: Path) -> None:
    run, root, directory = trained
    vectors = {name: p.detach() for name, p in run.trainable.parameters.items() if name.endswith(".zwx")}
    both, alone = load_file(root / BUNDLE), load_file(root / "toy.safetensors")
    assert {key for key in both if not key.startswith("bundle_emb.")} == alone.keys()
    assert all(torch.equal(both[key], value) for key, value in alone.items())
    (word,) = bundled_as_webui(both).values()
    assert word.keys() == ({"clip_l", "clip_g"} if len(vectors) > 1 else {"string_to_param"})
    for (_, mine), key in zip(vectors.items(), ("clip_l", "clip_g"), strict=False):
        assert torch.equal(bundled_as_comfyui(both, key), mine)
        assert torch.equal(word[key if len(vectors) > 1 else "string_to_param"], mine)
    _, left = comfyui(both, run.base.unet.config, {})
    assert {key.partition(".")[0] for key in left} == {"bundle_emb"}

    read = read_adapter(root / BUNDLE)
    assert not read.unknown
    assert {f"{part}.zwx": its for part, its in read.words["zwx"].items()}.keys() == vectors.keys()
    assert all(torch.equal(its, vectors[f"{part}.zwx"]) for part, its in read.words["zwx"].items())
    assert describe(str(root / BUNDLE))["learned words"] == "zwx (2 vectors)"
    assert not convert(str(root / BUNDLE), tmp_path / "again.safetensors", layout="kohya")
    assert load_file(tmp_path / "again.safetensors").keys() == both.keys()
    (line,) = convert(str(root / BUNDLE), tmp_path / "other.safetensors")
    assert line.endswith("its learned words are left out: zwx")
    pipeline = DiffusionPipeline.from_pretrained(directory)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):  # why it is a file of its own
        pipeline.load_lora_weights(str(root), weight_name=BUNDLE)


def parse(**values: object) -> Hyperparameters:
    return Hyperparameters.parse({"instance_prompt": PROMPT, "class_prompt": CLASS, "method": "pivotal", **values})


def test_defaults_are_those_of_both() -> None:
    h = parse(base_architecture="sd")
    assert (h.learning_rate, h.export, h.adam_weight_decay) == (1e-4, "adapter", 0)
    assert h.prior_preservation
    assert h.placeholders == {"zwx": "toy"}
    assert h.placeholder_factor == 5
    assert parse(placeholder_lr=1e-3, learning_rate=1e-4).placeholder_factor == pytest.approx(10)
    assert parse(optimizer="prodigy").placeholder_factor == 1
    plan = make_plan(h, CARDS["T4"])
    assert not plan.train_text_encoder
    alone = make_plan(h.model_copy(update={"method": "lora"}), CARDS["T4"])
    assert plan.predicted_peak_gb == pytest.approx(alone.predicted_peak_gb + 0.35, abs=0.02)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_name": "ZWX"}, "model_name='ZWX' names the adapter's file, and placeholder_token that of the word"),
        ({"optimizer": "prodigy", "placeholder_lr": 1}, "placeholder_lr: optimizer=prodigy finds one learning rate"),
        ({"placeholder_lr": 1, "method": "textual_inversion"}, "placeholder_lr belongs to method=pivotal"),
        ({"export": "single_file"}, "set export to adapter or merged or both"),
        ({"class_prompt": "None"}, "placeholder_token: which word of 'photo of zwx toy' is to be learned"),
    ],
)
def test_what_it_can_not_go_with_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(**values)
    assert words in str(caught.value)
    assert len(caught.value.problems) == 1


def test_its_word_takes_the_place_of_trained_text_encoders() -> None:
    with pytest.raises(UserError, match="method=pivotal leaves it as it is"):
        make_plan(parse(train_text_encoder="true"), CARDS["A10G"])
