"""Which part of the project may import which."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from dreambooth_sm.errors import EXIT_BAD_INPUT
from dreambooth_sm.families import DEFAULT, FAMILIES
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS
from launcher.local.program import ENTRYPOINT
from launcher.local.tree import lay_out

ROOT = Path(__file__).parents[2]
# What a job or a launcher runs; and what stays in the repository: no image and no wheel has it.
PRODUCTION = ("dreambooth_sm", "launcher", "container")
REPOSITORY = {"tests", "toybox", "benchmarks", "examples"}
# What a package finds in each of its files, and type variables, which mean nothing outside of their file.
SHARED_NAMES = {"FAMILY", "METHOD", "Item", "T"}
# What models are opened, compiled, quantised and fetched with. It takes longer to import than torch and the job itself,
# and no check has to wait for it that does not open a model.
LATE = (
    "accelerate", "bitsandbytes", "boto3", "diffusers", "huggingface_hub", "pandas", "scipy", "sympy", "torch._dynamo",
    "mlflow", "starlette", "tensorboard", "torch._inductor", "torchvision", "transformers", "triton", "uvicorn",
    "wandb", "xformers",
)  # fmt: skip


def imported(path: Path) -> Iterator[str]:
    """The first name of every absolute import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


def modules(root: Path, *packages: str) -> dict[str, Path]:
    """Every module of some packages, by its full name."""
    found = {}
    for path in sorted(path for package in packages for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def capitalised(path: Path) -> Iterator[str]:
    """Public classes, aliases and constants that a file defines at its top."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names = [node.name]
        else:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        yield from (name for name in names if name[0].isupper())


def imports(modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """The modules that each one imports of them: at its top, in functions, and for the type checker alone.

    That a module is inside a package is not an import of the package.
    """
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                source = node.module or ""
                if node.level:  # counted from the package that the module is in, or is
                    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                    parent = package[: len(package) + 1 - node.level]
                    source = ".".join([*parent, *([node.module] if node.module else [])])
                names = {f"{source}.{alias.name}" for alias in node.names}
                named |= {name if name in modules else source for name in names}
        graph[module] = (named & modules.keys()) - {module}
    return graph


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, the first one again at the end; empty where imports form a tree."""
    done: set[str] = set()

    def follow(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module not in done:
            for needed in sorted(graph[module]):
                if found := follow(needed, [*way, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := follow(module, []))), [])


def test_no_modules_import_each_other() -> None:
    graph = imports(modules(ROOT, "dreambooth_sm", "launcher"))
    assert sum(map(len, graph.values())) > len(graph)
    assert not circle(graph)


def test_a_circle_is_found_wherever_its_imports_stand(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from package.a import thing",
        "a.py": "import package.b",
        "b.py": "def late():\n    from package import c",
        "c.py": "if TYPE_CHECKING:\n    from .d.e import thing",
        "d/__init__.py": "",
        "d/e.py": "from package.a import thing",
        "f.py": "import os\nfrom package.a import thing",
    }
    for name, text in files.items():
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).write_text(text)
    ring = ["package.a", "package.b", "package.c", "package.d.e", "package.a"]
    assert circle(imports(modules(tmp_path, "package"))) == ring
    (tmp_path / "package" / "d" / "e.py").write_text("from .. import f")
    assert circle(imports(modules(tmp_path, "package")))[-1] == "package.a"  # by f
    (tmp_path / "package" / "d" / "e.py").write_text("")
    assert not circle(imports(modules(tmp_path, "package")))


def test_no_name_stands_for_two_things() -> None:
    defined: dict[str, list[str]] = {}
    for module, path in modules(ROOT, *PRODUCTION, "toybox").items():
        for name in {*capitalised(path)} - SHARED_NAMES:
            defined.setdefault(name, []).append(module)
    assert {"BatchSampler", "Shape", "EXPORT_DTYPES"} <= defined.keys()
    assert not {name: found for name, found in defined.items() if len(found) > 1}


def test_the_rooms_of_the_launcher_stand_on_each_other() -> None:
    """The account knows nothing of jobs, and jobs nothing of the machine that may run them."""
    above = {"aws": ("launcher.jobs", "launcher.local"), "jobs": ("launcher.local",)}
    graph = imports(modules(ROOT, "launcher"))
    for room, others in above.items():
        for module, needed in graph.items():
            if module.startswith(f"launcher.{room}"):
                assert not [each for each in needed if each.startswith(others)], module


def test_the_library_does_not_import_its_client() -> None:
    for path in sorted((ROOT / "dreambooth_sm").rglob("*.py")):
        assert not {"launcher", "container"} & set(imported(path)), path


