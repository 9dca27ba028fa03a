"""Says what a file is, for people."""

from __future__ import annotations

from dreambooth_sm import sources
from dreambooth_sm.adapters.base_model import described
from dreambooth_sm.adapters.read import find_adapter, read_adapter
from dreambooth_sm.families import family_of
from dreambooth_sm.models import read_stored
from dreambooth_sm.stored.locate import look_for_model
from dreambooth_sm.stored.opening import open_tensors
from dreambooth_sm.stored.recognise import is_whole, kind_of


def describe(source: str) -> dict[str, str]:
    """What a file or a directory is, as titles and words.

    Args:
        source: an adapter's file, a model, or any other file of tensors; here or in S3.

    Raises:
        UserError: where it is damaged, or nothing of the kind.
    """
    path = sources.fetch(sources.RENAMED.get(source, source))
    if found := find_adapter(path):
        return {"file": str(found), **dict(described(read_adapter(found)))}
    file = look_for_model(path)
    if file and file.is_file() and not is_whole(tensors := open_tensors(file)):
        return {"file": str(file), "kind": kind_of(tensors)}
    model = read_stored(path)
    weights = [tensor for tensors in model.tensors.values() for tensor in tensors.values()]
    return {
        "file": str(file or path),
        "kind": "a whole model",
        "base model": family_of(model.pipeline).facts.title,
        "predicts": model.configs["scheduler"].get("prediction_type", "the way from pictures to noise"),
        "parts": ", ".join(model.tensors),
        "precision": ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights})),
        **({"remarks": "; ".join(model.remarks)} if model.remarks else {}),
    }
