"""An endpoint on SageMaker, or on the embedded one, after it was asked for."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Self

from dreambooth_sm.errors import UserError
from dreambooth_sm.printing import redact
from dreambooth_sm.storage import S3Uri, get_object, put_object
from launcher.aws.account import Account
from launcher.aws.clients import Clients
from launcher.aws.service_errors import Kind, ServiceError, asking
from launcher.endpoints.endpoint import Endpoint, EndpointFailed
from launcher.endpoints.local_files import send
from launcher.endpoints.made import HostedPart, is_owned, make, owned, remove, tags_of, variant_of
from launcher.endpoints.models import Served, served_of
from launcher.endpoints.prepare import prepare_endpoint
from launcher.endpoints.requests import OWNER_TAG, arguments_of
from launcher.endpoints.scaling import scale, scaling_of, stop_scaling
from launcher.jobs.logs import LogReader

# Seconds between two looks at an endpoint: of AWS, and of this machine.
_POLL, _POLL_LOCAL = 10.0, 0.1
_ON_THE_WAY = ("Creating", "Updating", "SystemUpdating", "RollingBack")
# Seconds that an answer by way of S3 is waited for: a start from zero instances, and the longest invocation.
_PATIENCE = 3600.0
_LAST_LINES = 12


class HostedEndpoint(Endpoint):
    """An endpoint of an account, by its name.

    Args:
        clients: of SageMaker and the services around it; default: those of the standard AWS settings.
        say: gets a line about what is done; default: printed.
    """

    def __init__(self, name: str, clients: Clients | None = None, say: Callable[[str], None] = print) -> None:
        self.name = name
        self._clients, self._say = clients or Clients(), say

    def __repr__(self) -> str:
        return f"HostedEndpoint({self.name!r})"

    # State

    def describe(self) -> dict[str, Any]:
        """SageMaker's own description.

        Raises:
            UserError: this account and region do not have the endpoint.
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        sagemaker = self._clients("sagemaker")
        try:
            return self._endpoint.describe(sagemaker)
        except ServiceError as error:
            if error.kind is Kind.MISSING:
                raise UserError(f"endpoint {self.name!r} was not found in {sagemaker.meta.region_name}") from None
            raise

    @property
    def status(self) -> str:
        """``Creating``, ``Updating``, ``InService``, ``Failed`` and so on, now."""
        return str(self.describe()["EndpointStatus"])

    def wait(self) -> Self:
        while (description := self.describe())["EndpointStatus"] in _ON_THE_WAY:
            time.sleep(_POLL_LOCAL if self._clients.is_local("sagemaker") else _POLL)
        if description["EndpointStatus"] != "InService":
            raise EndpointFailed(self._reason(description))
        return self

    def lines(self) -> list[str]:
        """The lines of its log.

        Raises:
            ServiceError: the log can't be read.
        """
        return self._lines(variant_of(self.name, self._clients("sagemaker")))

    def _lines(self, variant: str) -> list[str]:
        with asking(f"the log of {self.name} can't be read"):
            return LogReader(self._clients("logs"), variant, f"/aws/sagemaker/Endpoints/{self.name}").read()

    def _reason(self, description: Mapping[str, Any], variant: str | None = None) -> str:
        """Why it can't draw; or why a variant that it was to have can't."""
        reason = redact(description.get("FailureReason", description["EndpointStatus"]))
        try:
            lines = (self._lines(variant) if variant else self.lines())[-_LAST_LINES:]
        except ServiceError as error:
            lines = [str(error)]
        return "\n".join([f"{self.name}: {reason}", *(f"  {line}" for line in lines)])

    # Pictures

    def invoke(self, request: Mapping[str, Any]) -> dict[str, Any]:
        body = _body(request)
        if self._output:
            return self._invoke_by_s3(body, self._output)
        with self._answering():
            answer = self._clients("sagemaker-runtime").invoke_endpoint(
                EndpointName=self.name, Body=body, ContentType="application/json", Accept="application/json"
            )
            return dict(json.loads(answer["Body"].read()))

    def invoke_lines(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if self._output:
            raise UserError(f"{self.name} is asked by way of S3, where nothing comes bit by bit; call draw")
        with self._answering():
            answer = self._clients("sagemaker-runtime").invoke_endpoint_with_response_stream(
                EndpointName=self.name,
                Body=_body(request),
                ContentType="application/json",
                Accept="application/jsonlines",
            )
        kept = b""
        with self._answering():
            for event in answer["Body"]:
                *lines, kept = (kept + event.get("PayloadPart", {}).get("Bytes", b"")).split(b"\n")
                yield from map(json.loads, lines)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Says what is wrong where the endpoint does not draw."""
        try:
            with asking(f"{self.name} does not answer"):
                yield
        except ServiceError as error:
            said = getattr(error.__cause__, "response", {})
            if "OriginalStatusCode" not in said:
                raise
            raise _refusal(said["OriginalStatusCode"], said.get("OriginalMessage", "")) from None

    @cached_property
    def _output(self) -> S3Uri | None:
        """Where answers go, of an endpoint that is asked by way of S3."""
        place = self.describe().get("AsyncInferenceConfig", {}).get("OutputConfig", {}).get("S3OutputPath")
        return S3Uri.parse(place) if place else None

    def _invoke_by_s3(self, body: bytes, output: S3Uri) -> dict[str, Any]:
        """Asks by way of S3, and waits for the answer."""
        s3 = self._clients("s3")
        place = output / "requests" / f"{uuid.uuid4()}.json"
        put_object(place, body, client=s3)
        with asking(f"{self.name} takes no request"):
            answer = self._clients("sagemaker-runtime").invoke_endpoint_async(
                EndpointName=self.name,
                InputLocation=str(place),
                ContentType="application/json",
                Accept="application/json",
            )
        until = time.monotonic() + _PATIENCE
        good, bad = S3Uri.parse(answer["OutputLocation"]), answer.get("FailureLocation")
        while time.monotonic() < until:
            if (found := get_object(good, client=s3)) is not None:
                return dict(json.loads(found))
            if bad and (found := get_object(S3Uri.parse(bad), client=s3)) is not None:
                raise _refusal(400, found.decode("utf-8", "replace"))
            time.sleep(_POLL_LOCAL if self._clients.is_local("sagemaker") else 1.0)
        raise EndpointFailed(f"{self.name}: nothing came to {good} in {_PATIENCE:.0f} seconds")

    # Changes

    def update(self, model: Any = None, **changes: Any) -> Self:
        """Serves another model, or the same one otherwise. The old one answers until the new one does; then its model
        and configuration are removed. Autoscaling pauses meanwhile.

        Raises:
            UserError: with everything that is wrong with the changes, before anything is made.
            EndpointFailed: the new one can't draw; the old one still does, and what was made is removed.
        """
        self.__dict__.pop("_output", None)
        self._check_own(self.describe())
        given = self._arguments()
        served = Served(given.pop("model"), given.pop("base_model"), given.pop("adapters"))
        places = {name: changes.pop(name) for name in ("base_model", "adapters") if name in changes}
        served = served_of(model, **places) if model is not None else served.changed(**places)
        scaling = scaling_of(self.name, self._clients)
        account = Account(self._clients)
        prepared = prepare_endpoint(served, account, name=self.name, is_there=True, **{**given, **changes})
        for line in prepared.lines():
            self._say(redact(line))
        send(prepared.files, account, self._say)
        if scaling:
            stop_scaling(self.name, self._clients)
        try:
            self._replace(prepared.requests)
        except Exception:
            if scaling:
                scale(self.name, scaling, self._clients, prepared.tags)
            raise
        if chosen := prepared.scaling or scaling:
            scale(self.name, chosen, self._clients, prepared.tags)
        return self

    def _replace(self, requests: Mapping[str, dict[str, Any]]) -> None:
        """Makes model and configuration, lets the endpoint have them, and removes those that it had."""
        sagemaker = self._clients("sagemaker")
        parts = {operation: request for operation, request in requests.items() if operation != "create_endpoint"}
        configuration = requests["create_endpoint"]["EndpointConfigName"]
        new = [HostedPart(operation.partition("_")[2], configuration) for operation in parts]
        make(parts, sagemaker, self._say)
        try:
            with asking(f"{self.name} was not changed"):
                sagemaker.update_endpoint(EndpointName=self.name, EndpointConfigName=configuration)
        except ServiceError as error:
            remove(new, sagemaker, self._say)
            raise UserError(f"SageMaker refuses the change of {self.name}: {error.reason}") from error
        try:
            self.wait()
        except KeyboardInterrupt:
            self._say(f"{self.name} goes on changing; `dreambooth-launcher undeploy {self.name}` removes all of it")
            raise
        description = self.describe()
        if description["EndpointConfigName"] != configuration:
            remove(new, sagemaker, self._say)
            variant = requests["create_endpoint_config"]["ProductionVariants"][0]["VariantName"]
            raise EndpointFailed(f"{self._reason(description, variant)}\nwhat was served before still is")
        remove([each for each in owned(self.name, sagemaker) if each not in new], sagemaker, self._say)

    def delete(self) -> None:
        """Removes the endpoint, its configuration and its model, if :func:`launcher.deploy` made them; nothing else.

        Raises:
            UserError: it is another's, or is not there.
            EndpointFailed: something is left; the lines before say what, and how to remove it.
        """
        sagemaker = self._clients("sagemaker")
        things = owned(self.name, sagemaker)
        if self._endpoint.is_there(sagemaker):
            self._check_own(self.describe())
            self._stop_scaling()
            things.insert(0, self._endpoint)
        if not things:
            raise UserError(f"endpoint {self.name!r} was not found in {sagemaker.meta.region_name}")
        if not remove(things, sagemaker, self._say):
            raise EndpointFailed(f"{self.name}: not all of it could be removed")

    @property
    def _endpoint(self) -> HostedPart:
        return HostedPart("endpoint", self.name)

    def _arguments(self) -> dict[str, Any]:
        """What it was made with."""
        sagemaker = self._clients("sagemaker")
        configuration = HostedPart("endpoint_config", self.describe()["EndpointConfigName"]).describe(sagemaker)
        model = HostedPart("model", configuration["ProductionVariants"][0]["ModelName"]).describe(sagemaker)
        tags = tags_of(self.describe()["EndpointArn"], sagemaker)
        del tags[OWNER_TAG]
        return {**arguments_of(model, configuration), "tags": tags}

    def _check_own(self, description: Mapping[str, Any]) -> None:
        if not is_owned(description["EndpointArn"], self.name, self._clients("sagemaker")):
            raise UserError(f"the endpoint {self.name!r} was not made by launcher.deploy, and stays as it is")

    def _stop_scaling(self) -> None:
        """Credentials may have no say in autoscaling, where nobody used it."""
        try:
            stop_scaling(self.name, self._clients)
        except ServiceError as error:
            self._say(f"warning: {error}")


def _refusal(status: int, text: str) -> UserError | EndpointFailed:
    """What the server said no with, whose errors are lines in JSON."""
    try:
        problems = json.loads(text[text.find("{") : text.rfind("}") + 1])["errors"]
    except (ValueError, KeyError, TypeError):
        problems = [text or f"the server answered with status {status}"]
    return UserError(problems) if status < 500 else EndpointFailed("\n".join(map(str, problems)))


def _body(request: Mapping[str, Any]) -> bytes:
    return json.dumps({name: value for name, value in request.items() if value is not None}).encode()
