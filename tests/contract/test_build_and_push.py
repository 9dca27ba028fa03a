"""`build_and_push.sh` against stand-ins for `docker`, `podman`, `aws` and `git` that record how they are called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dreambooth_sm import __version__
from launcher.aws.image_tags import LEFT_OUT, REST, build_digest, code_digest, image_tag
from tests.helpers.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "build_and_push.sh"
TOOLS = ("bash", "cat", "dirname", "grep", "sed", "tail")
REVISION = "0123456789ab"
TAG = image_tag(__version__, REVISION, code_digest(), build_digest())
DIGEST = "sha256:" + "d" * 64
HOSTS = {
    "us-west-2": "123456789012.dkr.ecr.us-west-2.amazonaws.com",
    "cn-north-1": "123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn",
    "us-gov-west-1": "123456789012.dkr.ecr.us-gov-west-1.amazonaws.com",
}

# Each stand-in appends its command line to $CALLS, fails where $FAILS names the command, and else answers.
RECORD = """#!/bin/bash
echo "${0##*/} ${*//$'\\n'/ }" >>"$CALLS"
while IFS='|' read -r command message; do
  [[ $command && "${0##*/} $*" == "$command"* ]] && { printf '\\n%s\\n' "$message" >&2; exit 254; }
done <<<"$FAILS"
"""
AWS = (
    RECORD
    + """case "$1 $2" in
  "configure get") echo "$PROFILE_REGION" ;;
  "sts get-caller-identity") echo 123456789012 ;;
  "ecr describe-repositories" | "ecr create-repository") echo "$HOST/$4" ;;
  "ecr get-login-password") echo the-password ;;
  "ecr describe-images")
    if [[ $IN_ECR ]] || grep -q '^[a-z]* push' "$CALLS"; then
      printf '%s\\t%s\\n' "$DIGEST" "$MEDIA_TYPE"
    else
      echo "An error occurred (ImageNotFoundException): it does not exist" >&2 && exit 254
    fi ;;
  "ecr batch-get-image") printf '{\\n  "schemaVersion": 2\\n}\\n' ;;
esac
"""
)
ENGINE = (
    RECORD
    + """case $1 in
  --version) echo "$ENGINE_VERSION" ;;
  login) read -r password; echo "stdin $password" >>"$CALLS" ;;
  push) echo "pushed by layers" ;;
  build | buildx) echo "$BUILD_LOG" >&2; [[ -z $BUILD_LOG || $2 == version ]] || exit 1 ;;
esac
"""
)
DOCKER_26, DOCKER_20, PODMAN = "Docker version 26.1.5, build a72d7cd", "Docker version 20.10.24", "podman version 4.3.1"
GIT = "#!/bin/bash\necho $GIT_SAYS\n"
PYTHON = f'#!/bin/bash\nexec {sys.executable} "$@"\n'

# How the engine is told to build is asked of its client alone.
LOCAL = ["docker --version", "docker buildx"]
NO_REPOSITORY = "aws ecr describe-repositories|An error occurred (RepositoryNotFoundException): it does not exist"


@dataclass
class Outcome:
    code: int
    out: list[str]
    err: list[str]
    calls: list[str]

    @property
    def build(self) -> str:
        (build,) = (call for call in self.calls if " --tag=" in call)
        return build

    @property
    def verbs(self) -> list[str]:
        """The calls without their options: `docker build`, `aws ecr describe-images`."""
        return [" ".join(call.split()[: 3 if call.startswith("aws") else 2]) for call in self.calls]


class Shell:
    """Runs the script with nothing on PATH but the stand-ins and the few tools that it uses."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.calls = folder / "calls"
        for tool in TOOLS:
            path = shutil.which(tool)
            assert path, f"{tool} is needed to run the script"
            (self.bin / tool).symlink_to(path)
        for name, body in {"aws": AWS, "docker": ENGINE, "git": GIT, "python3": PYTHON}.items():
            self.add(name, body)

    def add(self, name: str, body: str) -> Shell:
        (self.bin / name).write_text(body)
        (self.bin / name).chmod(0o755)
        return self

    def __call__(
        self,
        *options: str,
        region: str = "us-west-2",
        fails: str = "",
        media_type: str = "vnd.docker.distribution.manifest.v2+json",
        version: str = DOCKER_26,
        build_log: str = "",
        in_ecr: bool = False,
        script: Path = SCRIPT,
        **variables: str,
    ) -> Outcome:
        env = {
            "PATH": str(self.bin),
            "CALLS": str(self.calls),
            "FAILS": fails,
            "PROFILE_REGION": region,
            "HOST": HOSTS.get(region, ""),
            "DIGEST": DIGEST,
            "MEDIA_TYPE": f"application/{media_type}",
            "ENGINE_VERSION": version,
            "BUILD_LOG": build_log,
            "IN_ECR": "yes" if in_ecr else "",
            "GIT_SAYS": REVISION,
            **variables,
        }
        done = subprocess.run([str(script), *options], env=env, capture_output=True, text=True, timeout=PATIENCE)
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return Outcome(done.returncode, done.stdout.splitlines(), done.stderr.splitlines(), calls)

    def without(self, tool: str) -> Shell:
        (self.bin / tool).unlink()
        return self


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def assert_failed(outcome: Outcome, reason: str) -> None:
    assert outcome.code != 0
    assert outcome.out == []
    errors = [line for line in outcome.err if line.startswith("build_and_push: error: ")]
    assert len(errors) == 1
    assert errors == outcome.err[-1:], "the reason is the last thing to be read"
    assert reason in errors[0]


