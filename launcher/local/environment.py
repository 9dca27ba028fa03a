"""The environment of a job on this machine: what its request says, what a program needs to run, and none of
the secrets of the process that started the services."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping

# What jobs take over from this process: paths, places, libraries' settings. Nothing that names or holds a secret.
_INHERITED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|TMP|TEMP|TERM|VIRTUAL_ENV|XDG_\w+|SYSTEMROOT"
    r"|PYTHON\w+|(LD|DYLD)_LIBRARY_PATH"
    r"|(CUDA|NVIDIA|NCCL|GLOO|OMP|GOMP|KMP|MKL|OPENBLAS|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|DIFFUSERS|TRANSFORMERS)_\w+"
    r"|HF_(HOME|ENDPOINT|HUB_\w+|XET_\w+|TOKEN_PATH|DEBUG)"
    r"|(HTTP|HTTPS|ALL|NO)_PROXY|(http|https|all|no)_proxy|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE"
)
_SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|CREDENTIALS?|KEY)$")
# What decides which code a program runs: a container is its own world, a process is this machine's.
_LOADER = re.compile(
    r"PATH|HOME|SHELL|IFS|ENV|BASH_ENV|SHELLOPTS|BASHOPTS|GCONV_PATH|GLIBC_TUNABLES|GODEBUG|LOCPATH"
    r"|(LD|DYLD|DOCKER|BUILDKIT)_\w+|SAGEMAKER_BASE_DIR"
    r"|PYTHON(?!(UNBUFFERED|HASHSEED|IOENCODING|UTF8|FAULTHANDLER|DONTWRITEBYTECODE|OPTIMIZE|NODEBUGRANGES)$)\w+"
)
_CREDENTIALS = re.compile(r"AWS_(ACCESS_KEY_ID|SECRET_ACCESS_KEY|SESSION_TOKEN|PROFILE|.*_FILE|CONTAINER_.*|ROLE_ARN)")
_NO_CREDENTIALS = {
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_CONFIG_FILE": os.devnull,
}
# What names accounts of this process's own, beside AWS's.
_TOKENS = re.compile(r"HF_TOKEN|HUGGING_FACE_HUB_TOKEN|WANDB_(API_KEY|BASE_URL|ENTITY|MODE)|MLFLOW_TRACKING_\w+")


def inherited() -> dict[str, str]:
    """Selects what a job gets of this process's environment."""
    return {k: v for k, v in os.environ.items() if _INHERITED.fullmatch(k) and not _SECRET.search(k)}


def loader_variables(names: Iterable[str]) -> Iterator[str]:
    """Those names that decide which code a program runs."""
    return (name for name in names if _LOADER.fullmatch(name))


def isolated(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a job without a network, which gets no credentials either."""
    kept = {k: v for k, v in environment.items() if not _CREDENTIALS.fullmatch(k) and not _TOKENS.fullmatch(k)}
    return {**kept, "HF_HUB_OFFLINE": "1", **_NO_CREDENTIALS}


def own_settings() -> dict[str, str]:
    """This process's AWS settings, hub token and trackers, for jobs that are its own."""
    return {k: v for k, v in os.environ.items() if k.startswith("AWS_")} | own_tokens()


def own_tokens() -> dict[str, str]:
    """This process's hub token and trackers."""
    return {k: v for k, v in os.environ.items() if _TOKENS.fullmatch(k)}


def own_credentials() -> dict[str, str]:
    """This process's AWS settings for a container, which has no files of a profile to read."""
    import boto3.session

    session = boto3.session.Session()
    settings = {k: v for k, v in own_settings().items() if not _CREDENTIALS.fullmatch(k)}
    if session.region_name:
        settings["AWS_DEFAULT_REGION"] = session.region_name
    if credentials := session.get_credentials():
        frozen = credentials.get_frozen_credentials()
        values = (frozen.access_key, frozen.secret_key, frozen.token)
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        settings |= {name: value for name, value in zip(names, values, strict=True) if value}
    return settings
