"""Large files from a model hub by HTTP, several ranges at a time.

The hub's own client does so where the hub has Xet's storage; of others, such as mirrors, it takes a file in one piece,
over one connection.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from uuid import uuid4

from dreambooth_sm.transfers import do_all, spans

_RANGE = 32 * 2**20
_CHUNK = 2**20
_WORKERS = 16


def fetch_large(name: str, files: Sequence[str], commit: str, token: str | None, cache: Path | None) -> None:
    """Puts a repository's large files into the cache of the hub's client, which then finds them there.

    What is there already, or can't be had in ranges, is left to the client, and so are errors.

    Args:
        files: their names.
        cache: the client's; None for its own.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    top, folder = Path(cache or constants.HF_HUB_CACHE), repo_folder_name(repo_id=name, repo_type="model")
    blobs, locks, there = top / folder / "blobs", top / ".locks" / folder, top / folder / "snapshots" / commit
    for file in files:
        if (there / file).exists():  # without a question to the hub
            continue
        with suppress(Exception):  # the client will meet it as well, and says what it is
            url = hf_hub_url(name, file, revision=commit)
            about = get_hf_file_metadata(url, token=token)
            by_xet = about.xet_file_data and not constants.HF_HUB_DISABLE_XET
            if by_xet or not about.etag or not about.size or about.size <= _RANGE:
                continue
            for directory in (blobs, locks):
                directory.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(locks / f"{about.etag}.lock"):
                if not (blobs / about.etag).exists():
                    headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}
                    _fetch(url, headers, blobs / about.etag, about.size)


def _fetch(url: str, headers: dict[str, str], blob: Path, size: int) -> None:
    """Fetches one file, which has its name when it is whole."""
    unfinished = blob.with_name(f"{blob.name}.{uuid4().hex[:8]}.incomplete")
    file = os.open(unfinished, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644)
    try:
        os.truncate(file, size)
        do_all((partial(_fetch_range, url, headers, file, *span) for span in spans(size, _RANGE)), _WORKERS)
        unfinished.rename(blob)
    finally:
        os.close(file)
        unfinished.unlink(missing_ok=True)


def _fetch_range(url: str, headers: dict[str, str], file: int, first: int, size: int) -> None:
    from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

    asked = headers | {"Range": f"bytes={first}-{first + size - 1}"}
    offset = first
    with http_stream_backoff("GET", url, headers=asked, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:
            raise OSError("the server sends whole files only")
        for chunk in response.iter_raw(_CHUNK):
            offset += os.pwrite(file, chunk, offset)
    if offset != first + size:
        raise OSError(f"{offset - first} bytes came instead of {size}")
