"""Which image in ECR belongs to this code, asked of an ECR that answers what a test says."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber

import dreambooth_sm
from dreambooth_sm import __version__
from dreambooth_sm.errors import EXIT_BAD_INPUT, UserError
from dreambooth_sm.report import Reporter
from launcher.aws.account import Account
from launcher.aws.clients import Clients
from launcher.aws.image_tags import code_digest, image_tag, is_of_code
from tests.helpers.training import hyperparameters

ROOT = Path(__file__).resolve().parents[2]
HOST = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
CODE = code_digest()
OTHER = "0123456789ab"


class Ecr(Clients):
    """An account's ECR, and nothing else; of SageMaker's client only the region is read."""

    def __init__(self, client: Any, stub: Stubber) -> None:
        super().__init__()
        self._clients = {"ecr": client, "sagemaker": client}
        self.stub = stub
        self._page = ""

    def has_repository(self) -> Ecr:
        answer = {"repositories": [{"repositoryUri": f"{HOST}/dreambooth-sm"}]}
        self.stub.add_response("describe_repositories", answer, {"repositoryNames": ["dreambooth-sm"]})
        return self

    def has(
        self, *images: dict[str, Any], repository: str = "dreambooth-sm", registry: str = "123456789012", then: str = ""
    ) -> Ecr:
        """A page of images, and whether another one follows it."""
        asked = {"registryId": registry, "repositoryName": repository, "filter": {"tagStatus": "TAGGED"}}
        if self._page:
            asked["nextToken"] = self._page
        answer = {"imageDetails": list(images), **({"nextToken": then} if then else {})}
        self.stub.add_response("describe_images", answer, asked)
        self._page = then
        return self

    def refuses(self, operation: str, code: str) -> Ecr:
        self.stub.add_client_error(operation, code, f"{code} it is", 400)
        return self


@pytest.fixture(scope="module")
def client() -> Any:
    return boto3.Session("key", "secret", region_name="eu-west-1").client("ecr")


@pytest.fixture
def ecr(client: Any) -> Iterator[Ecr]:
    with Stubber(client) as stub:
        yield Ecr(client, stub)
        stub.assert_no_pending_responses()


def image(day: int, *tags: str) -> dict[str, Any]:
    return {"imagePushedAt": datetime(2026, 11, day, tzinfo=UTC), "imageTags": [*tags], "imageDigest": digest(day)}


def digest(day: int) -> str:
    return f"sha256:{day:064x}"


def of(code: str, build: str = "9a8b7c6d", revision: str = "4b204ea1c2d3") -> str:
    return image_tag(__version__, revision, code, build)


def test_the_last_build_of_this_code_is_found_among_others(ecr: Ecr) -> None:
    ecr.has_repository()
    ecr.has(image(7, of(OTHER), "latest"), image(3, of(CODE)), then="more")
    ecr.has(image(5, "old", of(CODE, "00000000", revision="")), image(4, of(CODE, "11111111")), image(8))
    account = Account(ecr)
    assert account.find_image() == f"{HOST}/dreambooth-sm@{digest(5)}"
    assert account.build == of(CODE, "00000000", revision="")


@pytest.mark.parametrize(
    "tag",
    ["latest", __version__, CODE, f"{__version__}-{CODE}", f"{__version__}-{CODE}.9a8b7c6d-dirty", f"{OTHER}.{CODE}"],
)
def test_a_tag_that_may_move_is_no_proof_of_the_code(tag: str, ecr: Ecr) -> None:
    assert not is_of_code(tag, CODE)
    with pytest.raises(UserError, match="holds no build of this code"):
        Account(ecr.has_repository().has(image(1, tag))).find_image()


def test_without_a_build_of_this_code_those_that_are_there_are_named(ecr: Ecr) -> None:
    images = [image(day, of(OTHER, f"{day:08}"), "latest") for day in range(1, 6)]
    with pytest.raises(UserError) as caught:
        Account(ecr.has_repository().has(*images)).find_image()
    assert str(caught.value) == (
        f"image_uri: {HOST}/dreambooth-sm holds no build of this code ({__version__}, code {CODE}), but "
        f"{of(OTHER, '00000005')} of 2026-11-05 00:00, {of(OTHER, '00000004')} of 2026-11-04 00:00, "
        f"{of(OTHER, '00000003')} of 2026-11-03 00:00 and 2 more; run `./build_and_push.sh --region eu-west-1`, or "
        f"set image_uri='{HOST}/dreambooth-sm:TAG' to run another one"
    )


def test_an_empty_repository_and_none(ecr: Ecr) -> None:
    with pytest.raises(UserError, match=rf"holds no build of this code \({__version__}, code {CODE}\); run `"):
        Account(ecr.has_repository().has()).find_image()
    with pytest.raises(
        UserError, match=r"'dreambooth-sm' is in ECR .* run `./build_and_push.sh --region eu-west-1` on"
    ):
        Account(ecr.refuses("describe_repositories", "RepositoryNotFoundException")).find_image()


@pytest.mark.parametrize("operation", ["describe_repositories", "describe_images"])
def test_without_the_right_to_look_the_message_says_what_to_set(operation: str, ecr: Ecr) -> None:
    if operation == "describe_images":
        ecr.has_repository()
    ecr.refuses(operation, "AccessDeniedException")
    with pytest.raises(UserError) as caught:
        Account(ecr).find_image()
    for words in ("can be looked for", "ecr:DescribeRepositories and ecr:DescribeImages", "or set image_uri='"):
        assert words in str(caught.value)
    assert "build_and_push" not in str(caught.value), "the image may well be there"


def test_credentials_that_have_expired_are_to_be_renewed(ecr: Ecr) -> None:
    with pytest.raises(UserError, match=r"renew your credentials .* or set image_uri="):
        Account(ecr.refuses("describe_repositories", "ExpiredTokenException")).find_image()


def test_a_repository_of_another_name_or_account_stands_for_its_build_of_this_code(ecr: Ecr) -> None:
    ecr.has(image(2, of(CODE)), repository="team/toys", registry="210987654321")
    uri = f"{HOST.replace('123456789012', '210987654321')}/team/toys"
    assert Account(ecr).complete_image(uri) == f"{uri}@{digest(2)}"
    with pytest.raises(UserError, match="--region eu-west-1 --repository team/toys`"):
        Account(ecr.has(image(2, of(OTHER)), repository="team/toys")).complete_image(f"{HOST}/team/toys")


@pytest.mark.parametrize(
    "uri",
    [
        f"{HOST}/dreambooth-sm:latest",
        f"{HOST}/dreambooth-sm@{digest(1)}",
        f"{HOST.replace('eu-west-1', 'us-east-1')}/dreambooth-sm",  # in another region: an error of its own
        "public.ecr.aws/team/toys",
        "dreambooth-sm",
    ],
)
def test_an_image_that_is_named_stays_as_it_is(uri: str, ecr: Ecr) -> None:
    account = Account(ecr)
    assert account.complete_image(uri) == uri
    assert account.build is None


def test_the_code_is_that_of_the_package_wherever_it_lies(tmp_path: Path) -> None:
    package = Path(dreambooth_sm.__file__).parent
    installed = tmp_path / "site-packages" / "dreambooth_sm"
    for path in package.rglob("*"):
        if path.is_file():
            (installed / path.relative_to(package)).parent.mkdir(parents=True, exist_ok=True)
            (installed / path.relative_to(package)).write_bytes(path.read_bytes())
    assert code_digest(installed) == CODE == code_digest(package)
    (installed / "__pycache__").mkdir(exist_ok=True)
    (installed / "__pycache__" / "new.pyc").write_text("new")
    code_digest.cache_clear()
    assert code_digest(installed) == CODE
    (installed / "job.py").rename(installed / "work.py")
    code_digest.cache_clear()
    assert code_digest(installed) != CODE


@pytest.mark.slow
@pytest.mark.parametrize("build", ["0.1.0-g4b204ea1c2d3-1f2e3d4c5b6a.9a8b7c6d", ""])
@pytest.mark.parametrize("word", ["train", "serve"])
def test_a_container_says_first_which_build_it_is_of(word: str, build: str) -> None:
    command = [sys.executable, str(ROOT / "container" / "train.py"), word]
    environment = {**os.environ, "DREAMBOOTH_SM_BUILD": build, "SAGEMAKER_BASE_DIR": "/nowhere"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == EXIT_BAD_INPUT, done.stderr
    first, *others = done.stdout.splitlines() or [""]
    assert (first == f"image: {build}") == bool(build)
    assert not any(line.startswith("image:") for line in others)


def test_the_report_names_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dreambooth_sm import results
    from dreambooth_sm.planning.cards import CPU
    from dreambooth_sm.planning.choice import make_plan

    monkeypatch.setattr(results, "__build__", of(CODE))
    h = hyperparameters()
    facts = results.gather_facts("base", [], h, make_plan(h, CPU), Reporter(io.StringIO()), 0, tmp_path)
    assert facts["versions"]["image"] == of(CODE)


def test_the_image_is_told_its_tag_by_the_name_that_the_job_reads() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert {'ARG BUILD=""', "ENV DREAMBOOTH_SM_BUILD=${BUILD}"} <= {*lines}


def test_the_tags_are_made_by_an_older_python_without_the_project() -> None:
    source = (ROOT / "launcher" / "aws" / "image_tags.py").read_text()
    tree = ast.parse(source, feature_version=(3, 7))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names
