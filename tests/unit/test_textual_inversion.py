"""Textual inversion: what is learned and what stays, what its files hold, and who can read them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dreambooth_sm.adapters.learned_words import LearnedWords
from dreambooth_sm.data.check import check_folder
from dreambooth_sm.data.conditioning import embed
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.textual_inversion import mentions
from dreambooth_sm.methods import METHODS
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.cards import CARDS
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.sampling import draw
from dreambooth_sm.validation import Validator
from tests.helpers.marks import slow_except
from tests.helpers.training import Run, attach, cpu_plan, hyperparameters, paint_pictures, same, weights

PROMPT, CLASS = "photo of zwx toy", "photo of a toy"
VALUES: dict[str, object] = {
    "method": "textual_inversion",
    "learning_rate": 1e-2,
    "class_prompt": CLASS,
    "num_vectors": 2,
}


def picture(pipeline: Any, prompt: str = PROMPT) -> np.ndarray:
    ((drawn,),) = draw(pipeline, prompt, [3], resolution=64, steps=2)
    return np.asarray(drawn)


def states(model: PretrainedModel, prompt: str) -> dict[str, Tensor]:
    return dict(embed(model.family, model, [prompt]).text)


def everything(model: PretrainedModel) -> dict[str, Tensor]:
    return {f"{part}.{k}": v for part, module in model.modules.items() for k, v in weights(module).items()}


def test_only_the_vectors_are_learned_and_the_base_model_draws_as_before(base: PretrainedModel, tmp_path: Path) -> None:
    before = everything(base)
    run = Run(base, tmp_path, **VALUES)
    assert run.trainable.parameters.keys() == {"text_encoder.zwx"}
    initial = run.trainable.parameters["text_encoder.zwx"].detach().clone()
    class_states, own = states(base, CLASS), states(base, PROMPT)
    run.train()
    assert not torch.equal(run.trainable.parameters["text_encoder.zwx"], initial)
    for model in (run.base, run.trainable.model):
        assert same(everything(model), before)
        assert same(states(model, CLASS), class_states)
    # To the base model it is still a word as any other.
    assert same(states(run.base, PROMPT), own)
    assert not torch.equal(states(run.trainable.model, PROMPT)["states"], own["states"])


def test_a_text_encoder_with_longer_tables_reads_the_same(base: PretrainedModel) -> None:
    """As other programs teach it new words: with rows behind its own."""
    words = LearnedWords.make(base, {"zwx": None, "zwx-b": "cat"}, 2)
    for parameter in words.parameters.values():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    found = states(words.model, "a zwx-b, ZWX on a toy")["states"]
    count = base.text_encoder.get_input_embeddings().num_embeddings
    base.text_encoder.resize_token_embeddings(count + 4)
    base.text_encoder.get_input_embeddings().weight.data[count:] = torch.cat(list(words.parameters.values()))
    pieces: list[str | list[int]] = ["a", [2, 3], ",", [0, 1], "on a toy"]
    ids = [
        number
        for piece in pieces
        for number in (
            base.tokenizer(piece, add_special_tokens=False).input_ids
            if isinstance(piece, str)
            else [count + row for row in piece]
        )
    ]
    start, end = base.tokenizer.bos_token_id, base.tokenizer.eos_token_id
    rows = torch.tensor([[start, *ids, end, *[end] * (75 - len(ids))]])
    with torch.no_grad():
        assert torch.equal(base.text_encoder(rows)[0], found)


def test_words_start_from_what_is_asked_for(base: PretrainedModel) -> None:
    table = base.text_encoder.get_input_embeddings().weight

    def rows(text: str) -> Tensor:
        return table[base.tokenizer(text, add_special_tokens=False).input_ids]

    def start(count: int, **values: object) -> Tensor:
        h = hyperparameters(method="textual_inversion", num_vectors=count, **values)
        (vectors,) = attach(base, h, cpu_plan(h)).parameters.values()
        return vectors

    assert torch.equal(start(1, class_prompt=CLASS), rows("toy"))
    assert torch.equal(start(3, class_prompt=CLASS), rows("toy toy toy"))
    assert torch.equal(start(3, class_prompt=CLASS, initial_text="cat dog"), rows("cat dog cat"))
    assert torch.equal(start(1, placeholder_token="zwx"), rows("zwx")[:1])
    with pytest.raises(UserError, match="initial_text: 'cat dog' has 2 tokens, and 'zwx' has num_vectors=1; set"):
        start(1, class_prompt=CLASS, initial_text="cat dog")


def read_as_webui(path: Path) -> dict[str, Tensor]:
    """By its rules for files that are not its own: a pair of encoders by name, or the only tensor whatever its name."""
    data = load_file(path)
    if "string_to_param" in data or {"clip_g", "clip_l"} <= data.keys():
        return {"text_encoder": data["clip_l"], "text_encoder_2": data["clip_g"]}
    assert len(data) == 1, "embedding file has multiple terms in it"
    return {"text_encoder": next(iter(data.values()))}


def read_as_comfyui(path: Path, keys: dict[str, str]) -> dict[str, Tensor]:
    """By its rules: the encoder's own key, or else the first tensor."""
    data = load_file(path)
    assert not any(key.startswith("bundle_emb.") for key in data)
    return {part: data[key] if key in data else next(iter(data.values())) for part, key in keys.items()}


KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


@pytest.mark.parametrize("family", slow_except(["sd"], ["sd", "sdxl"]))
def test_its_file_is_read_by_all_programs_and_diffusers_draws_the_same(
    family: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = request.getfixturevalue({"sd": "loaded_base", "sdxl": "loaded_xl_base"}[family])
    directory = request.getfixturevalue({"sd": "tiny_base", "sdxl": "tiny_xl_base"}[family])
    run = Run(model, tmp_path / "run", base_architecture=family, **VALUES).train()
    run.trainable.export(tmp_path, run.h, torch.float32)
    assert [path.name for path in tmp_path.glob("*.*")] == ["zwx.safetensors"]
    parameters = {name.removesuffix(".zwx"): value.detach() for name, value in run.trainable.parameters.items()}
    assert all(len(value) == 2 for value in parameters.values())
    assert run.trainable.exported_values(run.h) == sum(map(torch.numel, parameters.values()))
    for found in (
        read_as_webui(tmp_path / "zwx.safetensors"),
        read_as_comfyui(tmp_path / "zwx.safetensors", {part: KEYS[part] for part in parameters}),
    ):
        assert same(found, parameters)
    with safe_open(tmp_path / "zwx.safetensors", "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == PROMPT

    kind = run.base.family.facts.pipeline
    text = METHODS["textual_inversion"].usage(kind, str(directory), "Photo of ZWX toy", run.h.model_dump(mode="json"))
    code = text.split("```python\n")[1].split("```")[0]
    assert "'Photo of zwx toy'" in code
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(code.partition("picture = ")[0], namespace)
    pipeline = namespace["pipeline"]
    theirs = pipeline.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    ours = states(run.trainable.model, PROMPT)
    assert torch.equal(theirs[0], ours["states"])
    assert "pooled" not in ours or torch.equal(theirs[2], ours["pooled"])
    # Drawn by our own sampler, which does not ask the pipeline to spell words of several vectors.
    spelled = pipeline.maybe_convert_prompt(PROMPT, pipeline.tokenizer)
    assert np.array_equal(picture(run.trainable.model.pipeline()), picture(pipeline, spelled))


def test_a_configuration_that_knows_no_end_of_prompts_changes_nothing(xl_base: PretrainedModel) -> None:
    """Those of older models name another token, and the largest id is then taken for the end: a new word's, were it
    larger than all others."""
    h = hyperparameters(base_architecture="sdxl", **VALUES)
    model: Any = attach(xl_base, h, cpu_plan(h)).model
    before = states(model, PROMPT)
    assert model.text_encoder_2.text_model.eos_token_id == model.tokenizer_2.eos_token_id
    model.text_encoder_2.text_model.eos_token_id = 2
    assert same(states(model, PROMPT), before)


def test_a_word_of_several_subjects_each_has_its_file(base: PretrainedModel, tmp_path: Path) -> None:
    concepts = [
        {"instance_prompt": "photo of zwx toy", "class_prompt": CLASS},
        {"instance_prompt": "photo of Qrs cat", "class_prompt": "photo of a cat"},
    ]
    h = hyperparameters(method="textual_inversion", concepts_list=concepts)
    assert h.placeholders == {"zwx": "toy", "qrs": "cat"}
    trainable = attach(base, h, cpu_plan(h))
    assert trainable.parameters.keys() == {"text_encoder.zwx", "text_encoder.qrs"}
    assert trainable.model.tokenizer("qrs zwx", add_special_tokens=False).input_ids == [-2, -1]
    trainable.export(tmp_path, h, torch.float16)
    for word, name in (("zwx", "toy"), ("qrs", "cat")):
        found = load_file(tmp_path / f"{word}.safetensors")[word]
        (row,) = base.tokenizer(name, add_special_tokens=False).input_ids
        assert torch.equal(found[0], base.text_encoder.get_input_embeddings().weight[row].half())


def test_a_model_that_draws_while_another_trains_shares_what_is_frozen(base: PretrainedModel) -> None:
    h = hyperparameters(**VALUES)
    trainable = attach(base, h, cpu_plan(h))
    drawn = trainable.drawable(torch.float32)
    trainable.place(cpu_plan(h), torch.device("cpu"))
    for name, module in drawn.model.modules.items():
        theirs = {p.data_ptr() for p in getattr(base, name).parameters()}
        assert {p.data_ptr() for p in module.parameters()} == theirs
    (mine,), (training,) = drawn.parameters.values(), trainable.parameters.values()
    assert mine.data_ptr() != training.data_ptr()
    with torch.no_grad():
        mine += 1
    assert not torch.equal(states(drawn.model, PROMPT)["states"], states(trainable.model, PROMPT)["states"])


@pytest.mark.slow
@pytest.mark.usefixtures("quick_drawing")
def test_pictures_on_the_way_are_the_models_and_training_is_the_same(base: PretrainedModel, tmp_path: Path) -> None:
    options = VALUES | {"validation_prompt": PROMPT, "validation_steps": 2, "use_ema": True}
    with_ = Run(base, tmp_path / "with", **options)
    validator = Validator(with_.trainable, (PROMPT,), with_.h, with_.plan, tmp_path / "samples", with_.recorder)
    with_.trainer.train(tmp_path / "checkpoints", with_.recorder.stop, [validator])
    assert with_.losses == Run(base, tmp_path / "without", **options).train().losses
    (drawn,) = with_.recorder.samples
    short = Run(base, tmp_path / "short", **options | {"max_train_steps": 2}).train()
    after = Validator(short.trainable, (PROMPT,), short.h, short.plan, tmp_path / "after", short.recorder)
    after.draw(2)
    with Image.open(drawn.path) as one, Image.open(short.recorder.samples[0].path) as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))


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


