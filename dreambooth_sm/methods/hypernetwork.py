"""Hypernetworks: small residual networks before the keys and the values of the cross attention, beside a model that
stays as it is (Kurumuz 2022, "NovelAI Improvements on Stable Diffusion", which is not a paper).

One network serves the keys of all layers and one their values: ``states + network(states)`` takes the place of the text
encoder's states. The last layer of each starts from zero: an untrained hypernetwork changes nothing.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.planning.ladder import Rung

if TYPE_CHECKING:
    import torch

    from dreambooth_sm.families import ModelFootprint
    from dreambooth_sm.hyperparameters import Hyperparameters
    from dreambooth_sm.models import PretrainedModel
    from dreambooth_sm.planning.plan import Plan

# What a network stands before, by the names of diffusers and in the order of WebUI's files.
_BEFORE = ("to_k", "to_v")
# Activations by their names in WebUI, as torch calls them; "linear" is none.
_ACTIVATIONS = {
    "relu": "ReLU",
    "leakyrelu": "LeakyReLU",
    "elu": "ELU",
    "swish": "Hardswish",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
}
# The metadata field of our files that says what the networks look like.
_FIELD = "dreambooth_sm.hypernetwork"
# What is exported: safetensors, and WebUI's.
_ENDINGS = (".safetensors", ".pt")


class Hypernetwork:
    """Trains two networks beside a model."""

    name = "hypernetwork"
    trains = "hypernetwork"
    title = "with a hypernetwork beside it that was trained with DreamBooth"
    hub: Mapping[str, str] = MappingProxyType({"base_model_relation": "adapter"})  # no library loads it by itself
    tags = ("hypernetwork",)
    leaves_base = True
    trains_text_encoder = False
    encodes_prompts = False
    has_live_base = True
    ladder = (
        #     name      GiB  weights      bits  keeps grads  checkpoints  text encoder  EMA
        Rung("roomy", 0, "residual", 8, True, False, False, False),
        Rung("small", 0, "residual", 8, True, True, False, False),
    )

    def trained_millions(self, footprint: ModelFootprint, h: Hyperparameters, text_encoder: bool) -> float:
        return len(_BEFORE) * NetworkShape.of(h, footprint.text_width).parameters * 1e-6

    def activations(self, h: Hyperparameters) -> str:
        return "frozen_"

    def attach(self, model: PretrainedModel, plan: Plan, h: Hyperparameters, seed: int) -> Networks:
        import torch

        shape = NetworkShape.of(h, int(model.unet.config.cross_attention_dim))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Networks(model, shape, {before: shape.make() for before in _BEFORE})

    def usage(self, pipeline: str, base: str, prompt: str, hyperparameters: Mapping[str, Any]) -> str:
        return f"""In diffusers, with `pip install dreambooth-sm`:

```python
from diffusers import {pipeline}
from dreambooth_sm.methods.hypernetwork import apply

pipeline = {pipeline}.from_pretrained({base!r})
apply(pipeline, {hyperparameters["model_name"] + _ENDINGS[0]!r})  # strength=0.5: half as much of it
picture = pipeline({prompt!r}).images[0]
```

In WebUI, the `{_ENDINGS[1]}` file goes to `models/hypernetworks`, and prompts call it by its name without the ending:
`<hypernet:NAME:1>`."""


METHOD = Hypernetwork()


@dataclass(frozen=True)
class NetworkShape:
    """The shape of a network.

    Attributes:
        width: of the text encoder's states, which go in and come out.
        structure: the width of what goes in and of each layer's output, as multiples of that.
        activation: behind each linear layer but the last, by its name in WebUI.
    """

    width: int
    structure: tuple[int, ...]
    activation: str

    @classmethod
    def of(cls, h: Hyperparameters, width: int) -> NetworkShape:
        structure = (1, *[h.hypernetwork_width] * h.hypernetwork_layers, 1)
        return cls(width, structure, h.hypernetwork_activation)

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Widths of what goes into each linear layer and of what comes out."""
        widths = [self.width * multiple for multiple in self.structure]
        return list(itertools.pairwise(widths))

    @property
    def parameters(self) -> int:
        return sum((before + 1) * after for before, after in self.layers)

    def make(self) -> Any:
        """A network that changes nothing before it is trained."""
        from torch import nn

        *hidden, (before, after) = self.layers
        linear = nn.Sequential()
        for widths in hidden:
            linear.append(nn.Linear(*widths))
            if self.activation in _ACTIVATIONS:
                linear.append(getattr(nn, _ACTIVATIONS[self.activation])())
        last = nn.Linear(before, after)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        network = nn.Sequential(OrderedDict(linear=linear.append(last)))  # "linear": as in the keys of WebUI's files
        network.register_forward_hook(_add_input)
        return network


