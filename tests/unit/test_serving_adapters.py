"""Adapters of an endpoint: each row of a batch has its own; one that can't be had ends its request alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from PIL.Image import Image

from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.embedding_file import write_embedding
from dreambooth_sm.adapters.layers import LowRank
from dreambooth_sm.adapters.peft_file import write_peft
from dreambooth_sm.adapters.read import read_adapter
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.serving.engine import Engine
from dreambooth_sm.serving.refusal import Refusal
from dreambooth_sm.serving.served_model import ServedModel, merged, open_served
from dreambooth_sm.serving.settings import ServingSettings
from dreambooth_sm.storage import S3Uri, put_object, upload_directory
from launcher.local.s3 import EmbeddedS3
from tests.helpers.adapters import ATTENTION, CONVOLUTIONS, TEXT, pipeline, trained
from tests.helpers.s3_proxy import s3_proxy
from tests.helpers.serving import difference, draw, engine_of, opened, pictures, request, served

# Of each adapter: its rank, the layers of the UNet, and those of the text encoder.
ADAPTERS = {
    "small": (2, ATTENTION, []),
    "wide": (8, [*ATTENTION, *CONVOLUTIONS], []),
    "texts": (4, ATTENTION, TEXT),
}


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of three jobs; not to be written to."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, (rank, layers, texts)) in enumerate(ADAPTERS.items()):
        pipe = pipeline(tiny_base)
        parts: dict[str, Any] = {
            "unet": trained(pipe.unet, LoraConfig(r=rank, lora_alpha=8 * rank, target_modules=layers), seed)
        }
        if texts:
            parts["text_encoder"] = trained(
                pipe.text_encoder, LoraConfig(r=rank, lora_alpha=8 * rank, target_modules=texts), seed
            )
        (folder / name).mkdir()
        write_peft(folder / name / FILE, Adapter(parts))
    return folder


@pytest.fixture(scope="module")
def engine(tiny_base: Path, folder: Path) -> Iterator[Engine]:
    with engine_of(tiny_base, adapters=str(folder), adapter_slots=4) as engine:
        yield engine


def of_peft(base: Path, file: Path, scale: float = 1.0, **values: Any) -> Image:
    """What diffusers draws with PEFT's layers in its modules."""
    pipe = opened(base)
    pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name="one")
    pipe.set_adapters("one", scale)
    options = {"prompt": "photo of a toy", "width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 3}
    picture: Image = pipe(**options | values, generator=torch.Generator().manual_seed(5)).images[0]
    pipe.delete_adapters("one")
    return picture


def test_pictures_of_several_adapters_are_drawn_together_and_each_is_as_with_peft(
    engine: Engine, tiny_base: Path, folder: Path
) -> None:
    wishes: list[tuple[dict[str, float], Path | None]] = [
        ({}, None),
        *(({name: 1.0}, folder / name / FILE) for name in ADAPTERS),
        ({"wide": 0.5}, folder / "wide" / FILE),
    ]
    wish = {"scheduler": "model", "steps": 2, "guidance": 3}
    orders = [engine.submit(request(engine, **wish, adapters=adapters)) for adapters, _ in wishes]
    found = [pictures(order)[0] for order in orders]
    assert max(order.batch for order in orders) >= 4
    base = draw(engine, **wish)
    for picture, (adapters, file) in zip(found, wishes, strict=True):
        if file:
            assert difference(picture, of_peft(tiny_base, file, *adapters.values())) <= 1
            assert difference(picture, base) > 3
    assert difference(found[0], base) <= 1


def test_a_picture_of_two_adapters_has_both(engine: Engine, tiny_base: Path, folder: Path) -> None:
    pipe = opened(tiny_base)
    for name in ("small", "wide"):
        pipe.load_lora_weights(folder / name, weight_name=FILE, adapter_name=name)
    pipe.set_adapters(["small", "wide"], [1.0, -0.5])
    options = {"prompt": "photo of a toy", "width": 32, "height": 32, "num_inference_steps": 3}
    theirs = pipe(**options, generator=torch.Generator().manual_seed(5)).images[0]
    pipe.delete_adapters(["small", "wide"])
    ours = draw(engine, scheduler="model", adapters={"small": 1, "wide": -0.5})
    assert difference(ours, theirs) <= 1


def test_slots_are_for_those_that_were_used_last(engine: Engine, folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Seven adapters of different ranks pass through four slots, and each picture is what it is in an empty bank."""
    names = [f"copy-{number}" for number in range(7)]
    for number, name in enumerate(names):
        (tmp_path / name).symlink_to(folder / [*ADAPTERS][number % 3])
    first = {name: draw(engine, adapters=[name], steps=1) for name in ADAPTERS}
    with engine_of(tiny_base, adapters=str(tmp_path), adapter_slots=4, adapter_bytes=200_000) as other:
        for _ in range(2):
            orders = [other.submit(request(other, adapters=[name], steps=1)) for name in names]
            for number, order in enumerate(orders):
                assert difference(pictures(order)[0], first[[*ADAPTERS][number % 3]]) <= 1
        assert len(other.store.names) < len(names)  # which the host's memory keeps
        held = [adapter for adapter, _ in order.adapters]
        assert other._slots.has(held[0])


def test_what_can_not_be_drawn_with_is_refused_by_itself(
    engine: Engine, folder: Path, tiny_base: Path, tmp_path: Path
) -> None:
    for name in ("cut", "dora", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "cut" / FILE).write_bytes((folder / "small" / FILE).read_bytes()[:-100])
    dora = trained(pipeline(tiny_base).unet, LoraConfig(r=2, use_dora=True, target_modules=ATTENTION))
    write_peft(tmp_path / "dora" / FILE, Adapter({"unet": dora}))
    layer = {
        "down_blocks.9.to_q": next(
            iter(trained(pipeline(tiny_base).unet, LoraConfig(target_modules=ATTENTION)).values())
        )
    }
    write_peft(tmp_path / "other" / FILE, Adapter({"unet": layer}))
    with engine_of(tiny_base, adapters=str(tmp_path)) as broken:
        good = broken.submit(request(broken))
        for name, status, words in (
            ("cut", 422, "cut"),
            ("dora", 422, "DoRA"),
            ("other", 422, "another base model"),
            ("none", 404, "not known here"),
        ):
            with pytest.raises(Refusal, match=words) as caught:
                broken.submit(request(broken, adapters=[name]))
            assert caught.value.status == status
        assert len(pictures(good)) == 1


def test_learned_words_come_with_their_adapter(tiny_base: Path, folder: Path, tmp_path: Path) -> None:
    directory = tmp_path / "all" / "word"
    directory.mkdir(parents=True)
    (directory / FILE).write_bytes((folder / "texts" / FILE).read_bytes())
    vectors = {"text_encoder": torch.randn(2, 32, generator=torch.Generator().manual_seed(0))}
    write_embedding(directory / "zwx.safetensors", "zwx", vectors, dtype=None, trigger="zwx")
    said = {
        "pretrained_model_name_or_path": str(tiny_base),
        "instance_prompt": "photo of zwx toy",
        "class_prompt": "photo of toy",
        "method": "pivotal",
    }
    subjects = [{"instance_prompt": "photo of zwx toy", "class_prompt": "photo of toy"}]
    (directory / "report.json").write_text(json.dumps({"hyperparameters": said, "subjects": subjects}))
    wish = {"prompt": None, "steps": 2}
    with engine_of(directory) as alone:
        merged = draw(alone, **wish, subject="zwx")
    with engine_of(tiny_base, adapters=str(tmp_path / "all")) as engine:
        # Its name stands for its subject, and others don't know the word.
        orders = [
            engine.submit(request(engine, **wish, subject="word")),
            engine.submit(request(engine, steps=2, prompt="photo of zwx toy", adapters=[])),
        ]
        ours, without = (pictures(order)[0] for order in orders)
    assert difference(ours, merged) <= 1
    assert difference(without, merged) > 3


def test_adapters_come_from_s3_verified(
    tiny_base: Path,
    folder: Path,
    s3: EmbeddedS3,
    target: S3Uri,
    monkeypatch: pytest.MonkeyPatch,
    engine: Engine,
    tmp_path: Path,
) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    for name in ADAPTERS:
        upload_directory(folder / name, target / name)
    put_object(target / f"wide/{FILE}", (folder / "small" / FILE).read_bytes())  # not what its manifest says
    put_object(target / "single.safetensors", (folder / "wide" / FILE).read_bytes())
    disk = str(tmp_path / "disk")
    with engine_of(tiny_base, adapters=str(target), adapter_disk=disk) as remote, served(remote) as (client, _):
        wish = {"prompt": "photo of a toy", "steps": 1, "width": 32, "height": 32, "seed": 5}
        drawn = draw(remote, steps=1, adapters=["small"])
        assert difference(drawn, draw(engine, steps=1, adapters=["small"])) <= 1
        poisoned = client.draw({**wish, "adapters": ["wide"]})
        assert poisoned.status == 422
        assert "not what its manifest says" in poisoned.json["errors"][0]
        assert client.draw({**wish, "adapters": ["vanished"]}).status == 404
        # SageMaker's protocol of adapters.
        added = {"name": "mine", "src": f"{target}/single.safetensors", "preload": True, "pin": False}
        assert client.send("POST", "/adapters", json.dumps(added).encode()).status == 200
        assert client.draw(wish, X_Amzn_SageMaker_Adapter_Identifier="mine").status == 200
        listed = client.send("GET", "/adapters").json["adapters"]
        assert listed == ["mine", "small"]
        other = {**added, "src": f"{target}/small"}
        assert client.send("POST", "/adapters", json.dumps(other).encode()).status == 409
        assert client.send("DELETE", "/adapters/mine").status == 200
        assert client.send("DELETE", "/adapters/mine").status == 404
        assert client.draw(wish, X_Amzn_SageMaker_Adapter_Identifier="mine").status == 404
        assert client.send("POST", "/adapters", json.dumps({**other, "src": f"{target}/gone"}).encode()).status == 404
        wrong = client.send("POST", "/adapters", b'{"src": 3, "pin": "x", "source": 1}')
        assert (wrong.status, len(wrong.json["errors"])) == (400, 4)


def test_what_leaves_memory_is_not_fetched_from_s3_again(
    tiny_base: Path, folder: Path, s3: EmbeddedS3, target: S3Uri, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    upload_directory(folder / "small", target / "small", client=s3.client())
    put_object(target / "single.safetensors", (folder / "wide" / FILE).read_bytes(), client=s3.client())
    with (
        s3_proxy(s3.endpoint_url, lambda each: asked.append(f"{each.operation} {each.key}")) as address,
        engine_of(tiny_base, adapters=str(target), adapter_bytes=1, adapter_disk=str(tmp_path / "disk")) as engine,
    ):
        for name, value in {**s3.environment(), "AWS_ENDPOINT_URL_S3": address}.items():
            monkeypatch.setenv(name, value)
        engine.store.add("one", f"{target}/single.safetensors")  # each lets go of the other one
        first = engine.store.get("small")
        before = Counter(each.partition(" ")[0] for each in asked)
        assert before["GetObject"] == 3  # two adapters, and the manifest of one of them
        asked.clear()
        engine.store.get("one")
        second = engine.store.get("small")
        assert second is not first
        assert second.size == first.size
        assert [each.partition(" ")[0] for each in asked] == ["HeadObject", "ListObjectsV2"]
        upload_directory(folder / "texts", target / "small", client=s3.client())
        engine.store.get("one")
        assert engine.store.get("small").parts.keys() == {"unet", "text_encoder"}  # what lies there now


@pytest.mark.slow
def test_adapters_of_transformers_are_drawn_with_as_well(tiny_flux2: Path, tmp_path: Path) -> None:
    """As with one that is merged into its weights."""
    opened_base = open_served(tiny_flux2, None).model
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, weight in opened_base.weights("transformer").items():
        layer = name.removesuffix(".weight")
        if layer.endswith((".to_q", ".to_out.0", ".to_qkv_mlp_proj")):
            rows, columns = weight.shape
            down, up = (torch.randn(*shape, generator=generator) for shape in ((4, columns), (rows, 4)))
            layers[layer] = LowRank(0.3 * down, 0.3 * up)
    assert layers
    write_peft(tmp_path / "zwx.safetensors", Adapter({"transformer": layers}))
    (tmp_path / "zwx").symlink_to("zwx.safetensors")
    wish = {"steps": 2, "guidance": 3}
    with engine_of(tiny_flux2, adapters=str(tmp_path)) as engine:
        orders = [engine.submit(request(engine, **wish, adapters=names)) for names in ([], ["zwx"])]
        without, ours = (pictures(order)[0] for order in orders)
    whole = ServedModel(merged(opened_base, read_adapter(tmp_path / "zwx.safetensors")))
    engine = Engine(whole, ServingSettings())
    theirs = draw(engine, **wish)
    engine.close()
    assert difference(ours, theirs) <= 1
    assert difference(ours, without) > 3
