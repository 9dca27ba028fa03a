"""Class images: those that are missing are made or found, each from its own seed, and kept for later jobs."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

from dreambooth_sm.data import class_cache, prior
from dreambooth_sm.data.class_cache import Recipe, read_latents, unpack
from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.data.prior import ClassImages, weights_digest
from dreambooth_sm.errors import StopRequested
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.report import Reporter
from dreambooth_sm.resume import fingerprint
from dreambooth_sm.sampling import Sampler
from dreambooth_sm.storage import S3Uri, get_object, list_objects, put_object
from launcher.local.s3 import EmbeddedS3, embedded_s3
from tests.helpers.drawing import draw_otherwise
from tests.helpers.training import cpu_plan, hyperparameters, make_subject

WANTED = 3
CACHE = S3Uri("classes", "toys")


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_otherwise(monkeypatch.setattr, class_steps=2)
    monkeypatch.setattr(prior, "SHOWN", 2)


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    made = make_subject(tmp_path, pictures=1)
    return dataclasses.replace(made, class_prompt="photo of a toy", class_directory=tmp_path / "new" / "class")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedS3]:
    with embedded_s3() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        server.client().create_bucket(Bucket=CACHE.bucket)
        yield server
        for key in list_objects(S3Uri(CACHE.bucket)):
            server.client().delete_object(Bucket=CACHE.bucket, Key=key)


class Made:
    """Class images of one job, its log, and how many pictures it drew."""

    def __init__(self, base: PretrainedModel, subject: Subject, root: Path, **options: object) -> None:
        stream = io.StringIO()
        settings = {"batch_size": 1, "guidance": 7.5, "remote": None, "stop": threading.Event()}
        sizes = options.pop("sizes", [(64, 64)] * WANTED)
        plan = options.pop("plan", cpu_plan(hyperparameters()))
        first = options.pop("first", 0)
        images = ClassImages(
            base.pipeline(),
            weights=weights_digest(base, plan, fingerprint(base)),
            draw_with=lambda: Sampler(base.pipeline()),
            scratch=root / "scratch",
            shown=root / "shown",
            report=Reporter(stream),
            **settings | options,  # type: ignore[arg-type]
        )
        make = images._make

        def counting(names: dict[int, str], *rest: object) -> dict[str, bytes]:
            self.drawn += len(names)
            return make(names, *rest)  # type: ignore[arg-type]

        self.drawn = 0
        images._make = counting  # type: ignore[method-assign, assignment]
        self.paths = images.complete(subject, sizes, first).class_pictures  # type: ignore[arg-type]
        self.log = stream.getvalue()

    @property
    def latents(self) -> torch.Tensor:
        return torch.stack([read_latents(path) for path in self.paths])


def moved(subject: Subject, directory: Path) -> Subject:
    return dataclasses.replace(subject, class_directory=directory)


def test_missing_pictures_are_made_beside_the_others(base: PretrainedModel, subject: Subject, tmp_path: Path) -> None:
    made = Made(base, subject, tmp_path)
    assert {path.parent for path in made.paths} == {subject.class_directory}
    assert sorted(subject.class_directory.iterdir()) == sorted(made.paths)
    assert made.latents.shape == (WANTED, 4, 16, 16)
    assert not torch.equal(made.latents[0], made.latents[1])


def test_some_are_decoded_for_people(base: PretrainedModel, subject: Subject, tmp_path: Path) -> None:
    Made(base, subject, tmp_path)
    shown = sorted((tmp_path / "shown").iterdir())
    assert [path.name for path in shown] == ["class-0.png", "class-1.png"]
    assert {Image.open(path).size for path in shown} == {(64, 64)}


@pytest.mark.slow
def test_each_picture_depends_on_its_own_seed_alone(base: PretrainedModel, subject: Subject, tmp_path: Path) -> None:
    one_by_one = Made(base, subject, tmp_path).latents
    together = Made(base, moved(subject, tmp_path / "other"), tmp_path, batch_size=2).latents
    assert torch.allclose(one_by_one, together, rtol=2e-3, atol=2e-2)  # sums of a batch may round differently
    later = Made(base, moved(subject, tmp_path / "later"), tmp_path, first=1).latents
    assert torch.equal(later[:2], one_by_one[1:])


@pytest.mark.slow
def test_the_users_own_come_first(base: PretrainedModel, subject: Subject, tmp_path: Path) -> None:
    whole = Made(base, subject, tmp_path).latents
    own = (tmp_path / "own.png",)
    made = Made(base, moved(dataclasses.replace(subject, class_pictures=own), tmp_path / "more"), tmp_path)
    assert made.paths[:1] == own
    assert torch.equal(torch.stack([read_latents(path) for path in made.paths[1:]]), whole[1:])


def test_nothing_is_drawn_that_is_not_needed(base: PretrainedModel, subject: Subject, tmp_path: Path) -> None:
    done = dataclasses.replace(subject, class_pictures=tuple(tmp_path / f"{n}.png" for n in range(WANTED)))
    assert Made(base, done, tmp_path).paths == done.class_pictures
    assert Made(base, dataclasses.replace(subject, class_prompt=None), tmp_path).paths == ()


def test_a_directory_that_can_not_be_written_gives_way_to_scratch(
    base: PretrainedModel, subject: Subject, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    made = Made(base, moved(subject, tmp_path / "file" / "class"), tmp_path)
    assert {path.parent for path in made.paths} == {tmp_path / "scratch"}


def test_a_stop_between_batches_keeps_what_is_done(base: PretrainedModel, subject: Subject, tmp_path: Path) -> None:
    asked = threading.Event()
    asked.set()
    with pytest.raises(StopRequested, match="2 of 3"):
        Made(base, subject, tmp_path, batch_size=2, stop=asked)
    assert Made(base, subject, tmp_path).drawn == 1


def test_pictures_of_several_sizes(base: PretrainedModel, subject: Subject, tmp_path: Path) -> None:
    made = Made(base, subject, tmp_path, sizes=[(64, 64), (96, 64), (64, 64)], batch_size=2)
    assert [tuple(read_latents(path).shape) for path in made.paths] == [(4, 16, 16), (4, 16, 24), (4, 16, 16)]
    assert made.drawn == WANTED


def test_the_next_job_finds_them(base: PretrainedModel, subject: Subject, tmp_path: Path) -> None:
    first, second = Made(base, subject, tmp_path), Made(base, subject, tmp_path)
    assert (first.drawn, second.drawn) == (WANTED, 0)
    assert second.paths == first.paths


@pytest.mark.slow
def test_the_next_job_finds_them_in_s3(base: PretrainedModel, subject: Subject, tmp_path: Path, s3: EmbeddedS3) -> None:
    first = Made(base, subject, tmp_path, remote=CACHE)
    assert sorted(list_objects(CACHE)) == sorted(path.name for path in first.paths)
    second = Made(base, moved(subject, tmp_path / "elsewhere"), tmp_path, remote=CACHE)
    assert second.drawn == 0
    assert torch.equal(second.latents, first.latents)


@pytest.mark.slow
def test_damaged_entries_are_made_again(
    base: PretrainedModel, subject: Subject, tmp_path: Path, s3: EmbeddedS3
) -> None:
    first = Made(base, subject, tmp_path, remote=CACHE)
    expected = first.latents
    content = bytearray(first.paths[0].read_bytes())
    content[-5] ^= 1
    put_object(CACHE / first.paths[0].name, bytes(content))
    put_object(CACHE / first.paths[1].name, bytes(content[:100]))
    put_object(CACHE / first.paths[2].name, b"")
    second = Made(base, moved(subject, tmp_path / "elsewhere"), tmp_path, remote=CACHE)
    assert second.drawn == WANTED
    assert torch.equal(second.latents, expected)
    third = Made(base, moved(subject, tmp_path / "third"), tmp_path, remote=CACHE)
    assert third.drawn == 0, "the damaged entries were replaced"


@pytest.mark.slow
def test_two_jobs_at_once(base: PretrainedModel, subject: Subject, tmp_path: Path, s3: EmbeddedS3) -> None:
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(Made, base, moved(subject, tmp_path / name), tmp_path / name, remote=CACHE)
            for name in ("one", "two")
        ]
        one, two = (job.result() for job in jobs)
    assert torch.equal(one.latents, two.latents)
    assert Made(base, moved(subject, tmp_path / "three"), tmp_path, remote=CACHE).drawn == 0


def test_a_cache_that_fails_costs_time_alone(
    base: PretrainedModel, subject: Subject, tmp_path: Path, s3: EmbeddedS3
) -> None:
    made = Made(base, subject, tmp_path, remote=S3Uri("no-such-bucket", "toys"))
    assert made.drawn == WANTED
    assert "warning: class_cache: s3://no-such-bucket/" in made.log


def other_weights(base: PretrainedModel) -> PretrainedModel:
    other = copy.deepcopy(base)
    with torch.no_grad():
        next(other.unet.parameters()).mul_(1 + 1e-6)
    return other


def other_scheduler(base: PretrainedModel) -> PretrainedModel:
    scheduler = type(base.scheduler).from_config(base.scheduler.config, beta_end=0.02)
    other = copy.copy(base)
    other.scheduler = scheduler
    return other


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda base, subject, patch: (other_weights(base), subject, {}), id="weights"),
        pytest.param(lambda base, subject, patch: (other_scheduler(base), subject, {}), id="scheduler"),
        pytest.param(
            lambda base, subject, patch: (base, dataclasses.replace(subject, class_prompt="a cat"), {}), id="prompt"
        ),
        pytest.param(lambda base, subject, patch: (base, subject, {"guidance": 3.0}), id="guidance"),
        pytest.param(lambda base, subject, patch: (base, subject, {"sizes": [(96, 64)] * WANTED}), id="size"),
        pytest.param(lambda base, subject, patch: (base, subject, {"first": WANTED}), id="seed"),
        pytest.param(
            lambda base, subject, patch: (draw_otherwise(patch.setattr, class_steps=3), (base, subject, {}))[1],
            id="steps",
        ),
        pytest.param(
            lambda base, subject, patch: (draw_otherwise(patch.setattr, guided=(9.0, 0.1)), (base, subject, {}))[1],
            id="guided",
        ),
        pytest.param(
            lambda base, subject, patch: (patch.setattr(prior, "__version__", "99"), (base, subject, {}))[1],
            id="version",
        ),
    ],
)
def test_whatever_determines_a_picture_is_in_its_name(
    change: Callable[..., tuple[PretrainedModel, Subject, dict[str, object]]],
    base: PretrainedModel,
    subject: Subject,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = Made(base, subject, tmp_path).paths
    changed_base, changed_subject, options = change(base, subject, monkeypatch)
    after = Made(changed_base, changed_subject, tmp_path, **options)
    assert after.drawn == WANTED
    assert not set(after.paths) & set(before)


def test_what_weights_are_kept_in_and_computed_with_counts(base: PretrainedModel) -> None:
    digests = fingerprint(base)
    on_cpu = cpu_plan(hyperparameters())
    on_gpu = dataclasses.replace(on_cpu, device="cuda", precision="bf16")
    plans = [on_cpu, on_gpu, dataclasses.replace(on_gpu, base_weights="nf4")]
    assert len({weights_digest(base, plan, digests) for plan in plans}) == len(plans)
    assert weights_digest(base, on_gpu, digests) == weights_digest(base, on_gpu, fingerprint(base))
    assert weights_digest(base, on_gpu, digests) == weights_digest(base, on_gpu, digests | {"vae": "another"})


GOOD = torch.zeros(4, 32, 32, dtype=torch.float16)


def packed(tensor: torch.Tensor, key: str = "latents") -> bytes:
    """A file as a job writes it, checksum and all, but for what is in it."""
    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    return safetensors.torch.save({key: tensor.contiguous()}, {"sha256": digest})


BAD = {
    "nothing": b"",
    "noise": b"\xff" * 64,
    "text": b"remember the milk",
    "a pickle": pickle.dumps({"latents": [1.0]}),
    "another name": packed(GOOD, "pixels"),
    "no checksum": safetensors.torch.save({"latents": GOOD}),
    "a list for a header": (2).to_bytes(8, "little") + b"[]",
    "a deep header": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "a header without end": (2**63 - 1).to_bytes(8, "little") + b"{}",
    "another size": packed(GOOD[:, :16]),
    "other channels": packed(GOOD.repeat(4, 1, 1)),
    "a batch": packed(GOOD[None]),
    "a number": packed(GOOD[0, 0, 0]),
    "single precision": packed(GOOD.float()),
    "integers": packed(GOOD.short()),
    "NaN": packed(GOOD / 0),
    "one NaN": packed(torch.where(torch.arange(4096).view(4, 32, 32) == 7, torch.nan, GOOD).half()),
    "infinity": packed(GOOD + torch.inf),
    "huge values": packed(GOOD + 1e4),
    "too many bytes": packed(GOOD) + bytes(1 << 20),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_latents_counts_as_damaged(kind: str) -> None:
    assert unpack(packed(GOOD), (4, 32, 32)) is not None
    assert unpack(BAD[kind], (4, 32, 32)) is None


@pytest.mark.slow
def test_bad_objects_cost_time_and_not_the_job(
    base: PretrainedModel, subject: Subject, tmp_path: Path, s3: EmbeddedS3
) -> None:
    first = Made(base, subject, tmp_path, remote=CACHE, sizes=[(64, 64)] * len(BAD))
    expected = first.latents
    for path, content in zip(first.paths, BAD.values(), strict=True):
        put_object(CACHE / path.name, content)
        path.write_bytes(content)
    (first.paths[0]).unlink()
    os.mkfifo(first.paths[0].with_name("pipe"))
    first.paths[0].with_name("pipe").rename(first.paths[0])
    second = Made(base, subject, tmp_path, remote=CACHE, sizes=[(64, 64)] * len(BAD))
    assert second.drawn == len(BAD)
    assert torch.equal(second.latents, expected)
    here, there = [line for line in second.log.splitlines() if line.startswith("warning: class_cache: damaged")]
    assert here.endswith(f"and {len(BAD) - 6} more")
    assert there.endswith(f"and {len(BAD) - 5} more")
    third = Made(base, moved(subject, tmp_path / "third"), tmp_path, remote=CACHE, sizes=[(64, 64)] * len(BAD))
    assert (third.drawn, "class_cache" in third.log) == (0, False)


def test_an_object_that_is_too_large_is_not_read(
    base: PretrainedModel, subject: Subject, tmp_path: Path, s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(base, subject, tmp_path, remote=CACHE)
    put_object(CACHE / made.paths[0].name, bytes(1 << 20))
    read: list[str] = []

    def reading(uri: S3Uri, *options: Any, **client: Any) -> bytes | None:
        read.append(str(uri))
        return get_object(uri, *options, **client)

    monkeypatch.setattr(class_cache, "get_object", reading)
    again = Made(base, moved(subject, tmp_path / "elsewhere"), tmp_path, remote=CACHE)
    assert again.drawn == 1
    assert sorted(read) == sorted(str(CACHE / path.name) for path in made.paths[1:])


def test_recipes_name_files() -> None:
    recipe = Recipe("w", "s", "p", 20, 7.5, (5.0, 0.3), (64, 64))
    assert recipe.name(7).endswith("-000007.safetensors")
    assert dataclasses.replace(recipe, prompt="q").name(7) != recipe.name(7)
