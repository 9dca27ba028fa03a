"""LoRA and its kin: small matrices beside layers of a model that stays as it is (Hu et al. 2021, "LoRA: Low-Rank
Adaptation of Large Language Models")."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dreambooth_sm.families import FAMILIES
from dreambooth_sm.planning.ladder import Rung

if TYPE_CHECKING:
    import torch

    from dreambooth_sm.adapters.adapter import Adapter
    from dreambooth_sm.families import ModelFootprint
    from dreambooth_sm.hyperparameters import Hyperparameters
    from dreambooth_sm.models import PretrainedModel
    from dreambooth_sm.planning.plan import Plan
    from dreambooth_sm.stored.hollow import HollowModule

# The file that `load_lora_weights` of diffusers looks for.
FILE = "pytorch_lora_weights.safetensors"
# The kinds that diffusers loads, and those of files for WebUI and ComfyUI.
DIFFUSERS_VARIANTS, FLAT_VARIANTS = ("lora", "dora"), ("lora", "loha", "lokr")
# Parameters of an adapter, as a multiple of those of LoRA of that rank; a little more than there are, for some.
_PARAMETERS = {"loha": 2.0}


class Lora:
    """Trains adapters beside layers of the denoiser, and of the text encoders where that is asked for."""

    name = "lora"
    trains = "adapters"
    title = "with an adapter that was trained with DreamBooth"
    hub: Mapping[str, str] = MappingProxyType({"library_name": "diffusers", "base_model_relation": "adapter"})
    tags = ("lora",)
    leaves_base = True
    trains_text_encoder = True
    encodes_prompts = False
    has_live_base = True
    ladder = (
        #     name      GiB  weights      bits  keeps grads  checkpoints  text encoder  EMA
        Rung("roomy", 0, "master", 32, True, False, False, False, "adamw"),
        Rung("small", 0, "master", 32, True, True, False, False, "adamw"),
        Rung("tight", 0, "master", 32, True, True, False, False, "adamw", "int8"),
        Rung("tiny", 0, "master", 32, True, True, False, False, "adamw", "nf4"),
    )

    def trained_millions(self, footprint: ModelFootprint, h: Hyperparameters, text_encoder: bool) -> float:
        layers = h.facts.adapted[h.lora_targets]
        width = layers.width + (layers.text_width if text_encoder else 0)
        return _PARAMETERS.get(h.lora_variant, 1.0) * h.lora_rank * width * 1e-6

    def activations(self, h: Hyperparameters) -> str:
        return f"{h.lora_variant}_{h.lora_targets}_"

    def attach(self, model: PretrainedModel, plan: Plan, h: Hyperparameters, seed: int) -> Adapters:
        return Adapters.of(model, plan, h, seed)

    def usage(self, pipeline: str, base: str, prompt: str, hyperparameters: Mapping[str, Any]) -> str:
        variant, export = hyperparameters["lora_variant"], hyperparameters["export"]
        facts = next((each.facts for each in FAMILIES.values() if each.facts.pipeline == pipeline), None)
        comfyui = facts is not None and facts.adapters == "comfyui"
        option = facts.scale_option if facts else "cross_attention_kwargs"
        asked = {"prompt": prompt, **(facts.call_options if facts else {})}
        call = f"pipeline({', '.join(f'{name}={value!r}' for name, value in asked.items())})"
        told = []
        if export != "merged" and variant in DIFFUSERS_VARIANTS:
            told.append(f"""```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained({base!r})
pipeline.load_lora_weights('.')  # this directory
picture = {call}.images[0]  # {option}={{'scale': 0.5}}: half as much of it
```""")
        if export != "merged" and variant in FLAT_VARIANTS:
            webui = (
                f"In WebUI, the other file, not `{FILE}`, goes to `models/Lora`, and prompts call it by its name "
                "without the ending: `<lora:NAME:1>`. In ComfyUI, it goes to `models/loras`, for the node Load LoRA."
            )
            nodes = (
                f"In ComfyUI, the other file, not `{FILE}`, goes to `models/loras`, for the node LoraLoaderModelOnly."
            )
            told.append(nodes if comfyui else webui)
        if export != "adapter":
            told.append(
                f"""{"Base model and adapter as one:" if told else ""}
