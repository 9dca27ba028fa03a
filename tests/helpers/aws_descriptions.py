"""botocore's descriptions of AWS, of which it reads some megabytes for every session that a job or a test makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from unittest.mock import patch

from botocore.loaders import JSONFileLoader, Loader


@contextmanager
def remembered() -> Iterator[None]:
    """Each file is read, and each folder is listed, once a process."""
    read = cache(partial(JSONFileLoader.load_file, JSONFileLoader()))
    services = Loader.list_available_services

    @cache
    def listed(folders: tuple[str, ...], type_name: str) -> list[str]:
        return services(Loader([*folders], include_default_search_paths=False), type_name)

    with (
        patch.object(JSONFileLoader, "load_file", lambda _, path: read(path)),
        patch.object(
            Loader, "list_available_services", lambda loader, type_name: listed((*loader.search_paths,), type_name)
        ),
    ):
        yield
