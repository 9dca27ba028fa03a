"""A family unlike those there are trains with no code but its own: packed latents, masked states of a language model, a
VAE that shifts as well as scales, flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreambooth_sm.errors import StopRequested
from dreambooth_sm.families import Conditioning, Facts, Family, ModelFootprint
from dreambooth_sm.families.facts import Drawing
from dreambooth_sm.families.family import LossKnobs
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.training.checkpoint import latest_checkpoint
from tests.helpers.training import Run, same, weights

SHIFT, SCALE, TIMES = 0.25, 0.4, 1000


@dataclass(frozen=True)
class FlowMatching:
    """Straight ways from the picture to noise (Lipman et al. 2022, "Flow Matching for Generative Modeling")."""

    times: int = TIMES

    def to(self, device: torch.device) -> FlowMatching:
        return self

    def told(self, times: Tensor) -> Tensor:
        return (times + 1) / self.times

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        share = (times + 1).view(-1, 1, 1, 1) / self.times
        return (1 - share) * latents + share * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - latents

    def row_weights(self, times: Tensor) -> Tensor | None:
        return None

    def invert(self, seen: Tensor, prediction: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        share = (times + 1).view(-1, 1, 1, 1) / self.times
        return seen - share * prediction, seen + (1 - share) * prediction


class Transformer(nn.Module):
    """Takes patches in a row, and the states that a mask leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.time, self.out = nn.Linear(8, 16), nn.Linear(1, 16), nn.Linear(16, 16)

    def forward(self, patches: Tensor, share: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        seen = (self.text(states) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        hidden: Tensor = self.out(patches + (seen + self.time(share[:, None]))[:, None])
        return hidden


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(256, 8)

    @property
    def device(self) -> torch.device:
        return self.words.weight.device


class Flow:
    facts = Facts(
        name="flow",
        title="Flow 1",
        short="Flow",
        article="a",
        listed="Flow",
        resolution=64,
        footprint=ModelFootprint(denoiser=1, text_encoder=1, vae=1, text_width=8),
        pipeline="FlowPipeline",
        drawing=Drawing("Euler", steps=2, class_steps=2, guidance=1.0, guided=(1.0, 0.0)),
        parts=("transformer", "vae", "text_encoder"),
        tags=(),
    )

    def tokenize(
        self, model: Any, prompts: Sequence[str], *, max_tokens: int | None = 75, pad: bool = True
    ) -> dict[str, Tensor]:
        rows = [torch.tensor(list(prompt.encode())) for prompt in prompts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return {"ids": ids, "mask": torch.arange(ids.shape[1]) < lengths[:, None]}

    def encode(self, model: Any, tokens: Mapping[str, Tensor]) -> Conditioning:
        return Conditioning({"states": model.text_encoder.words(tokens["ids"]), "mask": tokens["mask"]})

    def extras(
        self, size: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> Mapping[str, Sequence[float]]:
        return {}

    def predict(self, denoiser: Any, noised: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = (side // 2 for side in noised.shape[2:])
        patches = nn.functional.pixel_unshuffle(noised, 2).flatten(2).transpose(1, 2)
        text = conditioning.text
        made = denoiser(patches, times, text["states"], text["mask"])
        return nn.functional.pixel_shuffle(made.transpose(1, 2).unflatten(2, (height, width)), 2)

    def sampler(self, model: Any, steps: int, size: tuple[int, int], device: torch.device) -> Any:
        raise NotImplementedError

    def guide(self, predicted: Tensor, without: Tensor, guidance: float) -> Tensor:
        raise NotImplementedError

    def objective(self, model: Any, h: LossKnobs) -> FlowMatching:
        return FlowMatching()

    def scale(self, vae: Any) -> tuple[float, float]:
        return SHIFT, SCALE

    def normalise(self, scale: Any, latents: Tensor) -> Tensor:
        shift, factor = scale
        return (latents - shift) * factor

    def denormalise(self, scale: Any, latents: Tensor) -> Tensor:
        shift, factor = scale
        return latents / factor + shift

    def vae_dtype(self, vae: Any) -> torch.dtype:
        return torch.bfloat16


FLOW: Family = Flow()


@pytest.fixture
def model(base: PretrainedModel) -> PretrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {"transformer": Transformer(), "vae": base.vae, "text_encoder": LanguageModel()}
    for part in parts.values():
        part.requires_grad_(False)
    return PretrainedModel("flow", FLOW, {**parts, "tokenizer": None, "scheduler": None})


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True], ids=["denoiser", "both"])
def test_it_trains_and_resumes(model: PretrainedModel, tmp_path: Path, trained: bool) -> None:
    values = {"with_prior_preservation": True, "max_train_steps": 3, "use_ema": True, "train_text_encoder": trained}
    whole = Run(model, tmp_path / "whole", **values).train()
    assert not same(weights(whole.base.denoiser), weights(model.denoiser))
    assert same(weights(whole.base.text_encoder), weights(model.text_encoder)) is not trained
    with pytest.raises(StopRequested):
        Run(model, tmp_path / "stopped", **values).train(stop_at=1)
    checkpoint = latest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert checkpoint is not None
    assert {name.partition(".")[0] for name in checkpoint.load()["weights"]} == (
        {"transformer", "text_encoder"} if trained else {"transformer"}
    )
    resumed = Run(model, tmp_path / "stopped", **values)
    resumed.trainer.resume(checkpoint)
    assert same(weights(resumed.train().base.denoiser), weights(whole.base.denoiser))


def test_its_loss_is_its_own(model: PretrainedModel, tmp_path: Path) -> None:
    """By hand, with shifted latents and without padded words."""
    run = Run(model, tmp_path, with_prior_preservation=True)
    batch = run.data.batch_sampler.batch(0, 1)
    prompts = [run.subject.prompt, str(run.subject.class_prompt)]
    losses = []
    for row, prompt in enumerate(prompts):
        posterior = run.data.latents._cache[int(batch.pictures[row])]
        mean, deviation = (part[int(batch.views[row]) % len(part)] for part in posterior)
        latents = (mean + deviation * batch.latent_noise[row] - SHIFT) * SCALE
        share = (int(batch.timesteps[row]) + 1) / TIMES
        noised = (1 - share) * latents + share * batch.noise[row]
        states = model.text_encoder.words(torch.tensor(list(prompt.encode())))
        hidden = model.transformer.text(states).mean(0) + model.transformer.time(torch.tensor([share]))
        channels, height, width = noised.shape
        patches = noised.view(channels, height // 2, 2, width // 2, 2).permute(1, 3, 0, 2, 4).reshape(-1, 4 * channels)
        made = model.transformer.out(patches + hidden)
        made = made.view(height // 2, width // 2, channels, 2, 2).permute(2, 0, 3, 1, 4).reshape(noised.shape)
        losses.append((made - (batch.noise[row] - latents)).square().mean().item())
    ours = run.trainer.loss(batch).detach()
    assert [float(ours.instance), float(ours.prior)] == pytest.approx(losses, rel=1e-5)
    assert run.data.prompts["mask"].dtype == torch.bool