def test_prompts_may_grow_too_long_by_their_vectors(base: PretrainedModel) -> None:
    h = hyperparameters(**VALUES)
    words, prompt = attach(base, h, cpu_plan(h)).model, "zwx a " * 25
    assert base.family.tokenize(words, [prompt])["ids"].shape == (1, 1, 77)
    with pytest.raises(UserError, match="has 76 tokens and max_token_length=75 allows 75"):
        base.family.tokenize(words, [f"{prompt} a"])


def parse(**values: object) -> Hyperparameters:
    return Hyperparameters.parse(
        {"instance_prompt": PROMPT, "class_prompt": CLASS, "method": "textual_inversion", **values}
    )


def test_defaults_are_its_own() -> None:
    h = parse(base_architecture="sd")
    assert h.adam_weight_decay == 0
    assert not h.prior_preservation, "no class picture teaches it anything"
    assert parse(with_prior_preservation="true").prior_preservation
    assert h.placeholders == {"zwx": "toy"}
    assert parse(class_prompt="None", placeholder_token="ZWX").placeholders == {"zwx": None}
    assert parse(instance_prompt="a ZWX-7 toy, [filewords]").placeholders == {"zwx-7": "toy"}
    assert parse(initial_text="red car").placeholders == {"zwx": "red car"}
    assert not Hyperparameters.parse({"instance_prompt": PROMPT, "class_prompt": CLASS}).placeholders


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"class_prompt": "None"},
            "placeholder_token: which word of 'photo of zwx toy' is to be learned can't be told",
        ),
        ({"class_prompt": "a thing"}, "can't be told; set it to that word, such as zwx"),
        ({"class_prompt": "a photo of zwx toy"}, "can't be told; set it to that word, such as zwx"),
        ({"placeholder_token": "qrs"}, "placeholder_token='qrs': 'qrs' is no word of 'photo of zwx toy'; put it into"),
        ({"placeholder_token": "<zwx>"}, "has to be letters of the English alphabet, digits, - and _; take another"),
        ({"placeholder_token": "toy"}, "'toy' is a word of the class prompt 'photo of a toy' as well; take a rare one"),
        ({"caption_dropout": "0.1"}, "caption_dropout=0.1: method=textual_inversion learns nothing from pictures"),
        ({"num_vectors": "0"}, "num_vectors"),
        ({"method": "full", "num_vectors": "2"}, "num_vectors belongs to method=textual_inversion"),
        ({"export": "both"}, "export belongs to method=full"),
    ],
)
def test_what_it_can_not_go_with_is_refused(values: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(**values)
    assert words in str(caught.value)
    assert len(caught.value.problems) == 1


def test_text_encoders_can_not_be_trained_beside_it() -> None:
    for card in ("CPU", "A10G"):
        plan = make_plan(parse(base_architecture="sd"), CARDS[card])
        assert not plan.train_text_encoder
        assert not [note for note in plan.notes if "text encoder" in note]
        with pytest.raises(UserError, match="method=textual_inversion leaves it as it is; set it to false or auto"):
            make_plan(parse(train_text_encoder="true"), CARDS[card])


def test_the_plan_counts_the_text_encoder_that_reads_in_every_step() -> None:
    h = parse(base_architecture="sd")
    other = h.model_copy(update={"method": "hypernetwork", "hypernetwork_layers": 1, "hypernetwork_width": 1})
    plan = make_plan(h, CARDS["A10G"])
    encoder = 2e-3 * 123.1 + 0.05  # in 16 bits, and its activations
    found = plan.predicted_peak_gb - make_plan(other, CARDS["A10G"]).predicted_peak_gb
    assert found == pytest.approx(encoder, abs=0.04)


def test_pictures_whose_captions_lack_the_word_are_named_before_the_job(tmp_path: Path) -> None:
    one, two = paint_pictures(tmp_path, 2, size=(64, 64))
    one.with_suffix(".txt").write_text("ZWX on a table")
    two.with_suffix(".txt").write_text("zwxs on a table")
    h = parse(instance_prompt="[filewords]", placeholder_token="zwx", resolution=64)
    found = check_folder(tmp_path, h).errors
    assert len(found) == 1
    assert f"{two}: its prompt 'zwxs on a table' does not have zwx, which is to be learned" in found[0]
    assert mentions("photo of zwx's", ["zwx"])
    assert not mentions("photo of zwx", [])


def test_prompts_that_their_vectors_make_too_long_are_named_before_the_job(tmp_path: Path) -> None:
    paint_pictures(tmp_path, 1, size=(64, 64))
    fits, long = (
        parse(instance_prompt="zwx zwx zwx toy", class_prompt="toy", resolution=64, num_vectors=count)
        for count in (24, 25)
    )
    assert not check_folder(tmp_path, fits).errors
    (line,) = check_folder(tmp_path, long).errors
    assert "has 76 tokens and max_token_length=75 allows 75" in line
