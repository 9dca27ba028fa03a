"""Twenty steps on the CPU, or six, give the losses that are stored, and those of an independent re-implementation.

After a change that is meant to change them, renew them and show the difference in the change:

    UPDATE_GOLDEN=1 python -m pytest tests/unit/test_golden_losses.py
"""

from __future__ import annotations

import copy
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from dreambooth_sm.errors import StopRequested
from dreambooth_sm.models import PretrainedModel, load_base
from tests.helpers.marks import slow_except
from tests.helpers.optimizers import PLAIN_OPTIMIZERS, PlainScheduleFree
from tests.helpers.tiny import save_tiny_pipeline, save_tiny_xl_pipeline
from tests.helpers.training import Run, attach, hyperparameters, same

STORED = Path(__file__).parent / "golden"
STEPS = 20
# As many are run again, and by the independent re-implementation: each needs the weights that the one before left.
COMPARED = 6
CASES: dict[str, dict[str, object]] = {
    "unet": {},
    "prior": {"with_prior_preservation": True, "prior_loss_weight": 0.5, "train_batch_size": 2},
    "text_encoder": {"train_text_encoder": True, "with_prior_preservation": True},
    "min_snr_accumulation": {
        "with_prior_preservation": True,
        "snr_gamma": 5.0,
        "gradient_accumulation_steps": 2,
        "train_text_encoder": True,
        "center_crop": False,
        "hflip": True,
        "lr_scheduler": "cosine",
    },
    "debiased_huber_offset": {
        "with_prior_preservation": True,
        "debiased_loss": True,
        "loss": "huber",
        "huber_delta": 0.3,
        "noise_offset": 0.1,
    },
    **{name: {"max_train_steps": 6, "optimizer": name} for name in PLAIN_OPTIMIZERS},
    "prodigy": {"max_train_steps": 6, "optimizer": "prodigy", "learning_rate": 1.0},
    "textual_inversion": {
        "method": "textual_inversion",
        "class_prompt": "photo of a toy",
        "num_vectors": 2,
        "initial_text": "duck cat",
        "learning_rate": 1e-2,
    },
    "xl": {
        "base_architecture": "sdxl",
        "with_prior_preservation": True,
        "train_batch_size": 2,
        "max_train_steps": 6,
    },
    "lora": {
        "method": "lora",
        "lora_alpha": 8,
        "lora_targets": "linear",
        "lora_plus_ratio": 4,
        "learning_rate": 1e-3,
        "train_text_encoder": True,
        "text_encoder_lr": 5e-4,
        "with_prior_preservation": True,
        "max_train_steps": 6,
    },
    "pivotal": {
        "method": "pivotal",
        "lora_targets": "attention",
        "class_prompt": "photo of a toy",
        "num_vectors": 2,
        "initial_text": "duck cat",
        "lora_alpha": 8,
        "lora_plus_ratio": 4,
        "learning_rate": 1e-3,
        "placeholder_lr": 1e-2,
        "max_train_steps": 6,
    },
    "xl_text_encoders": {
        "base_architecture": "sdxl",
        "with_prior_preservation": True,
        "train_text_encoder": True,
        "max_train_steps": 6,
    },
}


@dataclass
class Case:
    """A training that has run: where it began, what it came to, and its parameters after the compared steps."""

    name: str
    base: PretrainedModel
    run: Run
    compared: dict[str, torch.Tensor]


def begin(base: PretrainedModel, root: Path, name: str) -> Run:
    """Trains as many steps as are compared."""
    run = Run(base, root, **{"max_train_steps": STEPS, **CASES[name]})
    with suppress(StopRequested):
        run.train(stop_at=COMPARED)
    assert len(run.losses) == COMPARED
    return run


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PretrainedModel]:
    """Of the latents that the stored losses are of: half as wide as the pictures."""
    folder = tmp_path_factory.mktemp("bases")
    saved = {
        "sd": save_tiny_pipeline(folder / "sd", vae_levels=2),
        "xl": save_tiny_xl_pipeline(folder / "xl", vae_levels=2),
    }
    return {name: load_base(hyperparameters(pretrained_model_name_or_path=str(path))) for name, path in saved.items()}


