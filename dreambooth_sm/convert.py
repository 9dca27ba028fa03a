"""Model files from one format to the other: no GPU, and a few small pieces in memory at a time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from dreambooth_sm import sources
from dreambooth_sm.errors import UserError
from dreambooth_sm.models import RENAMED, read_stored
from dreambooth_sm.stored.directory import write_directory
from dreambooth_sm.stored.files import OutOfRange
from dreambooth_sm.stored.single_file import write_single_file

EXPORT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FilePrecision = Literal["keep", "fp16", "bf16", "fp32"]


def convert(
    source: str,
    target: Path,
    *,
    precision: FilePrecision = "keep",
    use_ema: bool = False,
    prediction_type: str | None = None,
) -> tuple[str, ...]:
    """Writes a Stable Diffusion 1, 2 or XL model in the other format, with a progress bar.

    Args:
        source: single-file checkpoint, diffusers directory, ``s3://`` location or hub id.
        target: a ``.safetensors`` file in the original layout; any other name is that of a diffusers directory. Must
            not exist.
        precision: of the weights; ``keep`` leaves each as it is.
        use_ema: takes the average that some checkpoints carry beside the UNet's weights.
        prediction_type: ``epsilon`` or ``v_prediction``; None to find out.

    Returns:
        remarks on what was guessed of the source; for the user to read.

    Raises:
        UserError: where ``source`` is not such a model, or ``target`` can't be written.
    """
    if os.path.lexists(target):
        raise UserError(f"{target} exists; name a new one")
    if target.suffix in (".ckpt", ".pt", ".bin"):
        raise UserError(f"{target}: pickles are read and never written; name a .safetensors file")
    path = sources.fetch(RENAMED.get(source, source))
    model = read_stored(path, use_ema=use_ema, prediction_type=prediction_type)
    dtype = EXPORT_DTYPES.get(precision)
    size = sum(
        tensor.numel * (dtype if dtype and tensor.dtype.is_floating_point else tensor.dtype).itemsize
        for tensors in model.tensors.values()
        for tensor in tensors.values()
    )
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tqdm(total=size, unit="B", unit_scale=True, desc=target.name) as bar:
            if target.suffix == ".safetensors":
                write_single_file(model, target, dtype=dtype, progress=bar.update)
            else:
                write_directory(model, partial, dtype=dtype, progress=bar.update)
                partial.rename(target)
    except OutOfRange as error:
        advice = "take --precision bf16 or fp32" if error.finite else "the model is damaged"
        raise UserError(f"{source}: {error}; {advice}") from None
    except OSError as error:
        raise UserError(f"{target} can't be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return model.remarks
