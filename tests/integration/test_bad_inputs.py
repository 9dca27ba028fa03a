"""Bad inputs: each ends the job with exit code 2 and a reason that its reader can act on; nothing is uploaded.

What the schema and the configuration files can tell runs in processes in which torch can't be imported, so that nobody
waits for it to hear of a typing error. What needs torch runs in this process, to import it once, and one of
each kind as a process of its own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from unittest.mock import patch

import pytest
from PIL import Image

from dreambooth_sm.errors import EXIT_BAD_INPUT
from dreambooth_sm.sagemaker import FAILURE_LENGTH
from dreambooth_sm.storage import S3Uri, list_objects
from launcher.local.program import ENTRYPOINT
from launcher.local.s3 import EmbeddedS3
from tests.helpers.forks import WITHOUT_TORCH
from tests.helpers.jobs import WEIGHTS, Ended, JobTree

EXAMPLES = Path(__file__).parents[1] / "data" / "duck_toy"
IMAGES = "input/data/images"
MODEL = "input/data/model"
CONFIG = "input/config"
UNET = f"{MODEL}/{WEIGHTS['unet']}"
TEXT_ENCODER = f"{MODEL}/{WEIGHTS['text_encoder']}"

Arrange = Callable[[JobTree], object]


@dataclasses.dataclass(frozen=True)
class Bad:
    """One bad input.

    Attributes:
        says: what the reason has to contain; ``{base}`` and ``{bucket}`` stand for the tree and the upload's bucket.
        given: hyperparameters over those of a good job.
        arrange: what else is done to the good job's tree.
        arguments: of the entrypoint.
        environment: over that of a good job; None removes a variable.
    """

    name: str
    says: tuple[str, ...]
    given: dict[str, object] = dataclasses.field(default_factory=dict)
    arrange: Arrange = lambda tree: None
    arguments: tuple[str, ...] = ("train",)
    environment: dict[str, str | None] = dataclasses.field(default_factory=dict)

    def put_into(self, tree: JobTree) -> JobTree:
        tree.set(**self.given)
        self.arrange(tree)
        environment = {**tree.environment, **self.environment}
        return dataclasses.replace(tree, environment={k: v for k, v in environment.items() if v is not None})


def writes(path: str, content: str | bytes) -> Arrange:
    return lambda tree: tree.write(path, content)


def removes(path: str) -> Arrange:
    return lambda tree: (tree.base / path).unlink()


def cuts(path: str, size: int) -> Arrange:
    return lambda tree: tree.write(path, (tree.base / path).read_bytes()[:size])


def table(rows: list[Bad]) -> pytest.MarkDecorator:
    assert len({row.name for row in rows}) == len(rows)
    return pytest.mark.parametrize("bad", [pytest.param(row, id=row.name) for row in rows])


# --- What is known before torch is imported -------------------------------------------------------------------------

CONCEPT_WITHOUT_PROMPT = json.dumps([{"instance_data_dir": "/opt/ml/input/data/images"}])
FORGOTTEN = {"instance_prompt": "None", "class_prompt": "None"}

EARLY = [
    Bad("unknown key", ("learning_rat:", "did you mean learning_rate?"), {"learning_rat": "1e-6"}),
    Bad("unknown key with a dash", ("train-batch-size", "train_batch_size?"), {"train-batch-size": "1"}),
    Bad("unknown key like no other", ("zzz: unknown", "python -m dreambooth_sm.hyperparameters"), {"zzz": "1"}),
    Bad("fraction for a whole number", ("max_train_steps: '1.5'", "a whole number"), {"max_train_steps": "1.5"}),
    Bad("word for a number", ("resolution: 'big'", "a whole number"), {"resolution": "big"}),
    Bad("word for a truth value", ("use_ema: 'perhaps'", "true or false, or auto"), {"use_ema": "perhaps"}),
    Bad("truth value for a number", ("num_class_images: 'True'",), {"num_class_images": True}),
    Bad("decimal comma", ("learning_rate: '2,5e-6'", "a number"), {"learning_rate": "2,5e-6"}),
    Bad("list for a number", ("resolution: [512]", "a whole number"), {"resolution": [512]}),
    Bad("null for a number", ("resolution: no value", "a whole number"), {"resolution": None}),
    Bad("resolution too small", ("resolution: '32'", "at least 64"), {"resolution": "32"}),
    Bad("resolution too large", ("resolution: '4096'", "at most 2048"), {"resolution": "4096"}),
    Bad("resolution that is not a multiple of 8", ("resolution=510", "set 512"), {"resolution": "510"}),
    Bad("learning rate negative", ("learning_rate: '-1e-6'", "more than 0"), {"learning_rate": "-1e-6"}),
    Bad("learning rate not a number", ("learning_rate: 'nan'",), {"learning_rate": "nan"}),
    Bad("learning rate infinite", ("learning_rate: 'inf'",), {"learning_rate": "inf"}),
    Bad("no steps", ("max_train_steps: '0'", "at least 1"), {"max_train_steps": "0"}),
    Bad("decay of one", ("adam_beta1: '1'", "less than 1"), {"adam_beta1": "1"}),
    Bad("negative seed", ("seed: '-1'", "at least 0"), {"seed": "-1"}),
    Bad("unknown scheduler", ("lr_scheduler: 'cosin'", "cosine"), {"lr_scheduler": "cosin"}),
    Bad("unknown precision", ("mixed_precision: 'fp8'", "fp16, bf16"), {"mixed_precision": "fp8"}),
    Bad("unknown attention", ("attention: 'xformer'", "xformers"), {"attention": "xformer"}),
    Bad("token length between two", ("max_token_length: '100'", "75, 150, 225"), {"max_token_length": "100"}),
    Bad("no instance prompt", ("instance_prompt is missing",), {"instance_prompt": ""}),
    Bad("blank instance prompt", ("instance_prompt is missing",), {"instance_prompt": "\\  \\ "}),
    Bad("NUL in a prompt", ("instance_prompt: 'photo \\x00 zwx'",), {"instance_prompt": "photo \0 zwx"}),
    Bad("half a character in a prompt", ("class_prompt: 'toy \\ud83d'",), {"class_prompt": "toy \ud83d"}),
    Bad(
        "prior preservation without class prompt",
        ("with_prior_preservation=true needs class_prompt",),
        {"with_prior_preservation": "True", "class_prompt": "None"},
    ),
    Bad("caption of a class", ("class_prompt: [filewords]", "leave it out"), {"class_prompt": "a toy, [filewords]"}),
    Bad("caption dropout of 1", ("caption_dropout: '1'", "less than 1"), {"caption_dropout": "1"}),
    Bad("weight below 0", ("background_weight: '-0.1'", "at least 0"), {"background_weight": "-0.1"}),
    Bad("bucket step of 32", ("bucket_step: '32'", "8, 64"), {"bucket_step": "32"}),
    Bad(
        "prompts beside the pictures broken",
        ("{base}/input/data/images/dataset_info.json can't be read as JSON",),
        {"instance_prompt": "None"},
        writes(f"{IMAGES}/dataset_info.json", "{"),
    ),
    Bad("prompts the same", ("instance_prompt and class_prompt are the same",), {"class_prompt": "photo of zwx toy"}),
    Bad("token for a secret's name", ("hf_token_secret", "revoke it"), {"hf_token_secret": "hf_abcdef"}),
    Bad("name that can't be a file's", ("model_name='a/b'",), {"model_name": "a/b", "export": "single_file"}),
    Bad("LoRA of a whole model", ("use_lora=true", "method=full"), {"use_lora": "True", "method": "full"}),
    Bad("CPU in fp16", ("use_cpu=true", "fp16", "bf16"), {"use_cpu": "True", "mixed_precision": "fp16"}),
    Bad("CPU with xformers", ("use_cpu=true", "attention=xformers"), {"use_cpu": "True", "attention": "xformers"}),
    Bad("CPU with 8-bit Adam", ("use_cpu=true", "use_8bit_adam=true"), {"use_cpu": "True", "use_8bit_adam": "True"}),
    Bad(
        "warm-up longer than the job",
        ("lr_warmup_steps=9", "max_train_steps=2"),
        {"lr_scheduler": "linear", "lr_warmup_steps": "9"},
    ),
    Bad("best of no checkpoints", ("save_steps",), {"select_best": "true", "fidelity_encoders": "judge"}),
    Bad("best without a measure", ("fidelity_encoders",), {"select_best": "true", "save_steps": "2"}),
    Bad("unknown encoders", ("dino=MODEL", "clip=MODEL"), {"fidelity_encoders": "lpips"}),
    Bad("guidance below one", ("sample_guidance_scale",), {"sample_guidance_scale": "0.5"}),
    Bad("warm-up of a constant", ("constant_with_warmup",), {"lr_scheduler": "constant", "lr_warmup_steps": "1"}),
    Bad(
        "upload to a path",
        ("manual_upload_model_path", "'bucket/prefix'", "s3://bucket/prefix"),
        {"manual_upload_model_path": "bucket/prefix"},
    ),
    Bad(
        "upload to the web",
        ("manual_upload_model_path", "https://bucket"),
        {"manual_upload_model_path": "https://bucket.s3.amazonaws.com/x"},
    ),
    Bad(
        "upload to capital letters",
        ("manual_upload_model_path", "'My_Bucket'", "lower-case"),
        {"manual_upload_model_path": "s3://My_Bucket/x"},
    ),
    Bad("upload to no bucket", ("manual_upload_model_path",), {"manual_upload_model_path": "s3:///models"}),
    Bad(
        "two spellings, two places",
        ("manul_upload_model_path", "manual_upload_model_path", "mean the same"),
        {"manul_upload_model_path": "s3://other/models"},
    ),
    Bad(
        "one directory for both kinds of pictures",
        ("instance_data_dir and class_data_dir are the same", "/opt/ml/input/data/images"),
        {"class_data_dir": "/opt/ml/input/data/images/"},
    ),
    Bad(
        "model over the pictures", ("models_path=/opt/ml/input ", "instance_data_dir"), {"models_path": "/opt/ml/input"}
    ),
    Bad(
        "model over the base model",
        ("models_path and pretrained_model_name_or_path",),
        {"models_path": "/opt/ml/input/data/model/"},
    ),
    Bad("concepts: broken JSON", ("concepts_list: '[{'", "JSON"), {"concepts_list": "[{"}),
    Bad("concepts: none", ("concepts_list is empty",), {"concepts_list": "[]"}),
    Bad("concepts: numbers", ("concepts_list", "JSON list of {instance_data_dir"), {"concepts_list": "[1, 2]"}),
    Bad(
        "concepts: unknown key",
        ("concepts_list: 'instance_promt'", "instance_prompt"),
        {"concepts_list": '[{"instance_promt": "photo of zwx toy"}]'},
    ),
    Bad(
        "concepts: no prompt",
        ("concepts_list: concept 0 has no instance_prompt",),
        {**FORGOTTEN, "concepts_list": CONCEPT_WITHOUT_PROMPT},
    ),
    Bad(
        "concepts: no class prompt",
        ("concepts_list: concept 0 has no class_prompt",),
        {"concepts_list": CONCEPT_WITHOUT_PROMPT, "class_prompt": "None", "with_prior_preservation": "True"},
    ),
    Bad(
        "value of a book's length, and what it must not hide",
        ("max_train_steps: '999", "6,002 characters", "resolution: '7'"),
        {"max_train_steps": "9" * 6000, "resolution": "7"},
    ),
    Bad(
        "hyperparameters.json missing",
        ("{base}/input/config/hyperparameters.json is missing",),
        arrange=removes(f"{CONFIG}/hyperparameters.json"),
    ),
    *[
        Bad(f"{name} broken", (f"{{base}}/{CONFIG}/{name}", "JSON"), arrange=writes(f"{CONFIG}/{name}", '{"a": '))
        for name in ("hyperparameters.json", "resourceconfig.json", "inputdataconfig.json")
    ],
    Bad(
        "hyperparameters.json a list",
        ("not hold a JSON object",),
        arrange=writes(f"{CONFIG}/hyperparameters.json", "[]"),
    ),
    Bad(
        "hyperparameters.json in UTF-16",
        (f"{CONFIG}/hyperparameters.json",),
        arrange=writes(f"{CONFIG}/hyperparameters.json", '{"seed": "1"}'.encode("utf-16")),
    ),
    Bad(
        "hyperparameters.json nested without end",
        (f"{CONFIG}/hyperparameters.json", "JSON"),
        arrange=writes(f"{CONFIG}/hyperparameters.json", "[" * 100_000),
    ),
    Bad("hosts no list", ("hosts", "5"), arrange=writes(f"{CONFIG}/resourceconfig.json", '{"hosts": 5}')),
    Bad("argument without a name", ("'resolution' is not an option", "--name value"), arguments=("resolution", "64")),
    Bad("argument given twice", ("--seed is given twice",), arguments=("train", "--seed", "1", "--seed=2")),
    Bad(
        "bad argument over a good file",
        ("resolution: '7'",),
        arguments=("train", "--resolution", "7"),
    ),
]


@pytest.fixture
def job(lay_out_job: Callable[..., JobTree], target: S3Uri) -> JobTree:
    """A good job that uploads; each test spoils it in one way."""
    return lay_out_job(manual_upload_model_path=str(target))


@table(EARLY)
def test_known_before_torch_is_imported(bad: Bad, job: JobTree, target: S3Uri, s3: EmbeddedS3) -> None:
    bad = dataclasses.replace(bad, environment={**WITHOUT_TORCH, **bad.environment})
    tree = bad.put_into(job)
    assert_refused(bad, tree, tree.run(*bad.arguments), target, s3)


def test_every_problem_of_the_hyperparameters_is_told_at_once(job: JobTree) -> None:
    job.set(resolution="510", learning_rate="fast", sed="1", class_prompt="photo of zwx toy")
    assert job.run("train").code == EXIT_BAD_INPUT
    assert job.failure is not None
    lines = job.failure.splitlines()
    assert len(lines) == 4
    for name in ("resolution", "learning_rate", "sed", "class_prompt"):
        assert sum(name in line for line in lines) == 1, name


# --- What needs torch, S3 or the pictures ----------------------------------------------------------------------------


def without_pictures(tree: JobTree) -> None:
    for path in tree.images.iterdir():
        path.unlink()


def without_images_channel(tree: JobTree) -> None:
    without_pictures(tree)
    tree.images.rmdir()


def with_huge_picture(tree: JobTree) -> None:
    Image.new("1", (14_000, 14_000)).save(tree.images / "huge.png")


def change_json(path: str, **values: object) -> Arrange:
    return lambda tree: tree.write(path, json.dumps(json.loads((tree.base / path).read_text()) | values))


def change_weights(path: str, change: Callable[[dict[str, object]], object]) -> Arrange:
    def arrange(tree: JobTree) -> None:
        from safetensors.torch import load_file, save_file

        tensors = {name: tensor.clone() for name, tensor in load_file(tree.base / path).items()}
        change(tensors)
        (tree.base / path).unlink()
        save_file(tensors, tree.base / path, metadata={"format": "pt"})

    return arrange


def without_first(tensors: dict[str, object]) -> None:
    del tensors[min(tensors)]


def with_first_cut(tensors: dict[str, object]) -> None:
    name = min(tensors)
    tensors[name] = tensors[name].flatten()[1:].clone()  # type: ignore[attr-defined]


def with_vae_of_16_channels(tree: JobTree) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(latent_channels=16).save_pretrained(tree.base / "vae16")


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# The beginning of a photo.
JPEG = (EXAMPLES / "00.jpg").read_bytes()[:2000]
CONCEPTS = {"concepts_list": "/opt/ml/concepts.json"}
IN_MODEL = ("{base}/input/data/model",)

LATE = [
    # Pictures
    Bad("images channel missing", ("instance_data_dir", "no channel 'images'"), arrange=without_images_channel),
    Bad("images folder empty", ("instance_data_dir", "{base}/input/data/images holds no"), arrange=without_pictures),
    Bad(
        "images folder of other files",
        ("instance_data_dir", "no pictures (1 other files)"),
        arrange=lambda tree: (without_pictures(tree), tree.write(f"{IMAGES}/notes.txt", "duck")),
    ),
    Bad(
        "images folder a file",
        ("instance_data_dir: {base}/input/data/one.jpg is a file",),
        {"instance_data_dir": "/opt/ml/input/data/one.jpg"},
        writes("input/data/one.jpg", "x"),
    ),
    Bad("images folder of an endless name", ("name too long",), {"instance_data_dir": "/opt/ml/" + "x" * 5000}),
    Bad(
        "text named .jpg", ("{base}/input/data/images/t.jpg is not a picture",), arrange=writes(f"{IMAGES}/t.jpg", "hi")
    ),
    Bad("picture of no bytes", ("images/empty.png is not a picture",), arrange=writes(f"{IMAGES}/empty.png", b"")),
    Bad("truncated JPEG", ("images/00.jpg is damaged", "replace it"), arrange=cuts(f"{IMAGES}/00.jpg", 700)),
    Bad("picture of 196 million pixels", ("images/huge.png has more than", "scale it"), arrange=with_huge_picture),
    Bad(
        "picture is a pipe",
        ("images/pipe.png is not a file",),
        arrange=lambda tree: os.mkfifo(tree.images / "pipe.png"),
    ),
    Bad(
        "picture is a link to nothing",
        ("images/gone.png",),
        arrange=lambda tree: (tree.images / "gone.png").symlink_to("nowhere.png"),
    ),
    Bad(
        "damaged picture whose name is not UTF-8",
        (r"images/\udcff.jpg is not a picture",),
        arrange=lambda tree: (tree.images / os.fsdecode(b"\xff.jpg")).write_text("x"),
    ),
    Bad(
        "two damaged pictures, both told",
        ("images/a.png is not a picture", "images/b.png is not a picture"),
        arrange=lambda tree: [tree.write(f"{IMAGES}/{name}.png", "x") for name in "ab"],
    ),
    Bad(
        "nothing left after skipping",
        ("images/00.jpg is damaged", "images/02.jpg is not a picture"),
        {"on_bad_image": "skip"},
        lambda tree: (
            without_pictures(tree),
            tree.write(f"{IMAGES}/02.jpg", "x"),
            tree.write(f"{IMAGES}/00.jpg", JPEG),
        ),
    ),
    Bad(
        "picture far too small",
        ("images/icon.png has 12 x 9 pixels", "enlarged 7.1 times", "smaller resolution"),
        arrange=lambda tree: Image.new("RGB", (12, 9)).save(tree.images / "icon.png"),
    ),
    Bad(
        "caption no UTF-8",
        ("images/00.txt", "UTF-8"),
        {"instance_prompt": "photo of zwx toy [filewords]"},
        arrange=writes(f"{IMAGES}/00.txt", b"K\xe4the"),
    ),
    Bad(
        "caption of a missing picture, and of none",
        ("metadata.jsonl: gone.jpg does not exist", '"file_name" and "text"'),
        {"instance_prompt": "photo of zwx toy [filewords]"},
        arrange=writes(f"{IMAGES}/metadata.jsonl", '{"file_name": "gone.jpg", "text": "x"}\n{"caption": "x"}'),
    ),
    Bad(
        "caption too long",
        ("'photo of zwx toy qqq", "max_token_length"),
        {"instance_prompt": "photo of zwx toy [filewords]"},
        writes(f"{IMAGES}/00.txt", "q" * 300),
    ),
    Bad(
        "mask of another shape, and one that shows nothing",
        ("00-mask.png has 80 x 96 pixels and its picture 96 x 80", "01-mask.png shows no subject"),
        arrange=lambda tree: (
            Image.new("L", (80, 96), 255).save(tree.images / "00-mask.png"),
            Image.new("L", (96, 80)).save(tree.images / "01-mask.png"),
        ),
    ),
    Bad(
        "pictures of two classes in one folder",
        ("class_data_dir: {base}/input/data/class_images holds pictures of several", "'a cup' to a-cup"),
        {"concepts_list": '[{}, {"class_prompt": "a cup"}]'},
        lambda tree: tree.write("input/data/class_images/c.png", (tree.images / "00.jpg").read_bytes()),
    ),
    Bad("class picture damaged", ("class_images/c.jpg is not",), arrange=writes("input/data/class_images/c.jpg", "x")),
    Bad(
        "class folder a file",
        ("class_data_dir: {base}/classes is a file",),
        {"class_data_dir": "/opt/ml/classes"},
        writes("classes", "x"),
    ),
    # The base model
    Bad(
        "model missing",
        ("pretrained_model_name_or_path: {base}/input/data/nothing does not exist",),
        {"pretrained_model_name_or_path": "/opt/ml/input/data/nothing"},
    ),
    Bad(
        "model is a file",
        ("pretrained_model_name_or_path", "sd.zip is a file"),
        {"pretrained_model_name_or_path": "/opt/ml/input/data/sd.zip"},
        writes("input/data/sd.zip", "x"),
    ),
    Bad(
        "checkpoint that is not one",
        ("{base}/input/data/sd.safetensors is not a whole safetensors file", "copy it again"),
        {"pretrained_model_name_or_path": "/opt/ml/input/data/sd.safetensors"},
        writes("input/data/sd.safetensors", "x"),
    ),
    Bad(
        "model at a web address",
        ("pretrained_model_name_or_path: https://host/sd is a URL", "channel"),
        {"pretrained_model_name_or_path": "https://host/sd"},
    ),
    Bad(
        "model in a bucket that does not exist",
        ("pretrained_model_name_or_path: s3://no-such-bucket/sd", "the bucket does not exist"),
        {"pretrained_model_name_or_path": "s3://no-such-bucket/sd"},
    ),
    Bad("model without index", (*IN_MODEL, "no model_index.json"), arrange=removes(f"{MODEL}/model_index.json")),
    Bad("model index broken", ("model_index.json can't be read",), arrange=writes(f"{MODEL}/model_index.json", "{")),
    Bad("model index a list", ("model_index.json can't be read",), arrange=writes(f"{MODEL}/model_index.json", "[]")),
    Bad(
        "another kind of pipeline",
        ("pretrained_model_name_or_path", "holds a PixArtSigmaPipeline"),
        arrange=change_json(f"{MODEL}/model_index.json", _class_name="PixArtSigmaPipeline"),
    ),
    Bad(
        "model without a part",
        ("{base}/input/data/model/vae is missing",),
        arrange=lambda tree: (tree.base / MODEL / "vae").rename(tree.base / "vae"),
    ),
    Bad("UNet half copied", ("{base}/" + UNET, "copy it again"), arrange=cuts(UNET, 9000)),
    Bad("UNet without weights", (*IN_MODEL, "unet holds no weights", "again"), arrange=removes(UNET)),
    Bad("UNet a Git LFS pointer", (*IN_MODEL, "git-lfs"), arrange=writes(UNET, "version https://git-lfs.github.com/")),
    Bad("UNet short of a tensor", (*IN_MODEL, "unet lacks"), arrange=change_weights(UNET, without_first)),
    Bad("UNet of another shape", (*IN_MODEL, "shape"), arrange=change_weights(UNET, with_first_cut)),
    Bad("UNet configuration broken", (*IN_MODEL, "unet/config.json"), arrange=writes(f"{MODEL}/unet/config.json", "{")),
    Bad(
        "UNet of unknown blocks",
        (*IN_MODEL, "Nonsense"),
        arrange=change_json(f"{MODEL}/unet/config.json", down_block_types=["Nonsense", "Nonsense"]),
    ),
    Bad("text encoder half copied", ("{base}/" + TEXT_ENCODER, "copy it again"), arrange=cuts(TEXT_ENCODER, 5000)),
    Bad(
        "text encoder short of a tensor",
        (*IN_MODEL, "text_encoder lacks"),
        arrange=change_weights(TEXT_ENCODER, without_first),
    ),
    Bad("tokenizer broken", IN_MODEL, arrange=writes(f"{MODEL}/tokenizer/tokenizer.json", "{")),
    Bad(
        "tokenizer without words",
        (*IN_MODEL, "vocabulary"),
        arrange=lambda tree: [
            removes(f"{MODEL}/tokenizer/{name}")(tree) for name in ("tokenizer.json", "vocab.json", "merges.txt")
        ],
    ),
    Bad("noise scheduler broken", IN_MODEL, arrange=writes(f"{MODEL}/scheduler/scheduler_config.json", "{")),
    Bad(
        "VAE that is not one",
        ("pretrained_vae_name_or_path: {base}/vae", "config.json"),
        {"pretrained_vae_name_or_path": "/opt/ml/vae"},
    ),
    Bad(
        "VAE of another family",
        ("VAE", "16 channels", "takes 4"),
        {"pretrained_vae_name_or_path": "/opt/ml/vae16"},
        with_vae_of_16_channels,
    ),
    # Concepts and prompts
    Bad("concepts file missing", ("concepts_list: {base}/concepts.json does not exist",), CONCEPTS),
    Bad(
        "concepts file broken", ("concepts_list: {base}/concepts.json", "JSON"), CONCEPTS, writes("concepts.json", "[")
    ),
    Bad("concepts file empty", ("concepts_list", "JSON"), CONCEPTS, writes("concepts.json", "")),
    Bad("concepts file a text", ("concepts_list", "not hold a JSON list"), CONCEPTS, writes("concepts.json", '"duck"')),
    Bad("concepts file null", ("concepts_list", "not hold a JSON list"), CONCEPTS, writes("concepts.json", "null")),
    Bad("concepts file a folder", ("concepts_list: {base}/input",), {"concepts_list": "/opt/ml/input"}),
    Bad(
        "concepts file without prompts",
        ("concepts_list: concept 0 has no instance_prompt",),
        {**CONCEPTS, **FORGOTTEN},
        writes("concepts.json", CONCEPT_WITHOUT_PROMPT),
    ),
    Bad(
        "concepts file with a missing folder",
        ("instance_data_dir: {base}/input/data/cat does not exist", "no channel 'cat'"),
        CONCEPTS,
        writes("concepts.json", '[{}, {"instance_data_dir": "/opt/ml/input/data/cat"}]'),
    ),
    Bad("instance prompt too long", ("'qqq", "300 tokens", "max_token_length"), {"instance_prompt": "q" * 300}),
    Bad("class prompt too long", ("'qqq", "300 tokens", "max_token_length"), {"class_prompt": "q" * 300}),
    # The place for the result
    Bad(
        "model directory a file",
        ("models_path: {base}/models can't be written to",),
        {"models_path": "/opt/ml/models"},
        writes("models", "x"),
    ),
    Bad(
        "bucket missing",
        ("s3://nobodys-bucket/x", "does not exist"),
        {"manual_upload_model_path": "s3://nobodys-bucket/x"},
    ),
    Bad(
        "S3 out of reach",
        ("s3://{bucket}/jobs/duck", "AWS_ENDPOINT_URL"),
        environment=dict.fromkeys(["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"], f"http://127.0.0.1:{closed_port()}"),
    ),
    Bad(
        "endpoint no URL",
        ("AWS settings", "nonsense"),
        environment={"AWS_ENDPOINT_URL": "nonsense", "AWS_ENDPOINT_URL_S3": "nonsense"},
    ),
    Bad("profile missing", ("AWS settings", "nobody"), environment={"AWS_PROFILE": "nobody"}),
    Bad(
        "no credentials",
        ("s3://{bucket}/jobs/duck", "no AWS credentials"),
        environment={"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
    ),
    # The machines
    Bad(
        "GPU instance without its GPU",
        ("ml.g4dn.xlarge", "no GPU", "driver"),
        arrange=change_json(f"{CONFIG}/resourceconfig.json", current_instance_type="ml.g4dn.xlarge"),
    ),
    Bad("8-bit Adam without a GPU", ("use_8bit_adam=true needs a GPU",), {"use_8bit_adam": "True"}),
    # Several kinds at once
    Bad(
        "pictures, model, bucket and precision at once",
        ("images/00.jpg", "data/nothing does not exist", "s3://nobodys-bucket/x", "use_8bit_adam"),
        {
            "pretrained_model_name_or_path": "/opt/ml/input/data/nothing",
            "manual_upload_model_path": "s3://nobodys-bucket/x",
            "use_8bit_adam": "True",
        },
        cuts(f"{IMAGES}/00.jpg", 700),
    ),
]


@pytest.fixture(scope="session")
def train() -> ModuleType:
    """The entrypoint as a module."""
    spec = importlib.util.spec_from_file_location("entrypoint", ENTRYPOINT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_here(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., Ended]]:
    """Runs the entrypoint's ``main`` in this process, in the environment that a job of its own would find."""
    import torch

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no AWS profile of whoever runs the tests

    def run(tree: JobTree, *arguments: str) -> Ended:
        with monkeypatch.context() as environment:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                environment.delenv(name)
            for name, value in {**tree.environment, "SAGEMAKER_BASE_DIR": str(tree.base)}.items():
                environment.setenv(name, value)
            code = train.main(list(arguments))
        out, err = capfd.readouterr()
        return Ended(code, out + err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@table(LATE)
def test_known_before_training(
    bad: Bad, job: JobTree, target: S3Uri, s3: EmbeddedS3, run_here: Callable[..., Ended]
) -> None:
    tree = bad.put_into(job)
    ended = run_here(tree, *bad.arguments)
    assert_refused(bad, tree, ended, target, s3)
    # Class images are the first thing that takes long.
    assert "phase=class_images" not in ended.log


@contextmanager
def enforced_permissions() -> Iterator[None]:
    """moto allows everything to everybody otherwise; this is its own switch."""
    from moto import settings
    from moto.core.responses import ActionAuthenticatorMixin

    ActionAuthenticatorMixin.request_count = 0
    with patch.object(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0.0):
        yield


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_keys(name: str, job: JobTree, target: S3Uri, s3: EmbeddedS3, run_here: Callable[..., Ended]) -> None:
    bad = Bad("", (str(target), "credentials are wrong"), environment={name: "mistyped"})
    tree = bad.put_into(job)
    assert_refused(bad, tree, run_here(tree, "train"), target, s3)


def test_no_permission(job: JobTree, target: S3Uri, s3: EmbeddedS3, run_here: Callable[..., Ended]) -> None:
    import boto3

    iam = boto3.client("iam", endpoint_url=s3.endpoint_url, **boto3_keys(s3))
    iam.create_user(UserName="reader")
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    bad = Bad(
        "",
        (str(target), "access denied", "s3:PutObject"),
        environment={"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]},
    )
    tree = bad.put_into(job)
    with enforced_permissions():
        ended = run_here(tree, "train")
    assert_refused(bad, tree, ended, target, s3)


def boto3_keys(s3: EmbeddedS3) -> dict[str, str]:
    environment = s3.environment()
    return {
        "aws_access_key_id": environment["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": environment["AWS_SECRET_ACCESS_KEY"],
        "region_name": environment["AWS_DEFAULT_REGION"],
    }


class WebServer(BaseHTTPRequestHandler):
    """Answers everything with a page, as a proxy's login or a mistyped address does."""

    def do_POST(self) -> None:
        page = b"<html><body>Please log in</body></html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    do_PUT = do_GET = do_HEAD = do_DELETE = do_POST  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_endpoint_is_no_s3(job: JobTree, target: S3Uri, s3: EmbeddedS3, run_here: Callable[..., Ended]) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), WebServer))
        Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        url = f"http://127.0.0.1:{server.server_address[1]}"
        bad = Bad(
            "", (str(target), "AWS_ENDPOINT_URL"), environment={"AWS_ENDPOINT_URL": url, "AWS_ENDPOINT_URL_S3": url}
        )
        tree = bad.put_into(job)
        ended = run_here(tree, "train")
    assert_refused(bad, tree, ended, target, s3)


ONE_OF_EACH = [
    next(row for row in LATE if row.name == name)
    for name in ("truncated JPEG", "UNet half copied", "bucket missing", "GPU instance without its GPU")
] + [
    Bad(
        "hub barred",
        ("nobody/no-model", "hub", "network", "channel"),
        {"pretrained_model_name_or_path": "nobody/no-model"},
        environment={"HF_HUB_OFFLINE": "1"},
    )
]


@table(ONE_OF_EACH)
def test_as_a_process_of_its_own(bad: Bad, job: JobTree, target: S3Uri, s3: EmbeddedS3) -> None:
    tree = bad.put_into(job)
    assert_refused(bad, tree, tree.run(), target, s3)


def assert_refused(bad: Bad, tree: JobTree, ended: Ended, target: S3Uri, s3: EmbeddedS3) -> None:
    assert ended.code == EXIT_BAD_INPUT, ended.log
    assert "Traceback" not in ended.log
    reason = tree.failure
    assert reason is not None
    assert len(reason) <= FAILURE_LENGTH
    for words in bad.says:
        assert words.replace("{base}", str(tree.base)).replace("{bucket}", target.bucket) in reason
    # Told on the log as well, where people look first.
    assert f"error: {reason.splitlines()[0][:50]}" in ended.log
    assert not list_objects(S3Uri(target.bucket), client=s3.client())
    assert not tree.model.exists() or not list(tree.model.iterdir())
