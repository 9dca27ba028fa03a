"""One endpoint of the embedded SageMaker: the server behind it, and the next one while it starts."""

from __future__ import annotations

import http.client
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import S3Options, S3Uri, TransferError, download_directory
from launcher.aws.clients import Clients
from launcher.endpoints.endpoint import EndpointFailed
from launcher.jobs.archive import unpack
from launcher.local.environment import isolated
from launcher.local.server_process import ServerProcess

# As long as SageMaker lets an invocation take; and an asynchronous one, if nothing else is said.
_PATIENCE, _PATIENCE_BY_S3 = 60, 900
# Bytes that an answer is passed on in at most.
_BIT = 65_536
_NOT_WELL = (
    "The primary container for production variant {} did not pass the ping health check. Please check CloudWatch logs "
    "for this endpoint."
)


@dataclass(frozen=True)
class Invoked:
    """What a server answered."""

    status: int
    kind: str
    body: bytes


def _no_answer(error: Exception) -> Invoked:
    return Invoked(500, "text/plain", f"the container does not answer ({error})".encode())


def _variant(configuration: Mapping[str, Any]) -> str:
    return str(configuration["ProductionVariants"][0]["VariantName"])


def _bits(connection: http.client.HTTPConnection, answer: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        while content := answer.read1(_BIT):
            yield content
    finally:
        connection.close()


class HostedServer:
    """An endpoint that serves what it was told last, and meanwhile what it was told before.

    Args:
        name: of the endpoint.
        directory: that its servers read their models in.
        clients: of S3 and CloudWatch Logs.
        environment: of its servers, besides what models say.

    Attributes:
        configuration: that is served; empty until one is.
    """

    def __init__(self, name: str, directory: Path, clients: Clients, environment: Mapping[str, str]) -> None:
        self.clients, self.configuration = clients, dict[str, Any]()
        self._name, self._directory, self._environment = name, directory, dict(environment)
        self._lock = threading.Lock()
        self._status, self._reason = "Creating", ""
        self._wanted: Mapping[str, Any] = {}
        self._server: ServerProcess | None = None
        self._starting: ServerProcess | None = None
        self._tree: Path | None = None
        self._ended = False

    @property
    def is_changing(self) -> bool:
        return self._status in ("Creating", "Updating")

    @property
    def variant(self) -> str:
        """How the variant that is served is called."""
        return _variant(self.configuration)

    def describe(self) -> dict[str, Any]:
        """What DescribeEndpoint says beside names and times."""
        with self._lock:
            shown = self.configuration or self._wanted
            variants = [
                {
                    "VariantName": each["VariantName"],
                    "CurrentInstanceCount": each["InitialInstanceCount"],
                    "DesiredInstanceCount": each["InitialInstanceCount"],
                }
                for each in shown["ProductionVariants"]
            ]
            found = {
                "EndpointStatus": self._status,
                "EndpointConfigName": shown["EndpointConfigName"],
                "ProductionVariants": variants,
            }
            if self._reason:
                found["FailureReason"] = self._reason
            if by_s3 := shown.get("AsyncInferenceConfig"):
                found["AsyncInferenceConfig"] = by_s3
            return found

    def serve(self, configuration: Mapping[str, Any], model: Mapping[str, Any]) -> None:
        """Starts another server; the one that is there answers until the other one can."""
        with self._lock:
            self._status = "Updating" if self.configuration else "Creating"
            self._wanted, self._reason = dict(configuration), ""
        threading.Thread(target=self._replace, args=(dict(configuration), model), daemon=True).start()

    def _replace(self, configuration: dict[str, Any], model: Mapping[str, Any]) -> None:
        tree, variant = self._directory / uuid.uuid4().hex, _variant(configuration)
        not_well = _NOT_WELL.format(variant)
        old, left, reason = self._server, self._tree, ""
        try:
            self._start(tree, model, variant)
        except (UserError, TransferError, OSError) as error:
            reason = f"Failed to download model data: {error}" if self._starting is None else not_well
        except EndpointFailed:
            reason = not_well
        except Exception as error:  # the platform's own fault: an endpoint has to get into some state
            reason = f"InternalServerError: {type(error).__name__}: {error}"
        with self._lock:
            started, self._starting = self._starting, None
            self._reason = reason
            if not reason and not self._ended:
                self._server, self._tree, self.configuration = started, tree, configuration
            self._status = "InService" if self.configuration else "Failed"
            over, left = (started, tree) if reason or self._ended else (old, left)
        if over:
            over.end()
        if left:
            shutil.rmtree(left, ignore_errors=True)

    def _start(self, tree: Path, model: Mapping[str, Any], variant: str) -> None:
        container, s3 = model["PrimaryContainer"], self.clients("s3")
        tree.mkdir(parents=True)
        sources = {"model": container.get("ModelDataSource", {}).get("S3DataSource", {}).get("S3Uri")}
        sources["model"] = sources["model"] or container.get("ModelDataUrl")
        for channel in container.get("AdditionalModelDataSources", ()):
            sources[channel["ChannelName"]] = channel["S3DataSource"]["S3Uri"]
        variables = dict(container.get("Environment", {}))
        for name, source in sources.items():
            if source is None:
                (tree / name).mkdir()
            elif source.endswith(".tar.gz"):
                unpack(source, tree / name, s3, S3Options())
            else:
                download_directory(S3Uri.parse(source), tree / name, client=s3)
            if name in ("base", "adapters"):  # found without a setting where SageMaker mounts them
                variables["SERVE_BASE_MODEL" if name == "base" else "SERVE_ADAPTERS"] = str(tree / name)
        environment = {**self._environment, **variables}
        if model.get("EnableNetworkIsolation"):
            environment = isolated(environment)
        with self._lock:
            if self._ended:
                raise EndpointFailed("the endpoint was deleted")
            self._starting = ServerProcess(tree, environment, self._log(variant))
        self._starting.wait()

    def _log(self, variant: str) -> Callable[[str], None]:
        """Puts lines into CloudWatch Logs."""
        logs, group, stream = (
            self.clients("logs"),
            f"/aws/sagemaker/Endpoints/{self._name}",
            f"{variant}/i-{uuid.uuid4().hex}",
        )
        with suppress(logs.exceptions.ResourceAlreadyExistsException):
            logs.create_log_group(logGroupName=group)
        logs.create_log_stream(logGroupName=group, logStreamName=stream)

        def put(line: str) -> None:
            event = {"timestamp": time.time_ns() // 1_000_000, "message": line}
            if line and not self._ended:
                logs.put_log_events(logGroupName=group, logStreamName=stream, logEvents=[event])

        return put

    def invoke(self, body: bytes, headers: Mapping[str, str]) -> Invoked:
        """Asks the server that can draw now."""
        connection = self._connection()
        try:
            connection.request("POST", "/invocations", body, dict(headers))
            answer = connection.getresponse()
            return Invoked(answer.status, answer.getheader("Content-Type", ""), answer.read())
        except (OSError, http.client.HTTPException) as error:
            return _no_answer(error)
        finally:
            connection.close()

    def invoke_stream(self, body: bytes, headers: Mapping[str, str]) -> tuple[Invoked, Iterator[bytes]]:
        """Asks it as well; what it answers with 200 comes bit by bit, beside an answer without a body."""
        connection = self._connection()
        try:
            connection.request("POST", "/invocations", body, dict(headers))
            answer = connection.getresponse()
            kind = answer.getheader("Content-Type", "")
            if answer.status == http.client.OK:
                return Invoked(answer.status, kind, b""), _bits(connection, answer)
            found = Invoked(answer.status, kind, answer.read())
        except (OSError, http.client.HTTPException) as error:
            found = _no_answer(error)
        connection.close()
        return found, iter(())

    def _connection(self) -> http.client.HTTPConnection:
        with self._lock:
            assert self._server is not None
            port, by_s3 = self._server.port, "AsyncInferenceConfig" in self.configuration
        patience = _PATIENCE_BY_S3 if by_s3 else _PATIENCE
        return http.client.HTTPConnection("127.0.0.1", port, timeout=patience)

    def end(self) -> None:
        """Ends its servers."""
        with self._lock:
            self._ended = True
            servers = [each for each in (self._server, self._starting) if each]
        for server in servers:
            server.end()
        shutil.rmtree(self._directory, ignore_errors=True)
