"""Files that hold a denoiser alone, in the names of its makers and in those of diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreambooth_sm.cli import main
from dreambooth_sm.describe import describe
from dreambooth_sm.errors import UserError
from dreambooth_sm.families.find import find_family
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.models import PretrainedModel, check_base, load_base, open_base
from dreambooth_sm.sources import needed_files
from dreambooth_sm.stored import opening
from dreambooth_sm.stored.files import Stored
from launcher.aws.lookup import Lookup
from launcher.draft import read_draft
from tests.helpers.original_names import z_image_original as original
from tests.helpers.training import hyperparameters, same, weights

WITHIN = "model.diffusion_model."
PARTS = "pretrained_parts_name_or_path"
WEIGHTS = "diffusion_pytorch_model.safetensors"
HUB = "Tongyi-MAI/Z-Image"


@pytest.fixture(scope="module")
def tensors(loaded_z_image: PretrainedModel) -> dict[str, Tensor]:
    return weights(loaded_z_image.transformer)


@pytest.fixture(scope="module")
def file(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "duck.safetensors"
    save_file(original(tensors), path)
    return path


@pytest.fixture
def other(tiny_z_image: Path, tmp_path: Path) -> Path:
    """The directory, without a transformer's weights."""
    directory = Path(shutil.copytree(tiny_z_image, tmp_path / "other"))
    (directory / "transformer" / WEIGHTS).unlink()
    return directory


def of(file: Path, parts: Path, **values: object) -> Hyperparameters:
    named = {"pretrained_model_name_or_path": str(file), PARTS: str(parts)}
    return hyperparameters(method="lora", **named, **values)


def refusal(h: Hyperparameters) -> str:
    with pytest.raises(UserError) as caught:
        check_base(h)
    (line,) = caught.value.problems
    with pytest.raises(UserError):
        load_base(h)
    return line