def test_first_push_makes_the_repository_and_prints_the_uri(shell: Shell) -> None:
    outcome = shell(fails=NO_REPOSITORY)
    assert outcome.code == 0, outcome.err
    assert outcome.verbs == [
        *LOCAL,
        "docker version",
        "aws configure get",
        "aws sts get-caller-identity",
        "aws ecr describe-repositories",
        "aws ecr create-repository",
        "aws ecr put-lifecycle-policy",
        "aws ecr describe-images",
        "aws ecr get-login-password",
        "docker login",
        "stdin the-password",
        "docker buildx",
        "docker push",
        "aws ecr describe-images",
        "aws ecr batch-get-image",
        *["aws ecr put-image"] * 2,
    ]
    assert outcome.out == [f"{HOSTS['us-west-2']}/dreambooth-sm@{DIGEST}"]
    create = next(call for call in outcome.calls if "create-repository" in call)
    assert "--image-scanning-configuration scanOnPush=true" in create


def test_the_build_is_labelled_and_pushed_with_a_tag_of_its_own(shell: Shell) -> None:
    outcome = shell()
    image = f"{HOSTS['us-west-2']}/dreambooth-sm"
    for expected in (
        "--platform linux/amd64",
        f"--build-arg VERSION={__version__}",
        f"--build-arg REVISION={REVISION}",
        f"--build-arg BUILD={TAG}",
        f"--tag={image}:{TAG}",
    ):
        assert expected in outcome.build
    assert outcome.build.count("--tag=") == 1
    assert [call for call in outcome.calls if " push" in call] == [f"docker push {image}:{TAG}"]
    assert [call for call in outcome.calls if "describe-images" in call][-1].count(f"imageTag={TAG}") == 1


def test_what_the_engine_says_is_shown_and_is_no_output(shell: Shell) -> None:
    outcome = shell()
    assert "pushed by layers" in outcome.err
    assert len(outcome.out) == 1


def test_the_tags_that_move_name_the_build(shell: Shell) -> None:
    calls = [call for call in shell().calls if "put-image" in call]
    for call, tag in zip(calls, (__version__, "latest"), strict=True):
        assert f"--image-tag {tag} --image-digest {DIGEST} --image-manifest {{ " in call


def test_a_build_that_is_there_is_neither_made_nor_pushed(shell: Shell) -> None:
    outcome = shell("--tag", "production", in_ecr=True)
    assert outcome.code == 0, outcome.err
    assert not {"docker login", "docker buildx build", "docker push"} & set(outcome.verbs)
    assert not [call for call in outcome.calls if "--tag=" in call]
    assert outcome.out == [f"{HOSTS['us-west-2']}/dreambooth-sm@{DIGEST}"]
    assert any(f"{TAG} is there already" in line for line in outcome.err)
    assert [call.split()[6] for call in outcome.calls if "put-image" in call] == ["production", "latest"]


IMMUTABLE = (
    "The image tag 'x' already exists in the 'dreambooth-sm' repository and cannot be overwritten because the "
    "{} is immutable."
)


