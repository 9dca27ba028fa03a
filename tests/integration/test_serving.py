"""An endpoint, asked by HTTP as SageMaker and its clients ask."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

import launcher
from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from dreambooth_sm.serving.engine import Engine
from dreambooth_sm.serving.orders import Order
from dreambooth_sm.serving.served_model import open_served
from dreambooth_sm.serving.settings import LARGEST_BODY, ServingSettings
from dreambooth_sm.storage import PROBE_NAME, S3Uri, get_object, upload_directory
from launcher.local.program import ENTRYPOINT
from launcher.local.s3 import EmbeddedS3
from tests.helpers.jobs import read_until
from tests.helpers.patience import PATIENCE
from tests.helpers.s3_proxy import Answer as Reply
from tests.helpers.s3_proxy import Request, s3_proxy
from tests.helpers.serving import Client, served, wait_until

SMALL: dict[str, Any] = {"prompt": "photo of a toy", "steps": 1, "width": 32, "height": 32, "seed": 3}


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> Iterator[Engine]:
    engine = Engine(open_served(tiny_base, None), ServingSettings(queue=8, max_steps=1000))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[Client]:
    with served(engine) as (client, _):
        yield client


def opened(content: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(content))
    picture.load()
    return picture


def test_it_is_well_once_it_can_draw(engine: Engine) -> None:
    with served(None) as (client, service):
        assert client.send("GET", "/ping").status == 503
        assert client.draw(SMALL).status == 503
        service.engine = engine
        assert client.send("GET", "/ping").status == 200


def test_pictures_come_in_the_form_that_is_asked_for(client: Client) -> None:
    ours = client.draw({**SMALL, "number": 2}, X_Request_Id="one")
    assert (ours.status, ours.headers["content-type"]) == (200, "application/json")
    assert ours.headers["x-request-id"] == "one"
    first, second = ours.json["pictures"]
    assert (first["seed"], second["seed"], second["prompt"]) == (3, 4, "photo of a toy")
    png = client.draw(SMALL, Accept="image/png")
    assert png.headers["content-type"] == "image/png"
    picture = opened(png.body)
    assert picture.size == (32, 32)
    (alone,) = client.draw(SMALL).json["pictures"]
    assert np.array_equal(picture, opened(base64.b64decode(alone["picture"])))
    assert opened(client.draw(SMALL, Accept="image/webp").body).format == "WEBP"
    assert opened(client.draw({**SMALL, "seed": 4}, Accept="image/*").body).tobytes() != picture.tobytes()


LINES = "application/jsonlines"


def test_pictures_are_shown_while_they_are_drawn(client: Client) -> None:
    asked = {**SMALL, "steps": 6, "number": 2, "previews": 2, "format": "webp"}
    answer = client.draw(asked, Accept=LINES)
    assert (answer.status, answer.headers["content-type"]) == (200, LINES)
    lines = [json.loads(line) for line in answer.body.splitlines()]
    assert sorted((line["number"], line.get("step", 6)) for line in lines) == [
        (number, step) for number in (0, 1) for step in (2, 4, 6)
    ]
    assert {line["steps"] for line in lines if "step" in line} == {6}
    done = {line["number"]: line for line in lines if "step" not in line}
    whole = client.draw({**asked, "previews": 0}).json["pictures"]
    assert [done[number]["picture"] for number in (0, 1)] == [each["picture"] for each in whole]
    assert [done[number]["seed"] for number in (0, 1)] == [3, 4]
    assert opened(base64.b64decode(next(line for line in lines if "step" in line)["picture"])).size == (32, 32)


def test_what_goes_wrong_comes_as_a_status_before_the_first_line_and_as_a_line_after_it(
    client: Client, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = client.draw({**SMALL, "steps": 0}, Accept=LINES)
    assert (refused.status, len(refused.json["errors"])) == (400, 1)
    refused = client.draw({**SMALL, "previews": 3})
    assert f"accept {LINES}" in refused.json["errors"][0]
    family, taken = type(engine.model.family), []

    def breaks_later(self: Any, *rest: Any) -> Any:
        taken.append(rest)
        if len(taken) > 3:
            raise ArithmeticError("broken")
        return predict(self, *rest)

    predict = family.predict
    monkeypatch.setattr(family, "predict", breaks_later)
    answer = client.draw({**SMALL, "steps": 6, "previews": 2}, Accept=LINES)
    first, last = (json.loads(line) for line in answer.body.splitlines())
    assert (answer.status, first["step"]) == (200, 2)
    assert last == {"errors": ["the pictures could not be drawn (ArithmeticError); the log says more"]}


def test_who_goes_while_pictures_are_shown_is_not_drawn_for(client: Client, engine: Engine) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=PATIENCE)
    body = json.dumps({**SMALL, "steps": 1000, "previews": 20}).encode()
    connection.request("POST", "/invocations", body, {"Content-Type": "application/json", "Accept": LINES})
    assert b'"step":47' in connection.getresponse().readline()
    connection.close()
    wait_until(lambda: not engine.is_drawing)


def test_clients_of_jumpstart_get_what_they_know(client: Client, engine: Engine) -> None:
    asked = {"prompt": "photo of a toy", "num_inference_steps": 1, "width": 32, "height": 32, "seed": 3}
    arrays = client.draw(asked, Accept="application/json").json
    picture = opened(client.draw(SMALL, Accept="image/png").body)
    assert np.array_equal(np.array(arrays["generated_images"][0], np.uint8), picture)
    encoded = client.draw(asked, Accept="application/json;jpeg").json
    assert opened(base64.b64decode(encoded["generated_images"][0])).format == "JPEG"
    headers = {"Content_Type": "application/x-text", "Accept": "application/json;jpeg"}
    text = client.send("POST", "/invocations", b"photo of a toy", **headers).json
    assert opened(base64.b64decode(text["generated_image"])).size == engine.offer.size


def test_the_quick_kits_client_finds_its_pictures_in_s3(
    client: Client, s3: EmbeddedS3, target: S3Uri, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    asked = {"prompt": "a toy", "steps": 1, "sampler": "euler_a", "count": 2, "width": 32, "height": 32}
    answer = client.draw({**asked, "output_s3uri": f"{target}/"})
    assert answer.status == 200
    places = answer.json["result"]
    assert len(set(places)) == 2
    for place in places:
        content = get_object(S3Uri.parse(place))
        assert content is not None
        assert opened(content).format == "JPEG"
    nowhere = client.draw({**asked, "output_s3uri": "s3://no-such-bucket-of-ours/x"})
    assert nowhere.status == 400
    assert "no-such-bucket-of-ours" in nowhere.json["errors"][0]


def test_a_place_that_takes_no_pictures_is_told_before_any_is_drawn(
    engine: Engine, s3: EmbeddedS3, target: S3Uri, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrote: list[str] = []
    refuses = True

    def refuse(request: Request) -> Reply | None:
        if request.operation == "PutObject":
            wrote.append(request.key)
            return Reply.error(403, "AccessDenied") if refuses else None
        return Reply.error(403, "AccessDenied") if request.operation in ("ListObjectsV2", "DeleteObject") else None

    monkeypatch.setattr(engine, "submit", submitted := Mock(wraps=engine.submit))
    with s3_proxy(s3.endpoint_url, refuse) as address, served(engine) as (client, _):
        for name, value in {**s3.environment(), "AWS_ENDPOINT_URL_S3": address}.items():
            monkeypatch.setenv(name, value)
        refused = client.draw({**SMALL, "output": str(target), "steps": 0})
        assert (refused.status, len(refused.json["errors"])) == (400, 2), refused.json
        refused = client.draw({**SMALL, "output": str(target)}, Accept=LINES)
        assert refused.status == 400
        (problem,) = refused.json["errors"]
        assert problem.startswith(str(target))
        assert "access denied: allow s3:PutObject" in problem
        assert not submitted.called
        wrote.clear()
        refuses = False
        for _ in range(2):  # rights to list and to delete are not needed, and what took pictures is not tried again
            assert client.draw({**SMALL, "output": str(target)}).status == 200
        assert [key.endswith(PROBE_NAME) for key in wrote] == [True, False, False]
        refuses = True
        assert client.draw({**SMALL, "output": str(target)}).status == 400  # the right was taken away meanwhile
        submitted.reset_mock()
        assert client.draw({**SMALL, "output": str(target)}).status == 400
        assert not submitted.called
    with served(engine) as (client, _):  # the address that nobody listens at any more
        assert client.draw({**SMALL, "output": str(target)}).status == 502
        assert not submitted.called


def malformed(number: int) -> tuple[bytes, dict[str, str]]:
    """A request with something wrong in it; of each number another one."""
    pick = random.Random(number)
    odd: list[Any] = [
        None,
        -1,
        0,
        10**30,
        1e308,
        "",
        "x" * 5000,
        [],
        {},
        [[]],
        True,
        "\ud800",
        {"a": {"b": []}},
        ["", 3],
    ]
    names = ("prompt", "prompts", "steps", "guidance", "width", "seeds", "number", "scheduler", "adapters", "output")
    values = SMALL | {name: pick.choice(odd) for name in pick.sample(names, 3)} | {"colour": "red"}
    body = json.dumps(values).encode()
    if number % 3 == 0:
        body = body[: pick.randrange(1, len(body))]
    elif number % 3 == 1:
        start = pick.randrange(len(body))
        body = body[:start] + pick.randbytes(3) + body[start:]
    headers = pick.choice([{}, {"Content-Type": "application/json"}, {"Content-Type": "text/csv"}, {"Accept": "a/b"}])
    return body, headers


def test_two_hundred_malformed_requests_are_refused_each_with_its_reasons(client: Client, engine: Engine) -> None:
    def send(number: int) -> int:
        body, headers = malformed(number)
        answer = client.send("POST", "/invocations", body, **headers)
        lines = answer.json["errors"]
        assert lines
        assert all(line and "\n" not in line for line in lines)
        return answer.status

    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(send, range(200)))
    assert found <= {400, 404, 406, 415}
    assert client.draw(SMALL).status == 200
    assert engine.is_alive


def test_the_log_has_what_broke_an_answer(
    client: Client, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*given: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr("dreambooth_sm.serving.app.answer", broken)
    refused = client.draw({"prompt": "photo of a toy", "width": 32, "height": 32, "steps": 1})
    assert (refused.status, len(refused.json["errors"])) == (500, 1)
    assert capfd.readouterr().err.count("| RuntimeError: no such luck\n") == 1


def test_other_paths_bodies_and_adapters_are_refused(client: Client) -> None:
    assert client.send("GET", "/models").status == 404
    assert client.send("GET", "/invocations").status == 405
    unknown = client.draw({**SMALL, "adapters": ["zwx"]})
    assert (unknown.status, unknown.json) == (404, {"errors": ["adapters: 'zwx' is not known here"]})
    with socket.create_connection(("127.0.0.1", client.port), timeout=PATIENCE) as connection:
        head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {LARGEST_BODY * 2}\r\n\r\n"
        connection.sendall(head.encode() + b" " * (LARGEST_BODY + 1))
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_more_than_may_wait_are_told_so_at_once_and_whoever_leaves_is_not_drawn_for(
    client: Client, engine: Engine
) -> None:
    body = json.dumps({**SMALL, "steps": 1000, "number": 8}).encode()
    head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connections = []
    for waiting in (0, 8):  # the first has all places that are drawn in
        connections.append(socket.create_connection(("127.0.0.1", client.port), timeout=PATIENCE))
        connections[-1].sendall(head + body)
        wait_until(lambda waiting=waiting: engine.is_drawing and engine.waiting == waiting)
    answer = client.draw({**SMALL, "number": 2})
    assert answer.status == 429
    assert "ask again later" in answer.json["errors"][0]
    for connection in connections:
        connection.close()
    wait_until(lambda: engine.waiting == 0 and not engine.is_drawing)
    assert client.draw(SMALL).status == 200


@pytest.mark.parametrize("when", ["before the first line", "after a line", "while a line is sent"])
def test_whoever_leaves_while_lines_come_is_not_drawn_for(
    when: str, client: Client, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {**SMALL, "steps": 1000, "number": 8, "previews": 8}
    body = json.dumps(values).encode()
    head = "POST /invocations HTTP/1.1\r\nHost: x\r\nAccept: application/jsonlines\r\nX-Request-Id: leaves\r\n"
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=PATIENCE)
    submit, orders = engine.submit, list[Order]()

    def leave() -> None:
        connection.close()
        client.send("GET", "/ping")  # the server has seen that by now

    def submitted(*given: Any) -> Order:
        orders.append(submit(*given))
        if when == "before the first line":
            leave()
        return orders[-1]

    monkeypatch.setattr(engine, "submit", submitted)
    if when == "while a line is sent":  # more than what lies between the two can hold
        monkeypatch.setattr("dreambooth_sm.serving.app.answer_line", lambda *given: b" " * 50_000_000)
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    if when != "before the first line":
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        answer.read(1)
        answer.close()
        leave()
    wait_until(lambda: orders and engine.waiting == 0 and not engine.is_drawing)
    assert not orders[0].pictures.done()
    printed = list[str]()
    wait_until(lambda: printed.append(capsys.readouterr().out) or "leaves" in "".join(printed))
    (line,) = [json.loads(each) for each in "".join(printed).splitlines() if "leaves" in each]
    assert line["status"] == 499


def start(model: Path, **environment: str) -> subprocess.Popen[str]:
    """The image's program, as SageMaker calls it."""
    return subprocess.Popen(
        [sys.executable, str(ENTRYPOINT), "serve"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "SAGEMAKER_BASE_DIR": str(model.parent), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_what_is_asked_for_is_drawn_to_its_end_when_the_platform_ends_it(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_base)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start(tmp_path / "model", SAGEMAKER_BIND_TO_PORT=str(port), SERVE_LOG_PROMPTS="true")
    try:
        read_until(process, "^ready: ")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("POST", "/invocations", json.dumps({**SMALL, "steps": 40}))
        assert Client(port).send("GET", "/ping").status == 200  # what came before it was read as well
        process.send_signal(signal.SIGTERM)
        assert connection.getresponse().status == 200
        connection.close()
        log, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == EXIT_OK, log
    (line,) = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert (line["status"], line["prompts"], line["Pictures"]) == (200, ["photo of a toy"], 1)
    metrics = line["_aws"]["CloudWatchMetrics"][0]
    assert all(metric["Name"] in line for metric in metrics["Metrics"])


@pytest.mark.slow
def test_a_model_that_is_not_there_ends_it_with_one_line(tmp_path: Path) -> None:
    process = start(tmp_path / "model", SAGEMAKER_BIND_TO_PORT="0")
    log, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == EXIT_BAD_INPUT, log
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert str(tmp_path / "model") in line
    wrong = start(tmp_path / "model", SAGEMAKER_BIND_TO_PORT="http", SERVE_BATCHES="2")
    log, _ = wrong.communicate(timeout=PATIENCE)
    assert (wrong.returncode, log) == (
        EXIT_BAD_INPUT,
        "error: SERVE_BATCHES: unknown setting; did you mean SERVE_BATCH?\n",
    )


DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("example", re.findall(r"^```json\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE))
def test_the_documents_examples_are_answered(client: Client, example: str) -> None:
    assert client.send("POST", "/invocations", example.encode(), Content_Type="application/json").status == 200


def test_the_document_has_all_settings() -> None:
    for name, default, meaning in ServingSettings.table():
        assert f"| `{name}` | {'' if default == 'none' else default} | {meaning} |\n" in DOCUMENT


@pytest.mark.slow
def test_the_launcher_serves_a_model_on_this_machine(
    tiny_base: Path, s3: EmbeddedS3, target: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**s3.environment(), "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    upload_directory(tiny_base, target)
    block = re.findall(r"^```python\n(import launcher\n.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)[0]
    found: dict[str, Any] = {"model": str(target)}
    code, delete, _ = block.partition("endpoint.delete()")
    exec(code, found)
    with found["endpoint"] as endpoint:
        assert [picture.size for picture in found["pictures"]] == [(64, 64)] * 2
        with pytest.raises(UserError, match="steps: 0 is not valid") as caught:
            endpoint.draw("a toy", steps=0, width=7)
        assert len(caught.value.problems) == 2
        (block,) = re.findall(r"^```python\n(for shown .*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)
        with contextlib.chdir(tmp_path):
            exec(block, found)
        assert sorted(path.name for path in tmp_path.glob("toy-*")) == ["toy-1.png", "toy-3.png", "toy-done.png"]
        first = endpoint.port
        with pytest.raises(UserError, match="SERVE_STEPS"):
            endpoint.update(steps=3)
        assert endpoint.port == first
        endpoint.update(tiny_base, max_steps=2)
        assert endpoint.port != first
        with pytest.raises(UserError, match="steps: "):
            endpoint.draw("a toy", steps=3)
        exec(delete, found)
        with pytest.raises(launcher.EndpointFailed, match="does not answer"):
            endpoint.draw("a toy")
    with pytest.raises(UserError, match="SERVE_BATCHES: unknown setting"):
        launcher.deploy(tiny_base, batches=1)
    with pytest.raises(UserError, match="not a directory"):
        launcher.deploy("/nowhere")
