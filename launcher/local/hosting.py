"""Hosting of the embedded SageMaker: models, configurations, and endpoints that really draw on this machine."""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dreambooth_sm.storage import S3Uri, get_object, put_object
from launcher.local.answers import ACCOUNT, Operation, RequestError, arn_of
from launcher.local.clients import EmbeddedClients
from launcher.local.environment import loader_variables
from launcher.local.event_stream import payload_part
from launcher.local.hosted_server import HostedServer, Invoked
from launcher.local.s3 import EmbeddedS3
from launcher.local.signatures import REGION_KEY

# Each kind as operations call it: in ARNs, and in messages.
_KINDS = {
    "Model": ("model", "model"),
    "EndpointConfig": ("endpoint-config", "endpoint configuration"),
    "Endpoint": ("endpoint", "endpoint"),
}
_INVOCATION = re.compile(
    r"/endpoints/(?P<name>[^/]+)/(?P<way>invocations|invocations-response-stream|async-invocations)"
)
_VARIANT = "x-Amzn-Invoked-Production-Variant"
# What clients say to the server beside the types of bodies.
_PASSED = "HTTP_X_AMZN_SAGEMAKER_"


class EmbeddedHosting:
    """Models, configurations and endpoints, each of the region that its request is signed for.

    Args:
        directory: that servers read models in.
        server: that models lie on, and logs.
        with_s3: False takes the S3 of the standard AWS settings.
        environment: of servers of a region.
        tags: of everything, by ARN.
    """

    def __init__(
        self,
        directory: Path,
        server: EmbeddedS3,
        *,
        with_s3: bool,
        environment: Callable[[str], Mapping[str, str]],
        tags: dict[str, dict[str, str]],
    ) -> None:
        self._directory, self._server, self._with_s3 = directory, server, with_s3
        self._environment, self._tags = environment, tags
        self._made: dict[str, dict[str, Any]] = {}
        self._endpoints: dict[str, HostedServer] = {}
        self._lock = threading.Lock()
        self.operations: dict[str, Operation] = {}
        for kind in _KINDS:
            self._offer(kind)
        self.operations["UpdateEndpoint"] = self._update

    def _offer(self, kind: str) -> None:
        self.operations |= {
            f"Create{kind}": lambda request, region: self._create(kind, request, region),
            f"Describe{kind}": lambda request, region: self._describe(kind, request[f"{kind}Name"], region),
            f"Delete{kind}": lambda request, region: self._delete(kind, request, region),
            f"List{kind}s": lambda request, region: self._list(kind, request, region),
        }

    # SageMaker

    def _create(self, kind: str, request: dict[str, Any], region: str) -> dict[str, Any]:
        arn = self._arn(kind, request[f"{kind}Name"], region)
        if kind == "Model":
            _check_model(request)
        elif kind == "EndpointConfig":
            for variant in request["ProductionVariants"]:
                self._describe("Model", variant["ModelName"], region)
        else:
            self._parts(request["EndpointConfigName"], region)
        with self._lock:
            if arn in self._made:
                raise RequestError(f'Cannot create already existing {_KINDS[kind][1]} "{arn}".')
            now = time.time()
            kept = {name: value for name, value in request.items() if name != "Tags"}
            self._made[arn] = {**kept, f"{kind}Arn": arn, "CreationTime": now, "LastModifiedTime": now}
            self._tags[arn] = {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])}
            if kind == "Endpoint":
                clients = EmbeddedClients(self._server, with_s3=self._with_s3, region=region)
                place = self._directory / region / uuid.uuid4().hex
                self._endpoints[arn] = HostedServer(request["EndpointName"], place, clients, self._environment(region))
        if kind == "Endpoint":
            self._endpoints[arn].serve(*self._parts(request["EndpointConfigName"], region))
        return {f"{kind}Arn": arn}

    def _describe(self, kind: str, name: str, region: str) -> dict[str, Any]:
        arn = self._arn(kind, name, region)
        if arn not in self._made:
            raise RequestError(f'Could not find {_KINDS[kind][1]} "{arn}".')
        found = dict(self._made[arn])
        if kind != "Endpoint":
            found.pop("LastModifiedTime")
            return found
        return {**found, **self._endpoints[arn].describe()}

    def _delete(self, kind: str, request: dict[str, Any], region: str) -> dict[str, Any]:
        arn = self._describe(kind, request[f"{kind}Name"], region)[f"{kind}Arn"]
        if kind == "Endpoint":
            self._at_rest(arn).end()
            del self._endpoints[arn]
        self._made.pop(arn, None)
        self._tags.pop(arn, None)
        return {}

    def _list(self, kind: str, request: dict[str, Any], region: str) -> dict[str, Any]:
        start = self._arn(kind, "", region)
        names = [f"{kind}Name", f"{kind}Arn", "CreationTime"]
        names += ["LastModifiedTime", "EndpointStatus"] if kind == "Endpoint" else []
        found = [
            self._describe(kind, each[f"{kind}Name"], region)
            for arn, each in list(self._made.items())
            if arn.startswith(start) and request.get("NameContains", "") in each[f"{kind}Name"]
        ]
        return {f"{kind}s": [{name: each[name] for name in names} for each in found]}

    def _update(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        arn = self._describe("Endpoint", request["EndpointName"], region)["EndpointArn"]
        configuration, model = self._parts(request["EndpointConfigName"], region)
        self._at_rest(arn).serve(configuration, model)
        self._made[arn]["LastModifiedTime"] = time.time()
        return {"EndpointArn": arn}

    def _at_rest(self, arn: str) -> HostedServer:
        if self._endpoints[arn].is_changing:
            raise RequestError(f'Cannot update in-progress endpoint "{arn}".')
        return self._endpoints[arn]

    def _parts(self, configuration: str, region: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """A configuration and its model."""
        found = self._describe("EndpointConfig", configuration, region)
        return found, self._describe("Model", found["ProductionVariants"][0]["ModelName"], region)

    @staticmethod
    def _arn(kind: str, name: str, region: str) -> str:
        return arn_of(_KINDS[kind][0], name, region)

    # SageMaker Runtime

    def invoked(self, environ: Mapping[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes] | None:
        """Answers a WSGI request to an endpoint; None for any other."""
        asked = _INVOCATION.fullmatch(environ.get("PATH_INFO", ""))
        # S3's clients may have a bucket of this name.
        if not asked or "/sagemaker/aws4_request" not in environ.get("HTTP_AUTHORIZATION", ""):
            return None
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        try:
            endpoint = self._endpoints.get(self._arn("Endpoint", asked["name"], environ[REGION_KEY]))
            if endpoint is None or not endpoint.configuration:
                raise RequestError(f"Endpoint {asked['name']} of account {ACCOUNT} not found.", "ValidationError")
            by_s3 = "AsyncInferenceConfig" in endpoint.configuration
            if by_s3 != (asked["way"] == "async-invocations"):
                kind = "asynchronous" if by_s3 else "real-time"
                raise RequestError(f"Endpoint {asked['name']} is {kind}.", "ValidationError")
            if asked["way"] == "invocations-response-stream":
                return _stream(endpoint, environ, body, start_response)
            status, headers, content = _take(endpoint, environ) if by_s3 else _ask(endpoint, environ, body)
        except RequestError as error:
            status, content = "400 Bad Request", json.dumps({"Message": str(error)}).encode()
            headers = {"Content-Type": "application/json", "x-amzn-ErrorType": error.code}
        start_response(status, [*headers.items(), ("Content-Length", str(len(content)))])
        return [content]

    def close(self) -> None:
        """Ends all servers."""
        for endpoint in list(self._endpoints.values()):
            endpoint.end()


_Answer = tuple[str, dict[str, str], bytes]


def _ask(endpoint: HostedServer, environ: Mapping[str, Any], body: bytes) -> _Answer:
    answer = endpoint.invoke(body, _headers(environ))
    if answer.status == 200:
        return "200 OK", {"Content-Type": answer.kind, _VARIANT: endpoint.variant}, answer.body
    return _model_error(answer)


def _stream(
    endpoint: HostedServer, environ: Mapping[str, Any], body: bytes, start_response: Callable[..., Any]
) -> Iterable[bytes]:
    """Answers bit by bit, each as an event of AWS's event streams."""
    accept = environ.get(f"{_PASSED}ACCEPT", "")
    answer, bits = endpoint.invoke_stream(body, {**_headers(environ), **({"Accept": accept} if accept else {})})
    if answer.status != 200:
        status, headers, content = _model_error(answer)
        start_response(status, [*headers.items(), ("Content-Length", str(len(content)))])
        return [content]
    headers = {"Content-Type": "application/vnd.amazon.eventstream", "X-Amzn-SageMaker-Content-Type": answer.kind}
    start_response("200 OK", [*headers.items(), (_VARIANT, endpoint.variant)])
    return (payload_part(bit) for bit in bits)


def _headers(environ: Mapping[str, Any]) -> dict[str, str]:
    headers = {
        "Content-Type": environ.get("CONTENT_TYPE", ""),
        "Accept": environ.get("HTTP_ACCEPT", ""),
        **{
            name.removeprefix("HTTP_").replace("_", "-"): value
            for name, value in environ.items()
            if name.startswith(_PASSED)
        },
    }
    return {name: value for name, value in headers.items() if value}


def _model_error(answer: Invoked) -> _Answer:
    text = answer.body.decode("utf-8", "replace")
    content = {"Message": _message(answer), "OriginalStatusCode": answer.status, "OriginalMessage": text}
    return (
        "424 Failed Dependency",
        {"Content-Type": "application/json", "x-amzn-ErrorType": "ModelError"},
        json.dumps(content).encode(),
    )


def _take(endpoint: HostedServer, environ: Mapping[str, Any]) -> _Answer:
    """Takes a request that lies in S3, and answers before it is drawn."""
    s3, output = endpoint.clients("s3"), endpoint.configuration["AsyncInferenceConfig"]["OutputConfig"]
    source = S3Uri.parse(environ.get(f"{_PASSED}INPUTLOCATION", ""))
    identity = environ.get(f"{_PASSED}INFERENCE_ID") or str(uuid.uuid4())
    failures = output.get("S3FailurePath", f"{output['S3OutputPath'].rstrip('/')}/failures")
    good, bad = (S3Uri.parse(place) / f"{identity}.out" for place in (output["S3OutputPath"], failures))
    headers = {
        name: environ[f"{_PASSED}{key}"]
        for name, key in (("Content-Type", "CONTENT_TYPE"), ("Accept", "ACCEPT"))
        if environ.get(f"{_PASSED}{key}")
    }

    def draw() -> None:
        body = get_object(source, client=s3)
        if body is None:
            put_object(bad, f"{source} is not there".encode(), client=s3)
            return
        answer = endpoint.invoke(body, headers)
        if answer.status == 200:
            put_object(good, answer.body, client=s3)
        else:
            put_object(bad, _message(answer).encode(), client=s3)

    threading.Thread(target=draw, daemon=True).start()
    places = {"X-Amzn-SageMaker-OutputLocation": str(good), "X-Amzn-SageMaker-FailureLocation": str(bad)}
    answer = json.dumps({"InferenceId": identity}).encode()
    return "202 Accepted", {"Content-Type": "application/json", **places}, answer


def _message(answer: Invoked) -> str:
    fault = "client" if answer.status < 500 else "server"
    text = answer.body.decode("utf-8", "replace")
    return f'Received {fault} error ({answer.status}) from primary with message "{text}".'


def _check_model(request: Mapping[str, Any]) -> None:
    """Raises RequestError for what a process of this machine can't be."""
    container = request.get("PrimaryContainer")
    if container is None:
        raise RequestError("the embedded SageMaker serves models of one container; set PrimaryContainer")
    if unsafe := sorted(loader_variables(container.get("Environment", {}))):
        raise RequestError(f"Environment: {', '.join(unsafe)}: decides which code of this machine runs; leave it out")