@pytest.fixture(scope="module", params=slow_except(["textual_inversion", "lora"], CASES))
def case(
    request: pytest.FixtureRequest, bases: dict[str, PretrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Case:
    base = bases["xl" if request.param.startswith("xl") else "sd"]
    run = begin(base, tmp_path_factory.mktemp(request.param), request.param)
    compared = {name: parameter.detach().clone() for name, parameter in run.trainable.parameters.items()}
    run.recorder.stop.clear()
    if len(run.losses) < run.schedule.steps:
        run.train()
    return Case(request.param, base, run, compared)


def test_losses_are_the_stored_ones(case: Case) -> None:
    losses = case.run.losses
    path = STORED / f"{case.name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(json.dumps(losses, indent=1) + "\n")
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert len(losses) == len(stored) == case.run.h.max_train_steps
    for step, (ours, theirs) in enumerate(zip(losses, stored, strict=True), start=1):
        assert list(ours) == pytest.approx(theirs, rel=1e-4), f"step {step}"


@pytest.mark.slow
def test_a_second_run_in_the_same_process_is_bitwise_the_first(case: Case, tmp_path: Path) -> None:
    again = begin(case.base, tmp_path, case.name)
    assert again.losses == case.run.losses[:COMPARED]
    assert same(again.trainable.parameters, case.compared)


def flat(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in values])


def add_lora(base: PretrainedModel, reference: Run) -> list[dict[str, object]]:
    """Adds a product of two matrices to the weights of linear layers and 1x1 convolutions, by torch's own means.

    Returns:
        the parameters, by their learning rates.
    """
    values = untrained_values(base, reference)
    rates: dict[float, list[torch.nn.Parameter]] = {}
    for name in [name.removesuffix(".lora_A.weight") for name in values if name.endswith(".lora_A.weight")]:
        part, _, layer = name.partition(".")
        module = getattr(base, part).get_submodule(layer)
        module.requires_grad_(False)
        torch.nn.utils.parametrize.register_parametrization(
            module, "weight", Product(values[f"{name}.lora_A.weight"], values[f"{name}.lora_B.weight"])
        )
        product = module.parametrizations.weight[0]
        rate = 1e-3 if part == "unet" else 5e-4
        rates.setdefault(rate, []).append(product.down)
        rates.setdefault(4 * rate, []).append(product.up)
    return [{"params": parameters, "lr": rate} for rate, parameters in rates.items()]


def untrained_values(base: PretrainedModel, reference: Run) -> dict[str, torch.Tensor]:
    trainable = attach(copy.deepcopy(base), reference.h, reference.plan)
    trainable.load()
    return {name: parameter.detach().clone() for name, parameter in trainable.parameters.items()}


class Product(torch.nn.Module):
    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.down, self.up = torch.nn.Parameter(down), torch.nn.Parameter(up)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 8 / 16 * (self.up.flatten(1) @ self.down.flatten(1)).reshape(weight.shape)


def plain_losses(base: PretrainedModel, case: Case) -> list[tuple[float, ...]]:
    """The same training written down once more: torch, diffusers' scheduler, and the batches; nothing else of ours."""
    reference = case.run
    h, data = reference.h, reference.data
    parts, size = h.gradient_accumulation_steps, h.train_batch_size
    text_encoders = [getattr(base, part) for part in base.text_parts] if reference.plan.train_text_encoder else []
    if learns_words := h.method in ("textual_inversion", "pivotal"):
        ids, table, known = longer_table(base)
        groups = [{"params": [table], "lr": 1e-2}]
        if h.method == "pivotal":
            groups += add_lora(base, reference)
    elif h.method == "lora":
        groups = add_lora(base, reference)
    else:
        groups = [{"params": [p.requires_grad_() for m in (base.unet, *text_encoders) for p in m.parameters()]}]
    optimizer = PLAIN_OPTIMIZERS.get(h.optimizer, torch.optim.AdamW)(
        groups,
        lr=h.learning_rate,
        betas=(h.adam_beta1, h.adam_beta2),
        eps=h.adam_epsilon,
        weight_decay=h.adam_weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: (
            0.5 * (1 + torch.cos(torch.tensor(torch.pi * n / STEPS)).item()) if h.lr_scheduler == "cosine" else 1.0
        ),
    )
    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    losses: list[tuple[float, ...]] = []
    for step in range(COMPARED):
        sums = torch.zeros(3)
        for part in range(parts):
            batch = data.batch_sampler.batch(step * parts + part, size)
            latents = data.latents(batch)
            noised = scheduler.add_noise(latents, batch.noise, batch.timesteps)
            if learns_words:
                hidden = base.text_encoder(ids.expand(size, -1)).last_hidden_state
            elif len(text_encoders) == 1:
                hidden = base.text_encoder(data.prompts["ids"][batch.prompts][:, 0]).last_hidden_state
            elif not text_encoders:
                hidden = data.prompts["states"][batch.prompts]
            told = None
            if base.family.facts.name == "sdxl":
                with torch.set_grad_enabled(bool(text_encoders)):
                    hidden, told = xl_conditions(base, reference, size)
            prediction = base.unet(noised, batch.timesteps, hidden, added_cond_kwargs=told).sample
            halves: list[torch.Tensor] = []
            for half in torch.arange(len(latents)).split(size):
                rows = []
                for row in half.tolist():
                    loss = torch.nn.functional.mse_loss(prediction[row], batch.noise[row])
                    if h.loss == "huber":
                        far = (prediction[row] - batch.noise[row]) / h.huber_delta
                        loss = 2 * h.huber_delta**2 * ((1 + far**2) ** 0.5 - 1).mean()
                    signal = scheduler.alphas_cumprod[batch.timesteps[row]]
                    snr = signal / (1 - signal)
                    if h.snr_gamma:
                        loss = loss * min(snr.item(), h.snr_gamma) / snr
                    if h.debiased_loss:
                        loss = loss / snr**0.5
                    rows.append(loss)
                halves.append(sum(rows) / len(rows))
            total = halves[0] + (h.prior_loss_weight * halves[1] if h.prior_preservation else 0)
            (total / parts).backward()
            values = [total, *halves]
            sums[: len(values)] += torch.stack(values).detach() / parts
            if learns_words:
                table.grad[:known] = 0
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(tuple(sums[: 3 if h.prior_preservation else 2].tolist()))
    if isinstance(optimizer, PlainScheduleFree):
        optimizer.take_average()
    if learns_words:
        torch.testing.assert_close(table.detach()[known:], case.compared["text_encoder.zwx"])
        base.text_encoder.resize_token_embeddings(known)
    return losses


def longer_table(base: PretrainedModel) -> tuple[torch.Tensor, torch.nn.Parameter, int]:
    """Rows of new tokens behind those that the text encoder knows, as diffusers' script for textual inversion has them.

    Returns:
        the ids of the instance prompt, the table, and how many rows it had.
    """
    known = len(base.tokenizer)
    base.tokenizer.add_tokens(["new", "new_1"])
    base.text_encoder.resize_token_embeddings(len(base.tokenizer), mean_resizing=False)
    table = base.text_encoder.get_input_embeddings().weight.requires_grad_()
    initial = base.tokenizer("duck cat", add_special_tokens=False, return_tensors="pt").input_ids[0]
    table.data[known:] = table.data[initial]
    prompt = base.tokenizer("photo of new new_1 toy", padding="max_length", return_tensors="pt")
    return prompt.input_ids, table, known


def xl_conditions(base: PretrainedModel, reference: Run, size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """By diffusers' own encoding of the prompts; all pictures are 80 x 64 and cropped to the middle."""
    prompts = [reference.subject.prompt] * size + [str(reference.subject.class_prompt)] * size
    states, _, pooled, _ = base.pipeline().encode_prompt(prompts, do_classifier_free_guidance=False)
    return states, {"text_embeds": pooled, "time_ids": torch.tensor([[64, 80, 0, 8, 64, 64]] * 2 * size).float()}


@pytest.mark.slow
def test_an_independent_loop_agrees(case: Case) -> None:
    plain = copy.deepcopy(case.base)
    start = untrained_values(plain, case.run)
    theirs = plain_losses(plain, case)
    for step, (ours, other) in enumerate(zip(case.run.losses[:COMPARED], theirs, strict=True), start=1):
        assert ours == pytest.approx(other, rel=1e-5), f"step {step}"
    # Where a gradient is 0 but for rounding (biases before a norm), Adam steps in the direction of the rounding, and
    # those without an epsilon as far as elsewhere.
    tolerance = 0.2 if case.name in ("lion", "adafactor") else 0.02
    # Those of words were compared where the table still had them.
    trained = {name: p for name, p in case.compared.items() if not name.endswith(".zwx")}
    if case.run.h.method in ("lora", "pivotal"):
        found = [(f"{part}.{name}", m) for part in plain.modules for name, m in getattr(plain, part).named_modules()]
        products = [(name.removesuffix(".parametrizations.weight.0"), m) for name, m in found if type(m) is Product]
        there = {f"{name}.lora_A.weight": m.down for name, m in products}
        there |= {f"{name}.lora_B.weight": m.up for name, m in products}
    else:
        there = {f"{part}.{name}": p for part in plain.modules for name, p in getattr(plain, part).named_parameters()}
    for part in {name.partition(".")[0] for name in trained} & set(plain.modules):
        names = [name for name in trained if name.startswith(f"{part}.")]
        begun, ours_, theirs_ = (flat([values[name] for name in names]) for values in (start, trained, there))
        assert (ours_ - theirs_).norm() <= tolerance * (theirs_ - begun).norm()


def test_the_cases_differ() -> None:
    """A case that an option does not reach would store the losses of another."""
    sixth = [json.loads((STORED / f"{case}.json").read_text())[5][0] for case in CASES]
    assert len({round(loss, 4) for loss in sixth}) == len(CASES)
