"""Hypernetworks: what they change, what their files hold, and who can read them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods.hypernetwork import apply
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.cards import CARDS
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.sampling import draw
from dreambooth_sm.validation import Validator
from tests.helpers.training import Run, attach, cpu_plan, hyperparameters, same, weights

VALUES: dict[str, object] = {"method": "hypernetwork", "learning_rate": 1e-2, "model_name": "zwx"}
ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": F.relu,
    "leakyrelu": F.leaky_relu,
    "elu": F.elu,
    "swish": F.hardswish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def picture(model: Any) -> np.ndarray:
    pipeline = model.pipeline() if isinstance(model, PretrainedModel) else model
    ((drawn,),) = draw(pipeline, "photo of zwx toy", [3], resolution=64, steps=2)
    return np.asarray(drawn)


def exported(base: PretrainedModel, root: Path, **values: object) -> tuple[Run, Path]:
    """A trained hypernetwork, and its file."""
    run = Run(base, root / "run", **VALUES, **values).train()
    run.trainable.export(root, run.h, torch.float32)
    return run, root / "zwx.safetensors"


def webui(states: Tensor, module: Mapping[str, Tensor], activation: str) -> Tensor:
    """What WebUI's module with this state computes."""
    numbers = sorted({int(key.split(".")[1]) for key in module})
    hidden = states
    for number in numbers:
        hidden = F.linear(hidden, module[f"linear.{number}.weight"], module[f"linear.{number}.bias"])
        if number != numbers[-1]:
            hidden = ACTIVATIONS[activation](hidden)
    return states + hidden