@pytest.mark.parametrize("rename", [original, dict], ids=["its makers' names", "diffusers' names"])
@pytest.mark.parametrize("prefix", ["", WITHIN])
def test_a_file_is_the_denoiser_and_the_rest_is_named(
    rename: Callable[..., dict[str, Tensor]],
    prefix: str,
    tensors: dict[str, Tensor],
    loaded_z_image: PretrainedModel,
    tiny_z_image: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "duck.safetensors"
    save_file({f"{prefix}{name}": value + 1 for name, value in rename(tensors).items()}, path)
    assert find_family(str(path)) == "z_image"
    assert describe(str(path))["kind"] == "the transformer of a Z-Image model"
    check_base(of(path, tiny_z_image))
    found = load_base(of(path, tiny_z_image))
    assert found.remarks == ()
    assert found.name == str(path)
    assert same(weights(found.transformer), {name: value + 1 for name, value in tensors.items()})
    for part in ("vae", "text_encoder"):
        assert same(weights(getattr(found, part)), weights(getattr(loaded_z_image, part)))
    if (rename, prefix) != (dict, WITHIN):  # which diffusers does not read
        theirs = ZImageTransformer2DModel.from_single_file(str(path), config=str(tiny_z_image), subfolder="transformer")
        assert same(weights(found.transformer), weights(theirs))


def test_no_weight_is_read_before_it_is_needed_and_then_once(
    file: Path, tensors: dict[str, Tensor], other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def counted(path: Path, *arguments: Any) -> Stored:
        stored = at(path, *arguments)

        def piece(start: int, stop: int) -> Tensor:
            if path == file:
                read.append(stop - start)
            return stored.piece(start, stop)

        return replace(stored, piece=piece)

    at = opening.at
    monkeypatch.setattr(opening, "at", counted)
    base = open_base(of(file, other))
    assert not read
    transformer = base.copy_of("transformer", "cpu", torch.bfloat16)
    assert sum(read) == sum(value.numel() for value in tensors.values())
    assert same(weights(transformer), {name: value.bfloat16() for name, value in tensors.items()})


def test_scales_of_fused_rows_go_to_the_right_ones(
    tensors: dict[str, Tensor], tiny_z_image: Path, tmp_path: Path
) -> None:
    names = original(tensors)
    key = "layers.1.attention.qkv.weight"
    scale = torch.arange(1.0, 1 + len(names[key]))
    small = {key: names[key].to(torch.float8_e4m3fn), "layers.1.attention.qkv.scale_weight": scale[:, None]}
    save_file(names | small, tmp_path / "fp8.safetensors")
    found = weights(load_base(of(tmp_path / "fp8.safetensors", tiny_z_image)).transformer)
    three = [found[f"layers.1.attention.to_{each}.weight"] for each in "qkv"]
    assert torch.equal(torch.cat(three), small[key].float() * scale[:, None])


def test_other_parts_in_the_file_are_left_out_and_told(
    tensors: dict[str, Tensor], tiny_z_image: Path, tmp_path: Path
) -> None:
    whole = {f"{WITHIN}{name}": value for name, value in original(tensors).items()}
    save_file(whole | {"vae.x": torch.ones(1), "text_encoders.y": torch.ones(1)}, tmp_path / "all.safetensors")
    found = load_base(of(tmp_path / "all.safetensors", tiny_z_image))
    (remark,) = found.remarks
    assert "2 tensors of other parts are left out, such as text_encoders.y" in remark
    assert same(weights(found.transformer), tensors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"layers.7.attention.out.weight": torch.ones(64, 64)},
            "1 tensors are of no layer of the transformer, such as",
        ),
        ({"layers.0.attention.to_q.weight": torch.ones(64, 64)}, "layers.0.attention.to_q.weight"),
        ({"layers.0.attention.out.weight": None}, "transformer lacks layers.0.attention.to_out.0.weight"),
        ({"layers.0.attention.qkv.weight": None}, "transformer lacks layers.0.attention.to_q.weight"),
        ({"layers.0.attention.out.weight": torch.ones(64, 32)}, "has the shape 64 x 32 and should have 64 x 64"),
        ({"layers.0.attention.out.weight.absmax": torch.ones(4)}, "such weights are quantised"),
        ({"layers.0.attention.qkv.weight.absmax": torch.ones(4)}, "such weights are quantised"),
        ({"layers.0.attention.out.bias": torch.ones(64)}, "layers.0.attention.out.bias"),
    ],
)
def test_a_file_is_used_whole_or_refused(
    change: dict[str, Tensor | None], said: str, tensors: dict[str, Tensor], tiny_z_image: Path, tmp_path: Path
) -> None:
    path = tmp_path / "duck.safetensors"
    changed = {**original(tensors), **change}
    save_file({name: value for name, value in changed.items() if value is not None}, path)
    line = refusal(of(path, tiny_z_image))
    assert str(path) in line
    assert said in line


def test_what_does_not_belong_together_is_refused(
    file: Path, tiny_base: Path, tiny_z_image: Path, tmp_path: Path
) -> None:
    assert "holds a StableDiffusionPipeline; name parts of the same kind" in refusal(of(file, tiny_base))
    assert "is a file; name a directory or a hub id" in refusal(of(file, file))
    assert "is a directory, not a file of a denoiser alone; leave pretrained_" in refusal(
        of(tiny_z_image, tiny_z_image)
    )
    assert f"{tmp_path / 'no'} does not exist" in refusal(of(file, tmp_path / "no"))
    shutil.copy(file, tmp_path / "named-otherwise")
    assert f"alone; name the model that its other parts come from, such as {HUB}, in {PARTS}" in refusal(
        hyperparameters(pretrained_model_name_or_path=str(tmp_path / "named-otherwise"), method="lora")
    )
    save_file({"context_refiner.0.x": torch.ones(1)}, tmp_path / "lumina.safetensors")
    assert "is a Lumina model, not a file of a denoiser alone" in refusal(
        of(tmp_path / "lumina.safetensors", tiny_z_image, base_architecture="z_image")
    )
    with pytest.raises(UserError, match="is a Lumina model"):
        load_base(hyperparameters(pretrained_model_name_or_path=str(tmp_path / "lumina.safetensors")))


