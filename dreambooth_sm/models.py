"""Base models in, trained pipelines out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from dreambooth_sm import sources
from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.families import Family, family_of
from dreambooth_sm.families.find import DISTILLED
from dreambooth_sm.fetching import WantedBase, fetch
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.model import is_distilled
from dreambooth_sm.latents import latent_scale
from dreambooth_sm.sources import is_local, is_s3
from dreambooth_sm.storage import S3Uri
from dreambooth_sm.stored.directory import check_parts, read_directory, read_part, write_directory
from dreambooth_sm.stored.files import Stored, TensorFile
from dreambooth_sm.stored.fit import check_fit
from dreambooth_sm.stored.hollow import HollowModule
from dreambooth_sm.stored.kept_in_fp32 import is_cast, kept_in_fp32
from dreambooth_sm.stored.layout import Configs
from dreambooth_sm.stored.locate import find_model
from dreambooth_sm.stored.model import (
    Pipeline,
    StoredModel,
    StoredPart,
    fill,
    make_pipeline,
    parts_of,
    state_of,
    tokenizers_of,
    weights_of,
)
from dreambooth_sm.stored.opening import open_tensors
from dreambooth_sm.stored.recognise import held_alone, kind_of
from dreambooth_sm.stored.single_file import read_single_file, write_single_file
from dreambooth_sm.stored.single_file import read_vae as read_vae_file

_VAE, _PARTS = "pretrained_vae_name_or_path", "pretrained_parts_name_or_path"
_NO_AVERAGE = "only single files carry averages; leave it out"


class PretrainedModel:
    """A pipeline, taken apart: each part is an attribute of its name.

    Modules are in eval mode and without gradients. A part that comes from files is read when somebody computes with it
    (:meth:`part`), and only what is trained stays in memory (:meth:`load`): until then its weights are on the meta
    device.

    Args:
        parts: modules, tokenizers and scheduler, by the names that diffusers has for them.
        config: what else its ``model_index.json`` says.
        remarks: what was guessed of a single file; for the user to read.
        files: where the weights of parts are that are not in memory, by part and name.
        dtype: that these have in memory; None leaves those in half precision as they are, and makes all others
            float32.
    """

    # Those that every family has, and the denoiser of those with a UNet.
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

    def __init__(
        self,
        name: str,
        family: Family,
        parts: Mapping[str, Any],
        *,
        config: Mapping[str, Any] = MappingProxyType({}),
        remarks: tuple[str, ...] = (),
        files: Mapping[str, Mapping[str, Stored]] = MappingProxyType({}),
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        self.name, self.family, self.config, self.remarks = name, family, dict(config), remarks
        self._parts, self._files, self._dtype = tuple(parts), dict(files), dtype
        for part, value in parts.items():
            setattr(self, part, value)

    @classmethod
    def of(cls, name: str, stored: StoredModel, dtype: torch.dtype | None = torch.float32) -> PretrainedModel:
        """A model whose weights still lie in files.

        Args:
            name: what messages call it.
            dtype: see above.
        """
        pipeline = stored.pipeline
        modules = parts_of(pipeline)
        parts = [*modules, *tokenizers_of(modules), "scheduler", "feature_extractor"]
        return cls(
            name,
            family_of(pipeline),
            {part: getattr(pipeline, part) for part in parts if hasattr(pipeline, part)},
            config=pipeline.config,
            remarks=stored.remarks,
            files=stored.tensors,
            dtype=dtype,
        )

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """The parts with weights, by name."""
        return {part: getattr(self, part) for part in self.family.facts.parts}

    @property
    def denoiser(self) -> Any:
        return getattr(self, self.family.facts.denoiser)

    @property
    def latent_scale(self) -> int:
        """Pixels a side of one latent."""
        return latent_scale(self.vae)

    @property
    def text_parts(self) -> tuple[str, ...]:
        """Names of the text encoders."""
        return tuple(part for part in self.family.facts.parts if part.startswith("text_encoder"))

    @property
    def half(self) -> torch.dtype:
        """The 16-bit type that it draws in."""
        return torch.bfloat16 if self.family.facts.overflows else torch.float16

    @property
    def vae_dtype(self) -> torch.dtype:
        """The smallest type that the VAE computes in."""
        return self.family.vae_dtype(self.vae.config)

    def pipeline(self) -> Pipeline:
        """The parts as a pipeline; it shares their weights."""
        return make_pipeline({part: getattr(self, part) for part in self._parts}, self.config)

    def load(self, *names: str) -> None:
        """Reads parts into memory, where they stay; all of them where none is named."""
        for name in names or self.family.facts.parts:
            if name in self._files:
                fill(getattr(self, name), self._files.pop(name), self._dtype)

    def part(self, name: str, device: str | torch.device, dtype: torch.dtype) -> Any:
        """A module to compute with: from its files, or a copy, or the model's own where that is as it should be."""
        module = getattr(self, name)
        there = torch.empty(0, device=device).device
        elsewhere = any(b.device != there for b in module.buffers())  # those of frames stay where they were
        if name in self._files or elsewhere or not is_cast(module, there, dtype):
            return self.copy_of(name, there, dtype)
        return module

    def skeleton_of(self, name: str) -> Any:
        """A module like the model's, with its weights on the meta device."""
        return _copy(getattr(self, name), "meta", None)

    def copy_of(
        self,
        name: str,
        device: str | torch.device,
        dtype: torch.dtype | None,
        shrink: Callable[[torch.nn.Module], object] | None = None,
    ) -> Any:
        """A module like the model's, which stays as it is; of a language model in files, the layers that are read.

        Args:
            dtype: of the copy; None leaves it to the weights, see :class:`PretrainedModel`.
            shrink: see :func:`dreambooth_sm.stored.model.fill`.
        """
        module = getattr(self, name)
        if name not in self._files:
            copied = _copy(module, device, dtype)
            if shrink:
                shrink(copied)
            return copied
        read = copy.deepcopy(module)
        if (layers := self.family.facts.text_layers) and name in self.text_parts:
            keep_layers(read, layers)
        # With its number: threads read, and have a current device of their own.
        fill(read, self._files[name], dtype, torch.empty(0, device=device).device, shrink)
        return read

    def hollow_copy_of(self, name: str) -> HollowModule | None:
        """A module like the model's, which gets its weights later; None where they are in memory."""
        if name not in self._files:
            return None
        return HollowModule(copy.deepcopy(getattr(self, name)), self.weights(name))

    def put(self, name: str, module: torch.nn.Module) -> None:
        """Puts another module in the place of one."""
        self._files.pop(name, None)
        setattr(self, name, module)

    def forget(self, name: str) -> None:
        """Lets go of a part's weights where they are in files as well: they are read again when they are needed."""
        if name in self._files:
            setattr(self, name, self.skeleton_of(name))

    def with_parts(self, parts: Mapping[str, Any]) -> PretrainedModel:
        """A model with other modules in place of some; all else is shared."""
        other = copy.copy(self)
        other._files = {name: tensors for name, tensors in self._files.items() if name not in parts}
        for name, module in parts.items():
            setattr(other, name, module)
        return other

    def apart(self) -> PretrainedModel:
        """A model of the same files with parts of its own, which it may read or replace: this one stays as it is."""
        other = copy.copy(self)
        other._files = dict(self._files)
        for name in self._files:
            setattr(other, name, copy.deepcopy(getattr(self, name)))
        return other

    def with_frames(self, *names: str) -> PretrainedModel:
        """A model whose modules of these names are others around the same weights, wherever these are: what is put into
        them is not in this model."""
        other = copy.copy(self)
        other._files = dict(self._files)
        for name in names:
            setattr(other, name, frame_of(getattr(self, name)))
        return other

    def with_weights(self, weights: Mapping[str, Mapping[str, Stored]]) -> PretrainedModel:
        """A model with other weights in some parts, which are read when somebody asks for them."""
        other = self.with_parts({name: self.skeleton_of(name) for name in weights})
        other._files |= weights
        return other

    @property
    def configs(self) -> Configs:
        """Of the parts, as plain dictionaries."""
        return self._stored().configs

    def weights(self, name: str) -> dict[str, Stored]:
        """Those of a part, in the precision that they have in memory."""
        module = getattr(self, name)
        if name in self._files:
            return weights_of(module, self._files[name], self._dtype)
        return {key: Stored.of(value) for key, value in state_of(module).items()}

    def save(self, directory: Path, dtype: torch.dtype | None = torch.float16) -> None:
        """Writes a diffusers directory with safetensors of ``dtype``, or of the weights' own where it is None; the
        modules stay as they are."""
        write_directory(self._stored(), directory, dtype=dtype)

    def save_single_file(self, path: Path, dtype: torch.dtype | None = torch.float16, **facts: Any) -> None:
        """Writes one ``.safetensors`` file in the original layout.

        Args:
            facts: for its metadata, see :func:`dreambooth_sm.stored.single_file.write_single_file`.
        """
        write_single_file(self._stored(), path, dtype=dtype, **facts)

    def _stored(self) -> StoredModel:
        return StoredModel(self.name, self.pipeline(), {name: self.weights(name) for name in self.modules})


