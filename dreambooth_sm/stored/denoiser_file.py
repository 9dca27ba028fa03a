"""Files that hold a denoiser alone, as ComfyUI has them of models whose other parts many models share.

Their tensors get the names of diffusers by its own converters. These are shown tensors without values, and what they
make of them says where in the file each one lies: no weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dreambooth_sm.errors import UserError
from dreambooth_sm.stored.files import Stored, TensorFile
from dreambooth_sm.stored.layout import UNET
from dreambooth_sm.stored.model import check_complete, check_plain

# What makers leave in files, and no model of diffusers has a place for.
_NEEDLESS = re.compile(r"norm_final\.weight")
# Bytes of a tensor that another one is computed of, and that lies in memory.
_MOST_COMPUTED = 2**30


def read_denoiser(file: TensorFile, part: str, module: nn.Module) -> dict[str, Stored]:
    """The tensors of a denoiser, by the names that diffusers gives them.

    Args:
        file: with the names of its makers or of diffusers, below ``model.diffusion_model.`` or not; beside those
            below, other parts are left out.
        module: the denoiser, with its weights on the meta device.

    Raises:
        UserError: where tensors are missing, quantised, have other shapes, or are of no layer of the denoiser.
    """
    found = {name.removeprefix(UNET): tensor for name, tensor in file.tensors.items() if name.startswith(UNET)}
    found = found or file.tensors
    for name, tensor in found.items():
        check_plain(str(file.path), part, name, tensor)
    shown = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in found.items()}
    origins = {id(tensor): name for name, tensor in shown.items()}
    tensors: dict[str, Stored] = {}
    used: set[str] = set()
    computed: list[str] = []
    for name, made in _converted(file, shown, module).items():
        origin = origins.get(id(made if made._base is None else made._base))
        if origin is None or not made.is_contiguous():
            computed.append(name)
            continue
        tensors[name] = found[origin].part(int(made.storage_offset()), tuple(made.shape))
        if name in module.state_dict():
            used.add(origin)
    if computed:
        # Such as halves that change places: the converter is shown the values of each tensor that no other one is of.
        for origin in [name for name in found if name not in used]:
            if found[origin].numel * found[origin].dtype.itemsize > _MOST_COMPUTED:
                raise UserError(f"{file.path}: diffusers computes {computed[0]} of others; name a diffusers directory")
            values = _converted(file, {**shown, origin: found[origin].read()}, module)
            for name in computed:
                if not values[name].is_meta:
                    tensors[name] = Stored.of(values[name].contiguous())
                    used.add(origin)
    check_complete(str(file.path), part, module, tensors)
    if strange := [name for name in found if name not in used and not _NEEDLESS.fullmatch(name)]:
        raise UserError(
            f"{file.path}: {len(strange)} tensors are of no layer of the {part}, such as {min(strange)}; take another "
            "version of the file, or other parts of the same kind of model"
        )
    return tensors


def other_parts(file: TensorFile) -> list[str]:
    """Names of tensors in a denoiser's file that are of other parts."""
    within = [name for name in file.tensors if name.startswith(UNET)]
    return [name for name in file.tensors if not name.startswith(UNET)] if within else []


def _converted(file: TensorFile, shown: dict[str, Tensor], module: Any) -> dict[str, Tensor]:
    if shown.keys() == module.state_dict().keys():
        return shown
    try:
        return converted_names(shown, type(module).__name__, module.config)
    except Exception as error:  # of names that it does not expect
        raise UserError(f"{file.path} can't be understood by diffusers ({error!r:.200}); copy it again") from None


def converted_names(
    tensors: Mapping[str, Tensor], kind: str, config: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Tensor]:
    """What diffusers' converter makes of tensors by their makers' names.

    Args:
        kind: the class of modules that they are of.
        config: of the module.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    convert = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
    with _Views():
        found: dict[str, Tensor] = convert(checkpoint=dict(tensors), config=dict(config))
    return found


class _Views(TorchFunctionMode):
    """A single tensor that is put together stays itself, by which it is known where it comes from."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.cat and len(args[0]) == 1:
            return args[0][0]
        return func(*args, **(kwargs or {}))