def _add_input(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return inputs[0] + output


class Networks:
    """A model and the networks beside it, by what they stand before."""

    rates: Mapping[str, float] = MappingProxyType({})

    def __init__(self, model: PretrainedModel, shape: NetworkShape, networks: Mapping[str, Any]) -> None:
        self.model = model
        self._shape, self._networks = shape, networks

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {
            f"{before}.{key}": parameter
            for before, network in self._networks.items()
            for key, parameter in network.named_parameters()
        }

    def load(self) -> None:
        self.model.load("unet")

    def place(self, plan: Plan, device: torch.device) -> None:
        from dreambooth_sm.training.placement import place, speed_up
        from dreambooth_sm.training.precision import weights_dtype

        _remove(self.model.unet)  # the networks have another precision
        place(self.model.unet, plan, device, trained=False)
        for network in self._networks.values():
            network.to(device=device, dtype=weights_dtype(plan)).requires_grad_(True).train()
        _insert(self.model.unet, self._networks)
        speed_up(self.model.unet, plan)

    @contextlib.contextmanager
    def untrained(self) -> Iterator[None]:
        attentions = list(_cross_attentions(self.model.unet))
        inserted = [(attention, before, getattr(attention, before)) for attention in attentions for before in _BEFORE]
        _remove(self.model.unet)
        try:
            yield
        finally:  # the same modules as before: compiled blocks know them
            for attention, before, module in inserted:
                setattr(attention, before, module)

    def drawable(self, dtype: torch.dtype) -> Networks:
        self.load()
        drawn = self.model.with_frames("unet")
        networks = {before: copy.deepcopy(network).to(dtype) for before, network in self._networks.items()}
        _remove(drawn.unet)
        _insert(drawn.unet, networks)
        return Networks(drawn, self._shape, networks)

    def export(self, directory: Path, h: Hyperparameters, dtype: torch.dtype | None) -> None:
        import torch

        from dreambooth_sm.stored.files import Stored, write_safetensors

        path = directory / f"{h.model_name}{_ENDINGS[0]}"
        notes = {_FIELD: json.dumps(asdict(self._shape)), "modelspec.trigger_phrase": h.instance_prompt or ""}
        values = {name: parameter.detach() for name, parameter in self.parameters.items()}
        write_safetensors(path, {name: Stored.of(value) for name, value in values.items()}, dtype=dtype, notes=notes)
        pair = tuple(
            {key: value.to(dtype or value.dtype) for key, value in network.state_dict().items()}
            for network in (self._networks[before] for before in _BEFORE)
        )
        webui = {
            self._shape.width: pair,
            "name": h.model_name,
            "layer_structure": list(self._shape.structure),
            "activation_func": self._shape.activation,
            "weight_initialization": "Normal",
            "is_layer_norm": False,
            "use_dropout": False,
            "activate_output": False,
            "last_layer_dropout": False,
            "sd_checkpoint": None,
            "sd_checkpoint_name": self.model.name,
        }
        torch.save(webui, path.with_suffix(_ENDINGS[1]))

    def exported_values(self, h: Hyperparameters) -> int:
        return len(_ENDINGS) * sum(parameter.numel() for parameter in self.parameters.values())


def apply(pipeline: Any, path: str | Path, strength: float = 1.0) -> None:
    """Puts an exported hypernetwork into a pipeline of Stable Diffusion 1 or 2, in place of one that is in it.

    Args:
        pipeline: of diffusers; the networks take its precision and device.
        path: ``.safetensors`` as :meth:`Networks.export` writes it, or ``.pt`` in WebUI's layout.
        strength: 0 draws as the base model does, 1 as it was trained.

    Raises:
        UserError: where the file can't be read, holds networks of another kind, or is for another base model.

    Examples:
        >>> apply(pipeline, "zwx-toy.safetensors")  # doctest: +SKIP
    """
    shape, values = _read(Path(path))
    unet = pipeline.unet
    if shape.width != unet.config.cross_attention_dim:
        raise UserError(
            f"{path} is for text encoders whose states are {shape.width} wide, and the pipeline's are "
            f"{unet.config.cross_attention_dim} wide; take the base model that it was trained with"
        )
    networks = {before: shape.make() for before in _BEFORE}
    for before, network in networks.items():
        try:
            network.load_state_dict(values[before])
        except (RuntimeError, KeyError) as error:
            raise _damaged(Path(path), error) from error
        network[0][-1].weight.data *= strength
        network[0][-1].bias.data *= strength
        network.to(unet.device, unet.dtype).requires_grad_(False).eval()
    _remove(unet)
    _insert(unet, networks)


def _read(path: Path) -> tuple[NetworkShape, dict[str, dict[str, torch.Tensor]]]:
    """The shape of the networks in a file, and the values of each."""
    import torch
    from safetensors import safe_open

    if not path.is_file():
        raise UserError(f"{path} is not a file; name the .safetensors or the .pt file that a job left")
    try:
        if path.suffix == _ENDINGS[0]:
            with safe_open(path, "pt") as file:
                fields = json.loads(file.metadata()[_FIELD])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            values = {
                before: {key.removeprefix(f"{before}."): t for key, t in tensors.items() if key.startswith(before)}
                for before in _BEFORE
            }
            return NetworkShape(int(fields["width"]), tuple(fields["structure"]), str(fields["activation"])), values
        found = torch.load(path, map_location="cpu", weights_only=True)
        widths = [width for width in found if isinstance(width, int)]
        others = [name for name in ("is_layer_norm", "activate_output", "use_dropout") if found.get(name)]
        structure = tuple(found.get("layer_structure") or (1, 2, 1))
        activation = found.get("activation_func") or "linear"
        values = {before: found[widths[0]][number] for number, before in enumerate(_BEFORE)}
    except Exception as error:  # whatever a file of anybody's can cause
        raise _damaged(path, error) from error
    if len(widths) > 1:
        others.append(f"networks of the self-attention ({', '.join(map(str, sorted(widths)[:-1]))})")
    if any(multiple != int(multiple) for multiple in structure) or activation not in ("linear", *_ACTIVATIONS):
        others.append(f"layer_structure={list(structure)} with {activation}")
    if others:
        raise UserError(f"{path} has {' and '.join(others)}, which is not supported here; draw with it in WebUI")
    return NetworkShape(widths[0], tuple(map(int, structure)), activation), values


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} can't be read as a hypernetwork ({type(error).__name__}: {error}); copy it again")


def _insert(unet: Any, networks: Mapping[str, Any]) -> None:
    """Puts the networks before the keys and the values of every cross attention."""
    from torch import nn

    for attention in _cross_attentions(unet):
        for before, network in networks.items():
            linear = getattr(attention, before)
            setattr(attention, before, nn.Sequential(OrderedDict(network=network, linear=linear)))


def _remove(unet: Any) -> None:
    """Takes out what :func:`_insert` put in, if it did."""
    for attention in _cross_attentions(unet):
        for before in _BEFORE:
            inserted = getattr(attention, before)
            setattr(attention, before, getattr(inserted, "linear", inserted))


def _cross_attentions(unet: Any) -> Iterator[Any]:
    for module in list(unet.modules()):
        if getattr(module, "is_cross_attention", False):
            yield module