def test_tags_that_may_not_move_stay_and_are_no_failure(shell: Shell) -> None:
    refusal = f"An error occurred (ImageTagAlreadyExistsException): {IMMUTABLE.format('repository')}"
    outcome = shell(fails=f"aws ecr put-image|{refusal}")
    assert outcome.code == 0, outcome.err
    assert outcome.out == [f"{HOSTS['us-west-2']}/dreambooth-sm@{DIGEST}"]
    said = [line for line in outcome.err if "stays with an earlier build" in line]
    assert [line.split()[3] for line in said] == [__version__, "latest"]


def test_a_tag_that_names_the_build_already_is_not_worth_a_word(shell: Shell) -> None:
    outcome = shell(fails="aws ecr put-image|An error occurred (ImageAlreadyExistsException): it does", in_ecr=True)
    assert outcome.code == 0, outcome.err
    assert not [line for line in outcome.err if "the tag" in line]


def test_somebody_else_may_push_the_same_build_first(shell: Shell) -> None:
    outcome = shell(fails=f"docker push|tag invalid: {IMMUTABLE.format('tag')}")
    assert outcome.code == 0, outcome.err
    assert outcome.out == [f"{HOSTS['us-west-2']}/dreambooth-sm@{DIGEST}"]


def tag_of(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome.err
    return outcome.out[-1].split()[4].rstrip(",")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the script reads of a checkout, to change."""
    root = tmp_path / "checkout"
    for name in ("build_and_push.sh", "launcher/aws/image_tags.py", *(name for name in REST if name != "container")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for name in ("container/train.py", "dreambooth_sm/__init__.py", "dreambooth_sm/job.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.mark.parametrize(
    "file",
    [
        "Dockerfile",
        "container/train.py",
        "dreambooth_sm/job.py",
        "dreambooth_sm/new.py",
        "dreambooth_sm/data/new/prior.json",
        "requirements/image.txt",
    ],
)
def test_a_change_that_nobody_committed_is_another_build(shell: Shell, checkout: Path, file: str) -> None:
    """Also one more change, of a tree that is dirty already."""
    script = checkout / "build_and_push.sh"
    (checkout / file).parent.mkdir(parents=True, exist_ok=True)
    tags = [tag_of(shell("--dry-run", script=script))]
    for text in ("\n", "# more\n"):
        with (checkout / file).open("a") as opened:
            opened.write(text)
        tags.append(tag_of(shell("--dry-run", script=script, GIT_SAYS=f"{REVISION}-dirty")))
    assert len(set(tags)) == len(tags)
    assert all(tag.startswith(f"{__version__}-g{REVISION}-") for tag in tags)


@pytest.mark.parametrize("file", ["README.md", "tests/test.py", "dreambooth_sm/__pycache__/job.cpython-311.pyc"])
def test_what_does_not_go_into_the_image_makes_no_other_build(shell: Shell, checkout: Path, file: str) -> None:
    script = checkout / "build_and_push.sh"
    before = tag_of(shell("--dry-run", script=script))
    (checkout / file).parent.mkdir(parents=True, exist_ok=True)
    (checkout / file).write_text("new")
    assert tag_of(shell("--dry-run", script=script, GIT_SAYS=f"{REVISION}-dirty")) == before


@pytest.mark.slow
def test_build_arguments_make_another_build_of_the_same_code(shell: Shell) -> None:
    options: list[list[str]] = [
        [],
        ["--build-arg", "WITH_XFORMERS=1"],
        ["--build-arg", "WITH_XFORMERS=0"],
        ["--build-arg", "WITH_XFORMERS=1", "--build-arg", "WITH_XFORMERS=0"],
        ["--build-arg", "WITH_XFORMERS=0", "--build-arg", "WITH_XFORMERS=1"],
        ["--base-image", "registry/base@sha256:1"],
        ["--base-image", "registry/base@sha256:2"],
    ]
    tags = [tag_of(shell("--dry-run", *each)) for each in options]
    assert len(set(tags)) == len(tags)
    assert {tag.rpartition(".")[0] for tag in tags} == {TAG.rpartition(".")[0]}
    same = (["--build-arg", "https_proxy=http://me:swordfish@proxy"], ["--secret", "id=hf_token,src=/token"])
    assert {tag_of(shell("--dry-run", *each)) for each in same} == {TAG}
    assert tag_of(shell("--dry-run", "--build-arg", "WITH_XFORMERS", WITH_XFORMERS="1")) == tags[1]


def test_outside_of_git_the_digests_are_the_tag(shell: Shell) -> None:
    shell.add("git", "#!/bin/bash\nexit 128\n")
    assert tag_of(shell("--dry-run")) == TAG.replace(f"-g{REVISION}", "")


def test_what_the_builder_is_sent_is_what_the_tag_is_made_of() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line[1:].rstrip("/") for line in lines if line.startswith("!")}
    assert sent == {*REST, "dreambooth_sm"} - {"Dockerfile", ".dockerignore"}
    assert {line.removeprefix("**/") for line in lines if line.startswith("**/")} == LEFT_OUT


def test_the_password_is_on_no_command_line(shell: Shell) -> None:
    outcome = shell()
    assert [call for call in outcome.calls if "the-password" in call] == ["stdin the-password"]
    assert "the-password" not in "\n".join(outcome.err)


def test_an_existing_repository_is_left_as_it_is(shell: Shell) -> None:
    outcome = shell()
    assert outcome.code == 0
    assert not {"aws ecr create-repository", "aws ecr put-lifecycle-policy"} & set(outcome.verbs)


def test_a_second_run_ends_like_the_first(shell: Shell) -> None:
    assert shell().out == shell().out


@pytest.mark.parametrize("region", HOSTS)
def test_each_partition_has_its_own_domain(shell: Shell, region: str) -> None:
    outcome = shell(region=region)
    assert outcome.out == [f"{HOSTS[region]}/dreambooth-sm@{DIGEST}"]
    assert f"docker login --username AWS --password-stdin {HOSTS[region]}" in outcome.calls


def test_options_override_what_is_configured(shell: Shell) -> None:
    options = {
        "--region": "us-west-2",
        "--profile": "studio",
        "--repository": "team/dreambooth",
        "--tag": "candidate",
        "--base-image": "registry/base:1",
        "--build-arg": "WITH_XFORMERS=1",
    }
    outcome = shell(*(word for option in options.items() for word in option))
    assert outcome.out == [f"{HOSTS['us-west-2']}/team/dreambooth@{DIGEST}"]
    assert "aws configure get" not in outcome.verbs
    build = outcome.build
    assert "--build-arg BASE_IMAGE=registry/base:1 --build-arg WITH_XFORMERS=1" in build
    assert [call.split()[6] for call in outcome.calls if "put-image" in call] == ["candidate", "latest"]


def test_a_dry_run_calls_nothing(shell: Shell) -> None:
    outcome = shell("--dry-run", "--region", "eu-west-1", "--repository", "mine")
    assert outcome.code == 0
    assert outcome.verbs == LOCAL
    plan = "\n".join(outcome.out)
    for expected in (
        "'mine' in eu-west-1",
        "docker buildx build",
        "--platform linux/amd64",
        f"push it as {TAG}, unless that is there, and move to it the tags: {__version__} latest",
    ):
        assert expected in plan


def test_help_names_every_option(shell: Shell) -> None:
    outcome = shell("--help")
    assert outcome.code == 0
    assert outcome.calls == []
    assert "--secret" in "\n".join(outcome.out)
    for option in (
        "--dry-run",
        "--engine",
        "--region",
        "--profile",
        "--repository",
        "--tag",
        "--base-image",
        "--build-arg",
    ):
        assert option in "\n".join(outcome.out)


@pytest.mark.parametrize(
    ("engine", "version", "fails", "expected"),
    [
        ("docker", DOCKER_26, "", "docker buildx build --output type=docker,oci-mediatypes=false --platform"),
        ("docker", DOCKER_20, "docker buildx|not a command", "docker build --platform"),
        ("docker", PODMAN, "", "docker build --format docker --platform"),  # the package podman-docker
        ("podman", PODMAN, "", "podman build --format docker --platform"),
    ],
)
def test_each_engine_is_told_to_make_a_docker_manifest(
    shell: Shell, engine: str, version: str, fails: str, expected: str
) -> None:
    outcome = shell.without("docker").add(engine, ENGINE)(version=version, fails=fails)
    assert outcome.code == 0, outcome.err
    assert outcome.build.startswith(expected)
    assert {call.split()[0] for call in outcome.calls if "push" in call or "login" in call} == {engine, "aws"}


def test_the_engine_can_be_named(shell: Shell) -> None:
    outcome = shell.add("podman", ENGINE)("--engine", "podman", version=PODMAN)
    assert outcome.code == 0, outcome.err
    assert not [call for call in outcome.calls if call.startswith("docker")]


def test_a_docker_without_buildkit_is_told_what_to_install(shell: Shell) -> None:
    outcome = shell(fails="docker buildx|docker: 'buildx' is not a docker command.")
    assert_failed(outcome, "install its buildx plugin")
    assert outcome.verbs == LOCAL


@pytest.mark.parametrize(
    "media_type",
    [
        "vnd.oci.image.manifest.v1+json",
        "vnd.oci.image.index.v1+json",
        "vnd.docker.distribution.manifest.list.v2+json",
    ],
)
def test_an_image_that_sagemaker_refuses_is_refused(shell: Shell, media_type: str) -> None:
    assert_failed(shell(media_type=media_type), f"as application/{media_type}, which SageMaker refuses")


def test_a_build_that_sagemaker_refuses_is_made_again(shell: Shell) -> None:
    outcome = shell(media_type="vnd.oci.image.manifest.v1+json", in_ecr=True)
    assert "docker push" in outcome.verbs


def test_a_credential_helper_that_keeps_no_logins_is_no_obstacle(shell: Shell) -> None:
    message = "Error saving credentials: error storing credentials - err: exit status 1, out: `not implemented`"
    outcome = shell(fails=f"docker login|{message}")
    assert outcome.code == 0, outcome.err
    assert outcome.out == [f"{HOSTS['us-west-2']}/dreambooth-sm@{DIGEST}"]
    assert any("logs in by itself" in line for line in outcome.err)


@pytest.mark.parametrize(
    ("argument", "variables"),
    [
        ("PIP_INDEX_URL=https://user:swordfish@mirror.example/simple", {}),
        ("PIP_INDEX_URL=https://swordfish@mirror.example/simple", {}),
        ("APT_MIRROR=http://user:swordfish@mirror.example", {}),
        ("HF_TOKEN=swordfish", {}),
        ("PIP_INDEX_URL", {"PIP_INDEX_URL": "https://user:swordfish@mirror.example/simple"}),
    ],
)
def test_a_password_does_not_get_into_the_images_history(
    shell: Shell, argument: str, variables: dict[str, str]
) -> None:
    outcome = shell("--build-arg", argument, **variables)
    assert_failed(outcome, "--secret id=pip.conf,src=FILE")
    assert "swordfish" not in "\n".join(outcome.err)
    assert outcome.calls == []


def test_mirrors_secrets_and_proxies_reach_the_build(shell: Shell) -> None:
    words = [
        *("--build-arg", "PIP_INDEX_URL=https://mirror.example/simple"),
        *("--build-arg", "PIP_TRUSTED_HOST=mirror.example"),
        *("--build-arg", "APT_MIRROR=http://mirror.example"),
        *("--build-arg", "HTTPS_PROXY=http://user:password@proxy.example:3128"),  # not kept in the history
        *("--secret", "id=pip.conf,src=/home/me/pip.conf"),
    ]
    outcome = shell(*words)
    assert outcome.code == 0, outcome.err
    assert " ".join(words) in outcome.build


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--regoin", "us-west-2"], "unknown option '--regoin'"),
        (["us-west-2"], "unknown option 'us-west-2'"),
        (["--region"], "--region needs a value"),
        (["--build-arg", "a b=c"], "--build-arg takes NAME=VALUE"),
    ],
)
def test_a_wrong_option_is_named(shell: Shell, options: list[str], reason: str) -> None:
    outcome = shell(*options)
    assert_failed(outcome, reason)
    assert outcome.calls == []


@pytest.mark.parametrize("tool", ["docker", "aws", "python3"])
def test_a_missing_tool_is_named(shell: Shell, tool: str) -> None:
    outcome = shell.without(tool)()
    assert_failed(outcome, f"'{tool}' is not installed")
    assert set(outcome.verbs) <= set(LOCAL)


def test_a_region_is_never_guessed(shell: Shell) -> None:
    assert_failed(shell(region=""), "no AWS region")


@pytest.mark.parametrize(
    ("fails", "reason", "last_call"),
    [
        ("docker version|Cannot connect to the Docker daemon", "docker is not running", "docker version"),
        (
            "docker version|permission denied while trying to connect to the socket at unix:///var/run/docker.sock",
            "join the group 'docker'",
            "docker version",
        ),
        (
            "aws sts|An error occurred (ExpiredToken) when calling the GetCallerIdentity operation: it is expired",
            "renew them, with 'aws sso login'",
            "aws sts get-caller-identity",
        ),
        (
            "aws sts|Unable to locate credentials. You can configure credentials by running 'aws configure'.",
            "no valid AWS credentials: Unable to locate credentials",
            "aws sts get-caller-identity",
        ),
        (
            "aws ecr describe-repositories|An error occurred (AccessDeniedException): not authorized",
            "cannot read the ECR repository 'dreambooth-sm': An error occurred (AccessDeniedException)",
            "aws ecr describe-repositories",
        ),
        (
            f"{NO_REPOSITORY}\naws ecr create-repository|An error occurred (AccessDeniedException): not authorized",
            "cannot create the ECR repository 'dreambooth-sm': An error occurred (AccessDeniedException)",
            "aws ecr create-repository",
        ),
        (
            "aws ecr describe-images|An error occurred (AccessDeniedException): not authorized",
            f"cannot look for {HOSTS['us-west-2']}/dreambooth-sm:{TAG}: An error occurred (AccessDeniedException)",
            "aws ecr describe-images",
        ),
        (
            "aws ecr put-image|An error occurred (AccessDeniedException): not authorized",
            f"cannot give the build the tag {__version__}: An error occurred (AccessDeniedException)",
            "aws ecr put-image",
        ),
        ("docker login|Error response: 401 Unauthorized", "cannot log docker in to 1234", "docker login"),
        (
            'docker login|error getting credentials - err: exec: "docker-credential-desktop": not found, out: ``',
            "(credsStore, credHelpers): mend it",
            "docker login",
        ),
        (
            "docker push|denied: not authorized to perform: ecr:InitiateLayerUpload",
            f"dreambooth-sm:{TAG}: denied: not authorized",
            "docker push",
        ),
        ("docker push|denied: Your authorization token has expired.", "'docker logout HOST'", "docker push"),
        ("docker push|write /var/lib/docker: no space left on device", "docker system prune", "docker push"),
    ],
)
def test_a_failure_is_one_line_and_ends_the_run(shell: Shell, fails: str, reason: str, last_call: str) -> None:
    outcome = shell(fails=fails)
    assert_failed(outcome, reason)
    assert outcome.verbs[-1] == last_call


@pytest.mark.parametrize(
    ("log", "advice"),
    [
        ("ERROR: failed to solve: pytorch/pytorch:9: not found", ""),
        ("ERROR: failed to solve: write /var/lib/docker/x: no space left on device\n", "'docker system prune'"),
        ("exec /bin/sh: exec format error\nERROR: failed to solve: exit code: 1", "emulation"),
        ("toomanyrequests: You have reached your pull rate limit.", "--base-image"),
        ("denied: Your authorization token has expired. Reauthenticate and try again.", "docker logout"),
    ],
)
def test_a_failed_build_is_shown_and_ends_in_one_line(shell: Shell, log: str, advice: str) -> None:
    outcome = shell(build_log=log)
    assert_failed(outcome, "the build failed; its own messages are above")
    assert advice in outcome.err[-1]
    assert set(log.splitlines()) < set(outcome.err)
    assert outcome.verbs[-1] == "docker buildx"


@pytest.mark.parametrize(
    ("linter", "file"),
    [
        ("shellcheck", SCRIPT),
        ("shellcheck", ROOT / "tests/cuda_base.sh"),
        ("shellcheck", ROOT / ".ci/run"),
        ("hadolint", ROOT / "Dockerfile"),
    ],
)
def test_the_linters_have_nothing_to_say(linter: str, file: Path) -> None:
    # The virtual environment's own linters come first; it need not be activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    executable = shutil.which(linter, path=path)
    assert executable, f"{linter} belongs to the dev extra"
    done = subprocess.run([executable, str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def pins(name: str) -> dict[str, str]:
    """Versions by package, of a file of requirements."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    found = [line.removesuffix(" \\").split("==") for line in lines if "==" in line and not line.startswith("#")]
    return dict(found)


def test_the_images_pins_satisfy_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = pins("image.in")
    assert "torch" not in pinned, "torch comes with the base image"
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["train"], *extras["serve"]]:
        needed = Requirement(text)
        assert needed.name == "torch" or needed.specifier.contains(pinned.get(needed.name, "0"))


@pytest.mark.parametrize("name", ["image", "bitsandbytes", "xformers"])
def test_the_lock_is_of_these_pins_and_names_no_index(name: str) -> None:
    lock = (ROOT / "requirements" / f"{name}.txt").read_text()
    assert pins(f"{name}.txt") == pins(f"{name}.in"), "run `make lock`"
    assert all("--hash=sha256:" in entry for entry in lock.split("==")[1:])
    assert "://" not in lock