def frame_of(module: torch.nn.Module, copied: Iterable[torch.Tensor] = ()) -> torch.nn.Module:
    """A module around the same weights and buffers, but for those that are ``copied``: what is put into one of the two
    is not in the other."""
    own = {id(tensor) for tensor in copied}
    shared = (tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in own)
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def keep_layers(reader: Any, count: int) -> None:
    """Leaves out a language model's layers after the first ``count``, and the norm, which is for the last one's states:
    what it then gives last are the states after the ``count``-th."""
    del reader.layers[count:]
    reader.norm = torch.nn.Identity()


def _copy(module: torch.nn.Module, device: str | torch.device, dtype: torch.dtype | None) -> torch.nn.Module:
    """A copy of a type on a device, made without a second copy in fp32 on the way."""
    memo: dict[int, Any] = {}
    parameters = dict(module.named_parameters())
    kept = kept_in_fp32(module, parameters, dtype)
    for name, parameter in parameters.items():
        kind = torch.float32 if name in kept else dtype
        value = parameter.detach().to(device, kind if parameter.is_floating_point() else None, copy=True)
        memo[id(parameter)] = torch.nn.Parameter(value, requires_grad=False)
    stored = {id(value) for value in module.state_dict(keep_vars=True).values()}
    for buffer in module.buffers():  # what is not stored is computed: rotary frequencies, in full precision
        is_stored = id(buffer) in stored
        where = device if is_stored or torch.device(device).type != "meta" else buffer.device  # no file gives it back
        memo[id(buffer)] = buffer.to(where, dtype if is_stored and buffer.is_floating_point() else None, copy=True)
    return copy.deepcopy(module, memo)


