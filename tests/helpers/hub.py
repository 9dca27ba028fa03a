"""A model hub on loopback, with one repository."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.helpers.patience import PATIENCE

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


class Hub:
    """One repository, served as the model hub serves it.

    Attributes:
        url: its address.
        fetched: files that were asked for.
        tokens: what requests for them were authorised with.
        sent: files that were sent, or begun, as often as they were.
        ranges: of files, as they were asked for; without ``knows_ranges`` files are sent whole all the same.
        stuck: files of which half is sent, and the rest when ``moves`` is set.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.fetched: set[str] = set()
        self.tokens: set[str | None] = set()
        self.sent: list[str] = []
        self.ranges: dict[str, list[str]] = {}
        self.knows_ranges = True
        self.stuck: set[str] = set()
        self.moves = threading.Event()
        # One of its own: what a builder's cache holds of another hub is not taken for this one's.
        commit = secrets.token_hex(20)
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                if path.startswith("/api/models/owner/model/tree"):
                    body = json.dumps(
                        [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
                    ).encode()
                    return self.answer(body)
                if path.startswith("/api/models/owner/model"):
                    siblings = [{"rfilename": name} for name in files]
                    return self.answer(json.dumps({"id": "owner/model", "sha": commit, "siblings": siblings}).encode())
                prefix = f"/owner/model/resolve/{commit}/"
                name = path.removeprefix(prefix)
                if not path.startswith(prefix) or name not in files:
                    return self.answer(b"", 404)
                hub.fetched.add(name)
                hub.tokens.add(self.headers["Authorization"])
                if self.command == "GET":
                    hub.sent.append(name)
                body, asked = files[name], re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
                if asked and hub.knows_ranges:
                    hub.ranges.setdefault(name, []).append(asked[0])
                    return self.answer(body[int(asked[1]) : int(asked[2]) + 1], 206)
                return self.answer(body, is_stuck=name in hub.stuck)

            do_HEAD = do_GET  # noqa: N815

            def answer(self, body: bytes, status: int = 200, is_stuck: bool = False) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", f'"{hash(body) & 0xFFFFFFFF:x}"')
                self.send_header("X-Repo-Commit", commit)
                self.end_headers()
                if self.command == "GET" and is_stuck:
                    self.wfile.write(body[: len(body) // 2])
                    hub.moves.wait()
                    body = body[len(body) // 2 :]
                if self.command == "GET":
                    with suppress(ConnectionError):
                        self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fetch(self, home: Path, **options: str) -> subprocess.CompletedProcess[str]:
        """In a process of its own: the hub's client reads its environment when it is imported."""
        code = (
            "import sys; from dreambooth_sm import sources; from dreambooth_sm.errors import UserError\n"
            f"try: print(sources.fetch('owner/model', **{options!r}))\n"
            "except UserError as error: sys.exit(str(error))"
        )
        environment = {**os.environ, **self.environment(home)}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE
        )

    def environment(self, home: Path) -> dict[str, str]:
        """What leads the hub's client here."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
        }