def test_what_the_names_say_is_refused_before_anything_is_read() -> None:
    def problems(**values: object) -> list[str]:
        with pytest.raises(UserError) as caught:
            hyperparameters(**values)
        return caught.value.problems

    job: dict[str, object] = {"base_architecture": "z_image", "method": "lora"}
    (line,) = problems(pretrained_model_name_or_path="s3://abc/duck.safetensors", **job)
    assert (
        f"holds the transformer alone; set {PARTS} to the model that its other parts come from, such as {HUB}" in line
    )
    (line,) = problems(pretrained_model_name_or_path="s3://abc/duck.safetensors", **{PARTS: f"{HUB}-Turbo"}, **job)
    assert f"{PARTS}: '{HUB}-Turbo' is distilled" in line
    (line,) = problems(pretrained_model_name_or_path="s3://abc/turbo.safetensors", **{PARTS: HUB}, **job)
    assert "pretrained_model_name_or_path: 's3://abc/turbo.safetensors' is distilled" in line
    (line,) = problems(pretrained_model_name_or_path="s3://abc/duck.safetensors", **{PARTS: HUB})
    assert "files of Stable Diffusion 1 or 2 hold all parts" in line
    (line,) = problems(pretrained_model_name_or_path="s3://abc/duck.safetensors", **{PARTS: "duck"}, **job)
    assert f"{PARTS}: 'duck' is neither a path that exists nor a model hub's id" in line


def test_the_hubs_revision_is_that_of_the_parts(file: Path, tiny_z_image: Path) -> None:
    check_base(hyperparameters(pretrained_model_name_or_path=str(file), method="lora", revision="main", **{PARTS: HUB}))
    assert f"revision=main: {tiny_z_image} is a path on this machine" in refusal(
        of(file, tiny_z_image, revision="main")
    )


def test_the_weights_that_the_file_has_are_not_fetched_from_the_hub() -> None:
    names = [f"{part}/config.json" for part in ("transformer", "vae")]
    names += [f"transformer/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    names += ["vae/diffusion_pytorch_model.safetensors"]
    assert set(needed_files(names, None, "transformer")) == {names[0], names[1], names[-1]}
    assert set(needed_files(names, None)) == {*names}


class Offline(Lookup):
    def __init__(self) -> None:
        pass


def drafted(pictures: Path, **options: object) -> list[str]:
    return read_draft({"images": pictures, "instance_prompt": "photo of zwx toy", **options}, Offline()).problems.found


def test_the_launcher_refuses_what_lacks_parts(
    file: Path, tensors: dict[str, Tensor], tiny_z_image: Path, pictures: Path, tmp_path: Path
) -> None:
    job: dict[str, object] = {"method": "lora", "instance_type": "ml.g5.xlarge", "resolution": 64}
    line, *_ = drafted(pictures, base_model=file, **job)
    assert f"set {PARTS} to the model that its other parts come from, such as {HUB}" in line
    assert not drafted(pictures, base_model=file, **job, **{PARTS: HUB})
    (line,) = drafted(pictures, base_model=file, **job, **{PARTS: str(tiny_z_image)})
    assert f"{PARTS}: {tiny_z_image} is on this machine, where the job can't see it" in line
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    (line,) = drafted(pictures, base_model=cut, base_architecture="z_image", **job, **{PARTS: HUB})
    assert line.startswith("base_model: ")
    assert "is not a whole safetensors file" in line


def test_the_launcher_knows_a_distilled_model_whose_channel_does_not_say_so(
    tiny_z_image: Path, pictures: Path, tmp_path: Path
) -> None:
    turbo = Path(shutil.copytree(tiny_z_image, tmp_path / "Z-Image-Turbo"))
    job: dict[str, object] = {"method": "lora", "instance_type": "ml.g5.xlarge", "resolution": 64}
    (line,) = drafted(pictures, base_model=turbo, **job)
    assert line.startswith("base_model: ")
    assert "is distilled to draw in a few steps" in line
    assert "set train_distilled=true" in line
    assert not drafted(pictures, base_model=turbo, train_distilled=True, **job)
    assert not drafted(pictures, base_model=tiny_z_image, **job)


def test_a_file_becomes_a_directory(
    file: Path, tensors: dict[str, Tensor], other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(file), str(tmp_path / "new"), "--parts", str(other)]) == 0
    assert same(load_file(tmp_path / "new" / "transformer" / WEIGHTS), tensors)
    assert json.loads((tmp_path / "new" / "model_index.json").read_text())["_class_name"] == "ZImagePipeline"
    assert main(["convert", str(file), str(tmp_path / "more")]) == 2
    assert "(convert: --parts)" in capsys.readouterr().err
