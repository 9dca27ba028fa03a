"""From arguments to an endpoint on SageMaker: checked as far as it can be before anything is made."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS
from dreambooth_sm.planning.serving import ServingPlan, pictures_at_a_time, serving_peak_gb, serving_plan, why_none
from dreambooth_sm.serving.report import REPORT, trained_with
from dreambooth_sm.serving.settings import ServingSettings
from dreambooth_sm.sources import is_local, is_s3
from dreambooth_sm.storage import S3Uri, TransferError, get_object, list_objects
from launcher.aws.account import Account
from launcher.aws.clients import Clients
from launcher.aws.service_errors import Kind, ServiceError
from launcher.endpoints.local_files import LocalFiles, find_local_files
from launcher.endpoints.made import HostedPart
from launcher.endpoints.models import Served
from launcher.endpoints.requests import endpoint_requests, not_in_s3
from launcher.endpoints.scaling import Scaling
from launcher.instances import INSTANCES, PRICES, Instance, find_instance
from launcher.resources import WORKSPACE

AUTO = "auto"
# What a request holds where the account had no answer.
_STANDINS = {"role": "arn:aws:iam::000000000000:role/unknown", "image_uri": "unknown"}
# Requests that one instance is to have: a minute, or waiting.
_TARGETS = {False: 20.0, True: 4.0}


@dataclass(frozen=True)
class PreparedEndpoint:
    """An endpoint that has been checked.

    Attributes:
        requests: operations of boto3 to their requests, in their order.
        plan: what its card draws with; None where that is not known.
        files: that go to S3 first; and ``new_bucket``, the bucket that is made for them, where it is missing.
        warnings: what could not be checked.
    """

    name: str
    requests: Mapping[str, dict[str, Any]]
    instance: Instance
    count: int
    scaling: Scaling | None
    plan: ServingPlan | None
    build: str | None = None
    files: tuple[LocalFiles, ...] = ()
    new_bucket: str | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def tags(self) -> list[dict[str, str]]:
        """Those of all that is made."""
        return list(self.requests["create_endpoint"]["Tags"])

    def lines(self) -> list[str]:
        """Tells people what will be made."""
        price, card = self.instance.usd_per_hour, self.instance.card
        least, most = (self.scaling.least, self.scaling.most) if self.scaling else (self.count, self.count)
        number = str(least) if least == most else f"{least} to {most}"
        money = "at an unknown price" if price is None else _dollars(price, least, most)
        lines = [f"endpoint: {self.name}"]
        if self.build:
            lines.append(f"image: {self.build}")
        lines.append(f"instance: {number} x {self.instance.name} ({card.name})")
        if self.plan:
            memory = f"{self.plan.peak_gb:.1f} of {card.budget_gb:.1f} GB"
            lines.append(f"plan: {self.plan.pictures} pictures at a time, {memory}")
            lines += [f"plan: {note}" for note in self.plan.notes()]
        lines.append(f"cost: {money}, until it is deleted")
        if self.new_bucket:
            lines.append(f"bucket: {self.new_bucket} is missing; it is made")
        lines += [each.line() for each in self.files]
        return [*lines, *(f"warning: {warning}" for warning in self.warnings)]


def _dollars(price: float, least: int, most: int) -> str:
    amounts = [f"${price * count:.2f}" for count in dict.fromkeys((least, most))]
    return f"about {' to '.join(amounts)} an hour (prices of training: {PRICES})"


def prepare_endpoint(
    served: Served,
    account: Account,
    *,
    name: str | None = None,
    instance_type: str = AUTO,
    instance_count: int = 1,
    role: str | None = None,
    image_uri: str | None = None,
    asynchronous: str | None = None,
    network_isolation: bool = False,
    min_instances: int | None = None,
    max_instances: int | None = None,
    requests_per_instance: float | None = None,
    bucket: str | None = None,
    is_there: bool = False,
    tags: Mapping[str, str] | None = None,
    **settings: Any,
) -> PreparedEndpoint:
    """Checks everything that can be checked of an endpoint on SageMaker.

    Args:
        bucket: that what lies on this machine goes to; None: the one that SageMaker's SDKs use.
        is_there: whether the endpoint is there, and gets another version.

    Raises:
        UserError: with everything that was found.
    """
    problems = Problems()
    clients = account.clients
    served, files = find_local_files(served, account, bucket, problems)
    h = look_at(served, clients, problems, files)
    scaling: Scaling | None = None
    if (min_instances, max_instances, requests_per_instance) != (None, None, None):
        with problems.collected():
            target = _TARGETS[asynchronous is not None] if requests_per_instance is None else requests_per_instance
            least = 1 if min_instances is None else min_instances
            most = max(1, least, instance_count) if max_instances is None else max_instances
            scaling = Scaling(least, most, target, asynchronous is not None)
    instance: Instance | None = None
    # What is served is not there: that says it all, where its card follows from it.
    if not (h is None and problems.found and instance_type == AUTO):
        with problems.collected():
            instance = _choose(h, instance_type, _batch(settings))
    found = {"role": _STANDINS["role"], "image_uri": _STANDINS["image_uri"]}
    with problems.collected():
        found["role"] = account.find_role() if role is None else account.complete_role(role)
    with problems.collected():
        found["image_uri"] = account.find_image() if image_uri is None else account.complete_image(image_uri)
    name = name or f"dreambooth-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    requests: dict[str, dict[str, Any]] = {}
    with problems.collected():
        requests = endpoint_requests(
            name,
            served.model,
            instance_type=instance.name if instance else next(iter(INSTANCES)),
            instance_count=max(instance_count, 1 if scaling is None else scaling.least),
            base_model=served.base_model,
            adapters=served.adapters,
            asynchronous=asynchronous,
            network_isolation=network_isolation,
            version=secrets.token_hex(4),
            tags=tags,
            **found,
            **settings,
        )
    if requests and not is_there:
        with problems.collected():
            _check_free(name, clients, account)
    if instance and not _STANDINS.items() & found.items():
        with problems.collected():
            written = [S3Uri(each.place.bucket, WORKSPACE) for each in files] + (
                [S3Uri.parse(asynchronous)] if asynchronous else []
            )
            most = scaling.most if scaling else instance_count
            account.check_endpoint(found["image_uri"], found["role"], instance.name, most, written)
    problems.raise_any()
    assert instance is not None
    plan = None
    if h is not None and not instance.card.is_cpu:
        plan = serving_plan(h, instance.card, _batch(settings))
    warnings = list(account.warnings)
    if h is None:
        warnings.append(f"model: {REPORT} is missing, so whether it fits the card can't be checked")
    return PreparedEndpoint(
        name,
        requests,
        instance,
        instance_count,
        scaling,
        plan,
        account.build,
        files,
        account.missing_bucket,
        tuple(warnings),
    )


def _batch(settings: Mapping[str, object]) -> int:
    """Pictures that the server draws at a time; the default where the setting is refused elsewhere."""
    try:
        return ServingSettings.of({"SERVE_BATCH": str(settings["batch"])}).batch
    except (KeyError, UserError):
        return ServingSettings().batch


def look_at(
    served: Served, clients: Clients, problems: Problems, files: Sequence[LocalFiles] = ()
) -> Hyperparameters | None:
    """What the model was trained with, by its report; None where that can't be known.

    Args:
        files: that are not sent yet.
    """
    h: Hyperparameters | None = None
    unsent = {str(each.place): each for each in files}
    for field_, place in (("model", served.model), ("base_model", served.base_model), ("adapters", served.adapters)):
        if place is None:
            continue
        if not is_s3(place):
            if field_ != "base_model" or is_local(place):  # not the hub's
                problems.found.append(not_in_s3(field_, place))
            continue
        with problems.collected():
            sent = unsent.get(place)
            found = trained_with(sent.report()) if sent else _read(field_, S3Uri.parse(place), clients)
            h = h or found
    if h is not None and served.base_model is None and METHODS[h.method].leaves_base:
        base = h.pretrained_model_name_or_path
        if base and is_local(base):
            problems.found.append(
                "base_model is missing: what was trained lies beside a model that the endpoint does not have "
                f"({base}); name its directory, s3:// prefix or hub id"
            )
    return h


def _read(field_: str, place: S3Uri, clients: Clients) -> Hyperparameters | None:
    """The hyperparameters of the job that left what lies there, or of the first of several."""
    s3 = clients("s3")
    try:
        names = list_objects(place, client=s3)
        if not names:
            raise UserError(f"{field_}: there is nothing below {place}")
        reports = sorted((name.count("/"), name) for name in names if f"/{name}".endswith(f"/{REPORT}"))
        body = get_object(place / reports[0][1], client=s3) if reports else None
        report = json.loads(body or b"{}")
    except TransferError as error:
        raise UserError(f"{field_}: {place} can't be looked at ({error})") from None
    except ValueError:
        return None
    return trained_with(report) if isinstance(report, dict) else None


def _choose(h: Hyperparameters | None, instance_type: str, batch: int) -> Instance:
    """The instance type that was asked for, or the cheapest that the model fits.

    Raises:
        UserError: it does not fit, with what does.
    """
    priced = sorted((each.usd_per_hour, each.name) for each in INSTANCES.values() if each.usd_per_hour is not None)
    if instance_type != AUTO:
        instance = find_instance(instance_type)
        if h is None or instance.card.is_cpu or pictures_at_a_time(h, instance.card, 1):
            return instance
        fitting = [name for _, name in priced if pictures_at_a_time(h, INSTANCES[name].card, 1)]
        advice = f"; instance_type='auto' takes {fitting[0]}" if fitting else ""
        raise UserError(f"instance_type={instance_type!r}: {why_none(h, instance.card)}{advice}")
    if h is None:
        raise UserError(f"instance_type='auto': {REPORT}, which says what is served, is missing; name an instance type")
    for _, name in priced:
        if pictures_at_a_time(h, INSTANCES[name].card, batch) == batch:
            return INSTANCES[name]
    fitting = [name for _, name in priced if pictures_at_a_time(h, INSTANCES[name].card, 1)]
    if not fitting:
        raise UserError(f"instance_type='auto': a picture takes {serving_peak_gb(1, h):.1f} GB, more than any card has")
    return INSTANCES[fitting[0]]


def _check_free(name: str, clients: Clients, account: Account) -> None:
    """Raises UserError where the name is taken."""
    try:
        taken = HostedPart("endpoint", name).is_there(clients("sagemaker"))
    except ServiceError as error:
        if error.kind is Kind.CREDENTIALS:
            raise UserError(str(error)) from None
        account.warnings.append(f"name: whether {name} is free can't be checked: {error.reason}")
        return
    if taken:
        raise UserError(
            f"name: there is an endpoint {name!r}; choose another name, or change that one: "
            f"launcher.attach_endpoint({name!r}).update(...)"
        )