def check_base(h: Hyperparameters) -> None:
    """Checks a base model before it is downloaded. One on this machine is read whole, but for its weights.

    Raises:
        UserError: for a local path that is not a model that can be trained, an S3 location with nothing in it, and
            knobs that would do nothing.
    """
    problems = Problems()
    name, vae, parts = _names(h)
    for field, value in (("pretrained_model_name_or_path", name), (_VAE, vae), (_PARTS, parts)):
        if is_s3(value):
            with _of(problems, field):
                sources.check_s3(S3Uri.parse(value))
    with problems.collected():
        _check_names(h, name, vae, parts)
    replacement, of_vae = None, Problems()
    if vae and is_local(vae):
        with _of(of_vae, _VAE):
            replacement = read_vae(Path(vae))
    if parts and not is_local(parts):  # what they are fit for is told when they are here
        with _of(problems, "pretrained_model_name_or_path"):
            if is_local(name):
                open_denoiser(Path(name))
    elif is_local(name) and (replacement or not vae):
        with _of(problems, "pretrained_model_name_or_path"):
            _read(h, Path(name), replacement, Path(parts) if parts else None)
    elif is_local(name):
        with _of(problems, "pretrained_model_name_or_path"):  # what the replacement is fit for is told when it is here
            model = find_model(Path(name))
            if model.is_dir():
                check_parts(model, with_vae=False)
    problems.found += of_vae.found
    problems.raise_any()


def _names(h: Hyperparameters) -> tuple[str, str, str]:
    """Of the base model, of the VAE in the place of its own, and of what its other parts come from."""
    wanted = WantedBase.of(h)
    return wanted.model.name, wanted.vae.name if wanted.vae else "", wanted.parts.name if wanted.parts else ""


@contextmanager
def _of(problems: Problems, field: str) -> Iterator[None]:
    """Collects what is wrong with the value of a hyperparameter, named by it."""
    with problems.collected():
        try:
            yield
        except UserError as error:
            raise UserError(f"{field}: {problem}" for problem in error.problems) from None


def _check_names(h: Hyperparameters, name: str, vae: str, parts: str) -> None:
    """Raises UserError for URLs, and for hyperparameters that would do nothing with such a model."""
    named = [each for each in (name, vae, parts) if each]
    elsewhere = [each for each in named if is_local(each) or is_s3(each)]
    directory = parts or name
    place = "an S3 location" if is_s3(directory) else "a path on this machine"
    problems = [
        f"{field}: {value} is a URL; name a hub id, s3://bucket/prefix, or pass the model as a channel, such as "
        "inputs={'model': 's3://...'} with pretrained_model_name_or_path=/opt/ml/input/data/model"
        for field, value in (("pretrained_model_name_or_path", name), (_VAE, vae), (_PARTS, parts))
        if "://" in value and not is_s3(value)
    ]
    if h.revision is not None and directory in elsewhere:
        problems.append(f"revision={h.revision}: {directory} is {place}, which has no revisions; leave it out")
    if h.hf_token_secret is not None and len(elsewhere) == len(named):
        problems.append(f"hf_token_secret: nothing comes from the hub, as {directory} is {place}; leave it out")
    if h.use_ema_weights and name not in elsewhere:
        problems.append(f"use_ema_weights=true: {name} is a hub id; {_NO_AVERAGE}, or name the file by a path")
    if problems:
        raise UserError(problems)