@pytest.mark.slow
def test_a_job_begins_before_the_libraries_of_models_are_imported() -> None:
    code = f"import sys, dreambooth_sm.job; print(*[name for name in {LATE} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["no pictures", "no target"])
def test_bad_input_is_told_before_the_libraries_of_models_are_imported(
    fault: str, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "empty" if fault == "no pictures" else pictures
    folder.mkdir(exist_ok=True)
    (tmp_path / "occupied").touch()
    target = {"models_path": str(tmp_path / "occupied" / "model")} if fault == "no target" else {}
    lay_out(
        tmp_path / "opt-ml",
        {"pretrained_model_name_or_path": "owner/model", "instance_prompt": "photo of zwx toy", **target},
        {"images": str(folder)},
    )
    # A line on the standard error for each module, when the job has imported it: what fetches the model is not asked.
    environment = {**os.environ, "SAGEMAKER_BASE_DIR": str(tmp_path / "opt-ml")}
    command = [sys.executable, "-X", "importtime", ENTRYPOINT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == EXIT_BAD_INPUT
    assert "phase=check state=ended" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "dreambooth_sm.job" in loaded
    assert not loaded & {*LATE}


@pytest.mark.parametrize("package", PRODUCTION)
def test_production_needs_nothing_that_stays_in_the_repository(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(path.relative_to(ROOT)): names for path in files if (names := REPOSITORY & set(imported(path)))}
    assert not wrong


def family_names() -> re.Pattern[str]:
    """What a line that is of one family alone has in it: its names, and parts that no other has."""
    words = [r"\bis_xl\b", *(rf"""["']{name}["']""" for name in FAMILIES)]
    shared = set(FAMILIES[DEFAULT].facts.parts)
    for facts in (family.facts for family in FAMILIES.values() if family.facts.name != DEFAULT):
        words += map(re.escape, (facts.name, facts.title, facts.short, facts.pipeline))
        words += [rf"""["'.]{part}\b""" for part in {*facts.parts} - shared]
    return re.compile("|".join(words), re.IGNORECASE)


def test_a_family_is_named_in_its_own_file() -> None:
    """And where model files are read and written; to all other code, families are alike."""
    named = family_names()
    for line in ('if family == "sd":', "xl = model.is_xl", "# of SDXL", "base.text_encoder_2", "Stable Diffusion XL"):
        assert named.search(line), line
    assert not named.search("base.text_encoder, sdk, Stable Diffusion")
    rooms = tuple(ROOT / "dreambooth_sm" / room for room in ("adapters", "families", "stored", "toybox"))
    for path in sorted(path for package in PRODUCTION for path in (ROOT / package).rglob("*.py")):
        if not any(path.is_relative_to(room) for room in rooms):
            lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
            assert not [f"{path}:{number}: {line}" for number, line in lines if named.search(line)]


def test_a_method_is_named_in_its_own_file() -> None:
    """And where it is chosen, by knobs and by families' facts; the default one elsewhere as well."""
    others = METHODS.keys() - {Hyperparameters.model_fields["method"].default}
    assert others
    rooms = tuple(ROOT / "dreambooth_sm" / room for room in ("methods", "knobs", "families"))
    for path in sorted(path for package in PRODUCTION for path in (ROOT / package).rglob("*.py")):
        if not any(path.is_relative_to(room) for room in rooms):
            tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            assert not others & {node.value for node in tree if isinstance(node, ast.Constant)}, path


def test_what_makes_the_base_model_needs_no_test_and_no_benchmark() -> None:
    for path in sorted((ROOT / "toybox").rglob("*.py")):
        assert not {"tests", "benchmarks", "launcher", "container"} & set(imported(path)), path


# What is longer, and why.
LONG = {"dreambooth_sm/training/adamw_blockwise.py": "one optimizer and its state, which every method of it changes"}


def test_files_are_short_enough_to_be_read_at_once() -> None:
    files = [path for package in (*PRODUCTION, "toybox") for path in (ROOT / package).rglob("*.py")]
    long = {path.relative_to(ROOT).as_posix() for path in files if len(path.read_text("utf-8").splitlines()) > 500}
    assert long == set(LONG)


def test_the_image_holds_production_alone() -> None:
    taken = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert not REPOSITORY & {path.partition("/")[0] for path in taken}
    copied = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    assert not REPOSITORY & {word.strip("/") for words in copied for word in words}


def test_the_wheel_has_every_package_of_production() -> None:
    """Of what is installed; ``container`` goes into the image alone."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ("dreambooth_sm", "launcher")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert set(settings["tool"]["setuptools"]["packages"]) == there


def test_the_wheel_has_what_lies_beside_the_code() -> None:
    """The measured figures, the base model and its pictures ..."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for package, patterns in settings["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / package
        there = {path for path in folder.rglob("[!.]*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        taken = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
        assert there <= taken, package
