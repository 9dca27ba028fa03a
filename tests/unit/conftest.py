"""Fixtures of the unit tests."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.drawing import FEW_STEPS, draw_otherwise

if TYPE_CHECKING:
    from dreambooth_sm.models import PretrainedModel


@pytest.fixture(scope="session", autouse=True)
def half_precision() -> Iterator[None]:
    from tests.helpers.half_precision import summed_in_fp32

    with summed_in_fp32():
        yield


@pytest.fixture
def quick_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn in five steps: they show what those of 25 show."""
    draw_otherwise(monkeypatch.setattr, **FEW_STEPS)


@pytest.fixture(scope="session")
def loaded_base(tiny_base: Path) -> PretrainedModel:
    """The tiny pipeline's parts; not to be written to."""
    from dreambooth_sm.models import load_base
    from tests.helpers.training import hyperparameters

    return load_base(hyperparameters(pretrained_model_name_or_path=str(tiny_base)))


@pytest.fixture(scope="session")
def loaded_xl_base(tiny_xl_base: Path) -> PretrainedModel:
    """The tiny SDXL pipeline's parts; not to be written to."""
    from dreambooth_sm.models import load_base
    from tests.helpers.training import hyperparameters

    return load_base(hyperparameters(pretrained_model_name_or_path=str(tiny_xl_base)))


@pytest.fixture(scope="session")
def loaded_z_image(tiny_z_image: Path) -> PretrainedModel:
    """The tiny Z-Image pipeline's parts; not to be written to."""
    from dreambooth_sm.models import load_base
    from tests.helpers.training import hyperparameters

    values = {"pretrained_model_name_or_path": str(tiny_z_image), "method": "lora"}
    return load_base(hyperparameters(**values))


@pytest.fixture(scope="session")
def loaded_flux2(tiny_flux2: Path) -> PretrainedModel:
    """The tiny FLUX.2 klein pipeline's parts; not to be written to."""
    from dreambooth_sm.models import load_base
    from tests.helpers.training import hyperparameters

    values = {"pretrained_model_name_or_path": str(tiny_flux2), "method": "lora"}
    return load_base(hyperparameters(**values))


@pytest.fixture(scope="session")
def loaded_flux1(tiny_flux1: Path) -> PretrainedModel:
    """The tiny FLUX.1 pipeline's parts; not to be written to."""
    from dreambooth_sm.models import load_base
    from tests.helpers.training import hyperparameters

    values = {"pretrained_model_name_or_path": str(tiny_flux1), "method": "lora"}
    return load_base(hyperparameters(**values))


@pytest.fixture
def flux1(loaded_flux1: PretrainedModel) -> PretrainedModel:
    """The tiny FLUX.1 pipeline's parts, the test's own."""
    return copy.deepcopy(loaded_flux1)


@pytest.fixture(scope="session")
def loaded_sd3(tiny_sd3: Path) -> PretrainedModel:
    """The tiny Stable Diffusion 3.5 pipeline's parts; not to be written to."""
    from dreambooth_sm.models import load_base
    from tests.helpers.training import hyperparameters

    values = {"pretrained_model_name_or_path": str(tiny_sd3), "method": "lora"}
    return load_base(hyperparameters(**values))


@pytest.fixture
def sd3(loaded_sd3: PretrainedModel) -> PretrainedModel:
    """The tiny Stable Diffusion 3.5 pipeline's parts, the test's own."""
    return copy.deepcopy(loaded_sd3)


@pytest.fixture(scope="session")
def loaded_chroma(tiny_chroma: Path) -> PretrainedModel:
    """The tiny Chroma pipeline's parts; not to be written to."""
    from dreambooth_sm.models import load_base
    from tests.helpers.training import hyperparameters

    values = {"pretrained_model_name_or_path": str(tiny_chroma), "method": "lora"}
    return load_base(hyperparameters(**values))


@pytest.fixture
def chroma(loaded_chroma: PretrainedModel) -> PretrainedModel:
    """The tiny Chroma pipeline's parts, the test's own."""
    return copy.deepcopy(loaded_chroma)


@pytest.fixture
def flux2(loaded_flux2: PretrainedModel) -> PretrainedModel:
    """The tiny FLUX.2 klein pipeline's parts, the test's own."""
    return copy.deepcopy(loaded_flux2)


@pytest.fixture(scope="session")
def loaded_qwen_image(tiny_qwen_image: Path) -> PretrainedModel:
    """The tiny Qwen-Image pipeline's parts; not to be written to."""
    from dreambooth_sm.models import load_base
    from tests.helpers.training import hyperparameters

    return load_base(hyperparameters(pretrained_model_name_or_path=str(tiny_qwen_image), method="lora"))


@pytest.fixture
def qwen_image(loaded_qwen_image: PretrainedModel) -> PretrainedModel:
    """The tiny Qwen-Image pipeline's parts, the test's own."""
    return copy.deepcopy(loaded_qwen_image)


@pytest.fixture(scope="session")
def loaded_krea2(tiny_krea2: Path) -> PretrainedModel:
    """The tiny Krea 2 pipeline's parts; not to be written to."""
    from dreambooth_sm.models import load_base
    from tests.helpers.training import hyperparameters

    return load_base(hyperparameters(pretrained_model_name_or_path=str(tiny_krea2), method="lora"))


@pytest.fixture
def krea2(loaded_krea2: PretrainedModel) -> PretrainedModel:
    """The tiny Krea 2 pipeline's parts, the test's own."""
    return copy.deepcopy(loaded_krea2)


@pytest.fixture
def z_image(loaded_z_image: PretrainedModel) -> PretrainedModel:
    """The tiny Z-Image pipeline's parts, the test's own."""
    return copy.deepcopy(loaded_z_image)


@pytest.fixture
def xl_base(loaded_xl_base: PretrainedModel) -> PretrainedModel:
    """The tiny SDXL pipeline's parts, the test's own."""
    return copy.deepcopy(loaded_xl_base)


@pytest.fixture
def base(loaded_base: PretrainedModel) -> PretrainedModel:
    """The tiny pipeline's parts, the test's own."""
    return copy.deepcopy(loaded_base)
