"""The paper's evaluation runs on what jobs left: whole models and adapters, with encoders of the true classes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import dreambench
from benchmarks.dreambench import PROMPTS_FILE, read_protocol
from dreambooth_sm.errors import UserError
from tests.helpers.encoders import save_clip, save_dino
from tests.helpers.training import paint_pictures

# The form of the paper's file, with fewer subjects and other prompts.
LISTS = """Classes

subject_name,class
duck_toy,toy
robot_toy,toy
old_dog,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} under a tree'.format(unique_token, class_token),
'an odd {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} that sleeps'.format(unique_token, class_token)
]
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    (root / PROMPTS_FILE).write_text(LISTS)
    for subject in ("duck_toy", "robot_toy", "old_dog"):
        paint_pictures(root / subject, 2)
    return root


def test_the_lists_are_read(dataset: Path, tmp_path: Path) -> None:
    protocol = read_protocol(dataset / PROMPTS_FILE)
    assert protocol.classes == {"duck_toy": "toy", "robot_toy": "toy", "old_dog": "dog"}
    assert protocol.prompts("duck_toy", "zwx") == ["a zwx toy under a tree", "an odd zwx toy"]
    assert protocol.prompts("old_dog", "") == ["a dog that sleeps"]
    (tmp_path / "other.txt").write_text("Classes\n")
    with pytest.raises(UserError, match="take it from the dataset"):
        read_protocol(tmp_path / "other.txt")
    with pytest.raises(UserError, match="name the folder of the paper's dataset"):
        read_protocol(tmp_path / "none.txt")


@pytest.mark.slow
def test_models_are_measured(
    dataset: Path,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(tiny_base, tmp_path / "models" / "duck_toy")
    dino, clip = save_dino(tmp_path / "dino"), save_clip(tmp_path / "clip")
    small = ["--pictures", "2", "--steps", "2", "--resolution", "64", "--out", str(tmp_path / "out")]
    words = [str(dataset), str(tmp_path / "models"), "--dino", str(dino), "--clip", str(clip), *small]
    monkeypatch.setattr(sys, "argv", ["dreambench", *words])
    dreambench.main()
    subject, mean = map(json.loads, capsys.readouterr().out.splitlines())
    assert subject["subject"] == "duck_toy"
    assert mean["subjects"] == 1
    for name in ("dino", "clip_i", "clip_t", "prior", "diversity"):
        assert -1 <= subject[name] == mean[name] <= 1
    assert (tmp_path / "out" / "duck_toy.jpg").is_file()
    (tmp_path / "models" / "robot_toy").mkdir()  # an adapter, or nothing
    with pytest.raises(SystemExit, match="name the base model of its adapter with --base"):
        dreambench.main()