def read_vae(path: Path) -> StoredPart:
    """The VAE at a path, without reading its weights: a directory or a file of one, or any base model.

    Raises:
        UserError: where there is none.
    """
    for directory in (path, path / "vae"):
        if (directory / "config.json").is_file():
            return read_part(directory, "vae")
    if not path.exists():
        raise UserError(f"{path} holds no config.json; name a directory of an AutoencoderKL, or a .safetensors file")
    model = find_model(path)
    return read_vae_file(model) if model.is_file() else read_part(model / "vae", "vae")


def find_denoiser(path: Path) -> TensorFile | None:
    """The file at a path that holds a denoiser alone, whose other parts come from elsewhere; None where there is
    another model.

    Raises:
        UserError: where there is none, or the file is damaged.
    """
    model = find_model(path)
    file = open_tensors(model) if model.is_file() else None
    return file if file and held_alone(file) else None


def open_denoiser(path: Path) -> TensorFile:
    """What :func:`find_denoiser` finds.

    Raises:
        UserError: as well where there is another model.
    """
    file = find_denoiser(path)
    if file is None:
        model = find_model(path)
        found = f"{model} is {kind_of(open_tensors(model)) if model.is_file() else 'a directory'}"
        raise UserError(f"{found}, not a file of a denoiser alone; leave {_PARTS} (convert: --parts) out")
    return file


def read_stored(
    path: Path,
    *,
    variant: str | None = None,
    use_ema: bool = False,
    prediction_type: str | None = None,
    vae: StoredPart | None = None,
    parts: Path | None = None,
) -> StoredModel:
    """Understands a pipeline directory, a single-file checkpoint, or what holds one of them and no other.

    Args:
        variant, vae: see :func:`dreambooth_sm.stored.directory.read_directory`.
        use_ema, prediction_type: see :func:`dreambooth_sm.stored.single_file.read_single_file`.
        parts: pipeline directory that the parts of a file come from that holds a denoiser alone.

    Raises:
        UserError: for anything else, models that can't be trained, and damaged files.
    """
    model = find_model(path)
    if parts:
        directory = find_model(parts)
        if directory.is_file():
            raise UserError(f"{directory} is a file; name a directory or a hub id that has the model's other parts")
        stored = read_directory(directory, variant=variant, vae=vae, denoiser=open_denoiser(model))
    elif model.is_file():
        if variant:
            raise UserError(f"variant={variant}: {model} is a file, which has no variants; leave it out")
        stored = read_single_file(model, use_ema=use_ema, prediction_type=prediction_type, vae=vae)
    else:
        if use_ema:
            raise UserError(f"use_ema_weights=true: {model} is a directory; {_NO_AVERAGE}")
        stored = read_directory(model, variant=variant, prediction_type=prediction_type, vae=vae)
    check_fit(stored.pipeline, str(path))
    return stored


def _read(h: Hyperparameters, path: Path, vae: StoredPart | None, parts: Path | None) -> StoredModel:
    prediction = None if h.prediction_type == "auto" else h.prediction_type
    name, _, rest = _names(h)
    directory = rest or name
    variant = h.variant if is_local(directory) or is_s3(directory) else None  # the hub's are chosen there
    ema = h.use_ema_weights
    return read_stored(path, variant=variant, use_ema=ema, prediction_type=prediction, vae=vae, parts=parts)


def load_base(h: Hyperparameters, dtype: torch.dtype | None = torch.float32) -> PretrainedModel:
    """:func:`open_base`, with all parts in memory."""
    base = open_base(h, dtype)
    base.load()
    return base


def open_base(h: Hyperparameters, dtype: torch.dtype | None = torch.float32) -> PretrainedModel:
    """Fetches the base pipeline, and the replacement VAE if one is asked for; no part is read yet.

    Args:
        dtype: of the weights; None leaves those in half precision as they are, which takes half the memory. Whoever
            computes with a module then says in which precision.

    Raises:
        UserError: where there is no such model, its files are damaged, or it is of another kind than the job was
            planned for.
    """
    name, vae, parts = _names(h)
    planned = h.facts
    _check_names(h, name, vae, parts)
    wanted = WantedBase.of(h)
    replacement = read_vae(fetch(wanted.vae)) if wanted.vae else None
    rest = fetch(wanted.parts) if wanted.parts else None
    stored = _read(h, fetch(wanted.model), replacement, rest)
    found = family_of(stored.pipeline).facts
    if found.name != planned.name:
        raise UserError(
            f"{name} is a {found.title} model, and the job was planned for {planned.title}; set "
            f"base_architecture={found.name}"
        )
    if stored.pipeline.config.get(DISTILLED) and not h.train_distilled:
        raise UserError(is_distilled(name, found))
    return PretrainedModel.of(name, stored, dtype)