```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained('.')  # this directory
picture = {call}.images[0]
```""".strip()
            )
        if not told:
            told.append(
                f"`{FILE}` is for PEFT; `dreambooth-sm convert` puts it into a base model, which any program can draw "
                "with."
            )
        return "\n\n".join(told)


METHOD = Lora()


class Adapters:
    """A model and the adapters beside its layers.

    Until they are loaded, they have names and shapes alone: some begin with values of the layers that they lie beside.
    """

    def __init__(
        self,
        model: PretrainedModel,
        plan: Plan,
        h: Hyperparameters,
        adapted: Mapping[str, torch.nn.Module],
        seed: int | None,
        base: PretrainedModel | None = None,
    ) -> None:
        """
        Args:
            adapted: the modules that adapters are in, by part.
            seed: that they begin with; None where they have values.
            base: the model that they are merged into; None: ``model``.
        """
        from dreambooth_sm.adapters.rank_mask import TrainedRows

        self.model = model
        # Keeps what its weights come from, while those of the model are placed.
        self._base = (base or model).with_parts({})
        self._plan, self._h, self._adapted, self._seed = plan, h, dict(adapted), seed
        self._rows = TrainedRows()
        self._drawn: list[Adapters] = []
        # Parts of the base model whose weights are read once there is a device for them.
        self._hollow: dict[str, HollowModule] = {}

    @classmethod
    def of(
        cls, model: PretrainedModel, plan: Plan, h: Hyperparameters, seed: int, base: PretrainedModel | None = None
    ) -> Adapters:
        """Adapters beside the layers that are asked for, without values yet."""
        parts = (model.family.facts.denoiser, *(model.text_parts if plan.train_text_encoder else ()))
        adapters = cls(model, plan, h, {part: model.skeleton_of(part) for part in parts}, seed, base)
        adapters._inject()
        return adapters

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        from dreambooth_sm.adapters.peft_layers import parameters_of

        return {
            f"{part}.{name}": parameter
            for part, module in self._adapted.items()
            for name, parameter in parameters_of(module).items()
        }

    @property
    def rates(self) -> dict[str, float]:
        """Those of text encoders, and of the matrices that begin at zero, are apart (LoRA+)."""
        text = self._h.text_encoder_factor
        return {
            name: (1.0 if name.startswith(self.model.family.facts.denoiser) else text)
            * (self._h.lora_plus_ratio if ".lora_B." in name else 1.0)
            for name in self.parameters
        }

    def load(self) -> None:
        import torch

        if self._seed is None:
            return
        self._adapted = {part: self._loaded(part) for part in self._adapted}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            self._inject()
        self._seed = None

    def reset(self, seed: int) -> None:
        # The magnitudes of DoRA begin as norms of the weights; all else begins by shapes alone.
        plan = self._plan if self._h.lora_variant == "dora" else replace(self._plan, base_weights="plain")
        fresh = Adapters(self._base.with_parts({}), plan, self._h, self._adapted, seed)
        fresh.load()  # beside layers of its own: those that are named here stay as they are
        values = fresh.parameters
        for name, parameter in self.parameters.items():
            parameter.data = values[name].detach()
        self._drawn.clear()

    def _loaded(self, part: str) -> torch.nn.Module:
        """A part of the base model, in the bits that the plan keeps it in."""
        import torch

        from dreambooth_sm.models import frame_of
        from dreambooth_sm.training.placement import frozen_dtype
        from dreambooth_sm.training.quantised import quantise_layers

        if self._plan.base_weights == "plain":
            # The magnitudes of DoRA begin as norms of the weights; all else begins by shapes alone.
            if self._h.lora_variant != "dora" and (hollow := self.model.hollow_copy_of(part)):
                self._hollow[part] = hollow
                return hollow.module
            self.model.load(part)
            return frame_of(getattr(self.model, part))
        # Quantised while it is read: neither host nor card ever holds the whole of it.
        shrink = partial(
            quantise_layers,
            kind=self._plan.base_weights,
            dtype=frozen_dtype(self._plan),
            device=torch.device(self._plan.device),
        )
        module: torch.nn.Module = self._base.copy_of(part, "cpu", None, shrink)
        return module

    def _inject(self) -> None:
        from dreambooth_sm.adapters.peft_layers import inject, mask_ranks

        layers = self.model.family.facts.adapted[self._h.lora_targets]
        for part, module in self._adapted.items():
            is_text = part in self.model.text_parts
            inject(module, self._h, layers.text_encoder if is_text else layers.denoiser)
            mask_ranks(module, part, self._h, self._rows, by_time=not is_text)  # prompts have no time

    def place(self, plan: Plan, device: torch.device) -> None:
        import torch

        from dreambooth_sm.adapters.peft_layers import parameters_of
        from dreambooth_sm.training.placement import frozen_dtype, place, speed_up
        from dreambooth_sm.training.precision import weights_dtype

        for part in list(self._hollow):
            # What is to be quantised passes through the host.
            where = device if plan.base_weights == "plain" else torch.device("cpu")
            self._hollow[part].fill(frozen_dtype(plan), where)
            del self._hollow[part]
        if plan.base_weights != self._plan.base_weights:
            self._quantise_again(plan, device)
        for part, module in self._adapted.items():
            trained = parameters_of(module).values()
            values = [parameter.detach() for parameter in trained]
            place(module, plan, device, trained=False)
            for parameter, value in zip(trained, values, strict=True):
                parameter.data = value.to(device, weights_dtype(plan))
                parameter.requires_grad_(True)
            self.model.put(part, module)
        speed_up(self.model.denoiser, plan)

    def _quantise_again(self, plan: Plan, device: torch.device) -> None:
        """Keeps the base model in fewer bits than before; whoever draws with it shares the codes."""
        from dreambooth_sm.models import frame_of
        from dreambooth_sm.training.placement import frozen_dtype
        from dreambooth_sm.training.quantised import QuantisedLayer, quantise_layers

        assert plan.base_weights != "plain"
        self._plan = plan
        for part, module in self._adapted.items():
            self._base.forget(part)
            quantise_layers(module, plan.base_weights, frozen_dtype(plan), device)
            for name, layer in module.named_modules():
                if isinstance(layer, QuantisedLayer):
                    for drawn in self._drawn:
                        drawn._adapted[part].set_submodule(name, frame_of(layer))

    def untrained(self) -> AbstractContextManager[None]:
        from dreambooth_sm.adapters.peft_layers import switched_off

        return switched_off(self._adapted.values())

    def watch(self, noise: torch.Tensor, times: torch.Tensor, count: int) -> None:
        self._rows.noise, self._rows.times, self._rows.count = noise, times, count

    def distance(self) -> torch.Tensor:
        from dreambooth_sm.adapters.peft_layers import squared_distance

        return squared_distance(self._adapted.values())

    def drawable(self, dtype: torch.dtype) -> Adapters:
        from dreambooth_sm.adapters.peft_layers import parameters_of
        from dreambooth_sm.models import frame_of

        self.load()
        adapted = {part: frame_of(module, parameters_of(module).values()) for part, module in self._adapted.items()}
        for module in adapted.values():
            for parameter in parameters_of(module).values():
                parameter.data = parameter.detach().to(dtype)
        self._drawn.append(Adapters(self.model.with_parts(adapted), self._plan, self._h, adapted, None))
        return self._drawn[-1]

    def export(self, directory: Path, h: Hyperparameters, dtype: torch.dtype | None) -> None:
        from dreambooth_sm.adapters.adapter import merge_stored
        from dreambooth_sm.adapters.comfy_file import write_comfy
        from dreambooth_sm.adapters.denoiser_names import ARCHITECTURE_FIELD, architecture
        from dreambooth_sm.adapters.kohya_file import write_kohya
        from dreambooth_sm.adapters.peft_file import write_peft

        adapter = self.adapter()
        if h.export != "merged":
            facts = self.model.family.facts
            notes = {"modelspec.trigger_phrase": h.instance_prompt or ""}
            if facts.adapters == "comfyui":
                notes[ARCHITECTURE_FIELD] = architecture(facts)
            write_peft(directory / FILE, adapter, dtype=dtype, notes=notes)
            if h.lora_variant in FLAT_VARIANTS:
                path = directory / f"{h.model_name}.safetensors"
                if facts.adapters == "comfyui":
                    write_comfy(path, adapter, facts, dtype=dtype, notes=notes)
                else:
                    write_kohya(path, adapter, self.model.configs, dtype=dtype, notes=notes)
        if h.export != "adapter":
            base = self._base
            merged = {part: merge_stored(layers, base.weights(part)) for part, layers in adapter.parts.items()}
            base.with_weights(merged).save(directory, dtype)

    def adapter(self) -> Adapter:
        """What was trained, apart from the model."""
        from dreambooth_sm.adapters.adapter import Adapter
        from dreambooth_sm.adapters.peft_file import from_peft
        from dreambooth_sm.adapters.peft_layers import configuration_of, parameters_of

        return Adapter(
            {
                part: from_peft(
                    {name: parameter.detach() for name, parameter in parameters_of(module).items()},
                    configuration_of(module),
                )[0]
                for part, module in self._adapted.items()
            }
        )

    def exported_values(self, h: Hyperparameters) -> int:
        trained = sum(parameter.numel() for parameter in self.parameters.values())
        base = sum(weight.numel for part in self._base.modules for weight in self._base.weights(part).values())
        return (0 if h.export == "merged" else 2 * trained) + (0 if h.export == "adapter" else base)
