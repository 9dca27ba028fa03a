"""``launcher.deploy`` and ``launcher.attach_endpoint``: from trained models to an endpoint that draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.printing import redact
from launcher.aws.account import Account
from launcher.aws.clients import Clients
from launcher.aws.service_errors import ServiceError
from launcher.endpoints.endpoint import Endpoint, EndpointFailed
from launcher.endpoints.hosted import HostedEndpoint
from launcher.endpoints.local_files import send
from launcher.endpoints.made import make
from launcher.endpoints.models import Servable, served_of
from launcher.endpoints.prepare import prepare_endpoint
from launcher.endpoints.requests import arguments_of_container
from launcher.endpoints.scaling import scale
from launcher.local.endpoint import LocalEndpoint
from launcher.registry.packages import ModelPackage, is_package

if TYPE_CHECKING:
    from boto3.session import Session

_LOCAL = "local"
# Arguments that mean something on SageMaker alone.
_HOSTED = (
    "name",
    "instance_count",
    "role",
    "image_uri",
    "asynchronous",
    "network_isolation",
    "bucket",
    "min_instances",
    "max_instances",
    "requests_per_instance",
    "tags",
)


def deploy(
    models: Servable | Sequence[Servable],
    *,
    instance_type: str = _LOCAL,
    base_model: str | Path | None = None,
    adapters: str | Path | None = None,
    wait: bool = True,
    log: Callable[[str], None] | None = None,
    session: Session | None = None,
    clients: Clients | None = None,
    **options: Any,
) -> Endpoint:
    """Makes an endpoint that draws with a trained model, on SageMaker or on this machine.

    On SageMaker image, role, quota, what the model needs of the card, and whether the model is there are checked
    first, every problem at once, and the dollars an hour are said. What lies on this machine then goes to the account's
    bucket, verified, below a name made of its content: what is there already is not sent again. What fails or is
    interrupted while it is made is removed again; what can't be is named, with the command that removes it.

    Args:
        models: a job, the directory that its output lies in, or an ``s3://`` prefix; of several, which are adapters
            that lie below one prefix, requests choose by name. Or the ARN of a model package that is approved.
        instance_type: ``ml.g5.xlarge``, ...; ``auto``: the cheapest whose card draws as many pictures at a time as
            the server may; ``local``: a process of this machine.
        base_model: that an adapter lies beside; default: the one that its job's report names.
        adapters: folder or ``s3://`` prefix with the adapters that requests may name.
        wait: until it can draw.
        log: gets each line of the checks; of this machine, of the server's log. Default: on SageMaker, printed.
        session: boto3's, for credentials and region; default: the standard AWS settings.
        clients: of AWS services; default: those of the session.
        options: for SageMaker, ``name``, ``instance_count``, ``role``, ``image_uri``, ``network_isolation``;
            ``bucket``, which what lies on this machine goes to, by default the one of SageMaker's SDKs;
            ``asynchronous``, an ``s3://`` prefix that answers go to; ``min_instances``, ``max_instances`` and
            ``requests_per_instance`` (a minute; of asynchronous endpoints, waiting), which let their number follow
            what is asked; ``tags``. And settings of the server, without ``SERVE_`` and in small letters, such as
            ``batch=4``.

    Raises:
        UserError: with everything that is in the way, before anything is made.
        EndpointFailed: it can't draw; with the end of its log.

    Examples:
        >>> with deploy("zwx-job/model") as endpoint:  # doctest: +SKIP
        ...     picture = endpoint.draw("photo of zwx toy on the beach")[0]
    """
    clients = clients or Clients(session)
    if is_package(models):
        packaged = arguments_of_container(ModelPackage(str(models), clients).deployable())
        models, base_model = packaged["model"], base_model or packaged["base_model"]
        if instance_type != _LOCAL:
            options.setdefault("image_uri", packaged["image_uri"])
    served = served_of(models, base_model, adapters)
    if instance_type == _LOCAL:
        if wrong := [name for name in _HOSTED if options.get(name) is not None]:
            raise UserError(f"{name} is for SageMaker; leave it out with instance_type='local'" for name in wrong)
        settings = {name: value for name, value in options.items() if name not in _HOSTED}
        return LocalEndpoint(served, settings, log or (lambda line: None))
    say = log or print
    account = Account(clients)
    prepared = prepare_endpoint(served, account, instance_type=instance_type, **options)
    for line in prepared.lines():
        say(redact(line))
    send(prepared.files, account, say)
    make(prepared.requests, clients("sagemaker"), say)
    endpoint = HostedEndpoint(prepared.name, clients, say)
    try:
        if wait or prepared.scaling:  # what is on its way can't be scaled
            endpoint.wait()
        if prepared.scaling:
            scale(prepared.name, prepared.scaling, clients, prepared.tags)
    except BaseException:
        _give_up(endpoint, say)
        raise
    return endpoint


def attach_endpoint(name: str, *, session: Session | None = None, clients: Clients | None = None) -> HostedEndpoint:
    """An endpoint that is there, such as one that another notebook made.

    Args:
        name: of the endpoint.
        session: boto3's, for credentials and region; default: the standard AWS settings.
        clients: of AWS services; default: those of the session.

    Raises:
        UserError: this account and region do not have the endpoint.
    """
    endpoint = HostedEndpoint(name, clients or Clients(session))
    endpoint.describe()
    return endpoint


def _give_up(endpoint: HostedEndpoint, say: Callable[[str], None]) -> None:
    """Removes an endpoint that can't be used; SageMaker keeps one that is on its way until it has come."""
    try:
        endpoint.delete()
    except (UserError, ServiceError, EndpointFailed) as error:
        say(f"left: {redact(str(error))}; `dreambooth-launcher undeploy {endpoint.name}` removes it once it may")