@pytest.mark.slow
def test_untrained_it_changes_nothing_and_the_model_stays_as_it_is(base: PretrainedModel, tmp_path: Path) -> None:
    before, untrained = weights(base.unet), picture(base)
    trainable = attach(base, h := hyperparameters(**VALUES), cpu_plan(h))
    assert same(weights(base.unet), before)
    trainable.place(cpu_plan(h), torch.device("cpu"))
    assert np.array_equal(picture(base), untrained)
    run, _ = exported(base, tmp_path)
    trained = weights(run.base.unet)
    kept = {name.replace("to_k.linear.", "to_k.").replace("to_v.linear.", "to_v."): v for name, v in trained.items()}
    assert all(torch.equal(kept[name], value) for name, value in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_pipeline_draws_with_its_files_as_the_trained_model_does(
    ending: str, base: PretrainedModel, tmp_path: Path
) -> None:
    untrained = picture(base)
    run, path = exported(base, tmp_path)
    expected = picture(run.base)
    assert not np.array_equal(expected, untrained)
    pipeline = copy.deepcopy(base).pipeline()
    apply(pipeline, path.with_suffix(ending))
    assert np.array_equal(picture(pipeline), expected)
    apply(pipeline, path.with_suffix(ending), strength=0.5)  # in place of the one before
    assert not np.array_equal(picture(pipeline), expected)
    apply(pipeline, path.with_suffix(ending), strength=0)
    assert np.array_equal(picture(pipeline), untrained)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_webui_computes_the_same_from_its_file(activation: str, base: PretrainedModel, tmp_path: Path) -> None:
    options = {"hypernetwork_activation": activation, "hypernetwork_width": 3, "hypernetwork_layers": 2}
    run, path = exported(base, tmp_path, **options)
    found = torch.load(path.with_suffix(".pt"), weights_only=True)
    width = base.unet.config.cross_attention_dim
    assert [key for key in found if isinstance(key, int)] == [width]
    assert (found["layer_structure"], found["activation_func"]) == ([1, 3, 3, 1], activation)
    assert not any(found[name] for name in ("is_layer_norm", "use_dropout", "activate_output", "last_layer_dropout"))
    states = torch.randn(2, 7, width)
    attention = next(m for m in run.base.unet.modules() if getattr(m, "is_cross_attention", False))
    for before, module in zip((attention.to_k, attention.to_v), found[width], strict=True):
        torch.testing.assert_close(before.network(states), webui(states, module, activation))


@pytest.mark.slow
def test_the_files_say_what_they_are(base: PretrainedModel, tmp_path: Path) -> None:
    run, path = exported(base, tmp_path)
    assert {each.name for each in tmp_path.glob("zwx*")} == {"zwx.safetensors", "zwx.pt"}
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(run.trainable.parameters)
        assert file.metadata()["modelspec.trigger_phrase"] == "photo of zwx toy"
    values = sum(parameter.numel() for parameter in run.trainable.parameters.values())
    assert run.trainable.exported_values(run.h) == 2 * values


def test_a_model_that_draws_while_another_trains_shares_what_is_frozen(base: PretrainedModel) -> None:
    h = hyperparameters(**VALUES)
    trainable = attach(base, h, cpu_plan(h))
    drawn = trainable.drawable(torch.float32)
    trainable.place(cpu_plan(h), torch.device("cpu"))
    mine, theirs = ({p.data_ptr() for p in model.unet.parameters()} for model in (drawn.model, base))
    frozen = sum(1 for _ in base.unet.parameters()) - len(trainable.parameters)
    assert len(mine & theirs) == frozen
    assert not {p.data_ptr() for p in drawn.parameters.values()} & theirs


@pytest.mark.slow
@pytest.mark.usefixtures("quick_drawing")
def test_pictures_on_the_way_are_the_models_and_training_is_the_same(base: PretrainedModel, tmp_path: Path) -> None:
    options = VALUES | {"validation_prompt": "photo of zwx toy", "validation_steps": 2, "use_ema": True}
    with_ = Run(base, tmp_path / "with", **options)
    validator = Validator(
        with_.trainable, ("photo of zwx toy",), with_.h, with_.plan, tmp_path / "samples", with_.recorder
    )
    with_.trainer.train(tmp_path / "checkpoints", with_.recorder.stop, [validator])
    without = Run(base, tmp_path / "without", **options).train()
    assert with_.losses == without.losses
    (drawn,) = with_.recorder.samples
    short = Run(base, tmp_path / "short", **options | {"max_train_steps": 2}).train()
    after = Validator(short.trainable, ("photo of zwx toy",), short.h, short.plan, tmp_path / "after", short.recorder)
    after.draw(2)
    with Image.open(drawn.path) as one, Image.open(short.recorder.samples[0].path) as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.slow
def test_a_smaller_plan_learns_the_same_and_another_one_may_continue(base: PretrainedModel, tmp_path: Path) -> None:
    """What a card's ladder may choose, and what a job that ran out of memory steps down to."""
    whole = Run(base, tmp_path / "whole", **VALUES).train()
    smaller = Run(base, tmp_path / "smaller", plan={"gradient_checkpointing": True}, **VALUES).train()
    for mine, theirs in zip(smaller.losses, whole.losses, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
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


def test_its_defaults_are_its_own_and_what_is_given_wins() -> None:
    prompt = {"instance_prompt": "photo of zwx toy", "base_architecture": "sd", "method": "hypernetwork"}
    assert Hyperparameters.parse(prompt).learning_rate == 1e-4
    assert Hyperparameters.parse({**prompt, "learning_rate": "3e-5"}).learning_rate == 3e-5
    assert Hyperparameters.parse({**prompt, "method": "full"}).learning_rate == 2e-6


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"export": "both"}, "export belongs to method=full"),
        ({"model_name": "a/b"}, "names the hypernetwork's files"),
        ({"method": "full", "hypernetwork_width": "3"}, "hypernetwork_width belongs to method=hypernetwork"),
        ({"method": "loras"}, "one of full, lora, hypernetwork"),
    ],
)
def test_what_it_can_not_go_with_is_refused(values: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Hyperparameters.parse({"instance_prompt": "photo of zwx toy", "method": "hypernetwork", **values})


def test_the_text_encoder_can_not_be_trained_beside_it() -> None:
    prompt = {"instance_prompt": "photo of zwx toy", "method": "hypernetwork"}
    for card in ("CPU", "A10G"):
        assert not make_plan(Hyperparameters.parse(prompt), CARDS[card]).train_text_encoder
        with pytest.raises(UserError, match="method=hypernetwork leaves it as it is; set it to false or auto"):
            make_plan(Hyperparameters.parse({**prompt, "train_text_encoder": "true"}), CARDS[card])


def test_a_family_that_it_is_not_for_is_refused_before_anything_is_downloaded() -> None:
    values = {"instance_prompt": "photo of zwx toy", "method": "hypernetwork"}
    with pytest.raises(UserError, match="method=hypernetwork: the base model is an SDXL model; set method to full"):
        Hyperparameters.parse({**values, "base_architecture": "sdxl"})
    h = Hyperparameters.parse(values).model_copy(update={"base_architecture": "sdxl"})  # found in its files
    for card in ("CPU", "A10G"):
        with pytest.raises(UserError, match="method=hypernetwork: the base model is an SDXL model; set method to full"):
            make_plan(h, CARDS[card])


@pytest.mark.slow
def test_files_that_can_not_be_used_are_refused_in_one_line(
    base: PretrainedModel, xl_base: PretrainedModel, tmp_path: Path
) -> None:
    _, path = exported(base, tmp_path)
    found = torch.load(path.with_suffix(".pt"), weights_only=True)
    (width,) = (key for key in found if isinstance(key, int))
    files: dict[str, tuple[dict[Any, Any] | bytes, str]] = {
        "norm.pt": (found | {"is_layer_norm": True}, "is_layer_norm"),
        "self.pt": (found | {4: found[width]}, "self-attention"),
        "function.pt": (found | {"activation_func": "mish"}, "mish"),
        "half.pt": (found | {"layer_structure": [1, 1.5, 1]}, "layer_structure"),
        "other.pt": (found | {"layer_structure": [1, 4, 1]}, "can't be read"),
        "empty.pt": ({}, "can't be read"),
        "bytes.pt": (b"no file of torch", "can't be read"),
        "bytes.safetensors": (path.read_bytes()[:-9], "can't be read"),
    }
    for name, (content, words) in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=words) as caught:
            apply(copy.deepcopy(base).pipeline(), tmp_path / name)
        assert len(caught.value.problems) == 1
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"nowhere\.pt is not a file; name the"):
        apply(copy.deepcopy(base).pipeline(), tmp_path / "nowhere.pt")
    with pytest.raises(UserError, match="take the base model that it was trained with"):
        apply(xl_base.pipeline(), path)
