"""All that a job leaves: its model, the pictures that it draws and its report, wherever they lie."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.declare import spellings
from dreambooth_sm.storage import (
    MANIFEST_NAME,
    Manifest,
    S3Options,
    S3Uri,
    download_directory,
    get_object,
    list_objects,
)
from launcher.aws.clients import Clients
from launcher.aws.service_errors import asking
from launcher.jobs.archive import unpack
from launcher.jobs.views import Page, Pictures

# States that a job does not leave again.
ENDED = ("Completed", "Failed", "Stopped")


class Outputs:
    """The outputs that a job has left when it was described.

    Args:
        name: of the job.
        description: SageMaker's.
        clients: of S3.
        directory: a local job's ``/opt/ml`` tree.
    """

    def __init__(self, name: str, description: Mapping[str, Any], clients: Clients, directory: Path | None) -> None:
        self._name, self._description, self._clients, self._directory = name, description, clients, directory
        self._status = str(description["TrainingJobStatus"])

    @property
    def model_uri(self) -> str:
        """See :attr:`launcher.Job.model_uri`."""
        if target := self._target():
            return str(target)
        uri = str(self._description.get("ModelArtifacts", {}).get("S3ModelArtifacts", ""))
        if not uri:
            raise UserError(f"{self._name} has no model: it is {self._status}")
        return unquote(urlsplit(uri).path).rstrip("/") if uri.startswith("file://") else uri.rstrip("/")

    @property
    def events_uri(self) -> str:
        """See :attr:`launcher.Job.events_uri`."""
        if self._directory and (events := self._directory / "output" / "tensorboard").is_dir():
            return str(events)
        config = self._description.get("TensorBoardOutputConfig")
        if not config:
            raise UserError(f"{self._name} has no events for TensorBoard; start jobs with report_to=tensorboard")
        return f"{config['S3OutputPath'].rstrip('/')}/{self._name}/tensorboard-output"

    def download(self, directory: Path) -> Path:
        """See :meth:`launcher.Job.download`."""
        source, target = self.model_uri, self._target()
        if target and MANIFEST_NAME not in list_objects(target, self._s3_options, client=self._clients("s3")):
            raise UserError(f"{self._name} has no whole model in {target} yet: it is {self._status}")
        if source.endswith(".tar.gz"):
            return unpack(source, directory, self._clients("s3"), self._s3_options)
        if not source.startswith("s3://"):
            return Path(shutil.copytree(source, directory, dirs_exist_ok=True))
        download_directory(S3Uri.parse(source), directory, self._s3_options, client=self._clients("s3"))
        return directory

    @property
    def _s3_options(self) -> S3Options:
        """How the job's objects are read."""
        pays = self._description.get("HyperParameters", {}).get("s3_requester_pays", "")
        return S3Options(requester_pays=pays.strip('"').lower() == "true")

    def samples(self) -> Pictures:
        """See :meth:`launcher.Job.samples`."""
        from PIL import Image

        from dreambooth_sm.data.pictures import PICTURE_FORMATS

        place = self._samples_place()
        names = sorted(name for name in self._names(place) if re.fullmatch(r"samples/.+\.(png|jpg|webp)", name))
        return Pictures(Image.open(io.BytesIO(self._read(place, name)), formats=PICTURE_FORMATS) for name in names)

    def report(self) -> Page:
        """See :meth:`launcher.Job.report`."""
        place = self.model_uri
        if "report.html" not in self._names(place):
            raise UserError(f"{self._name} wrote no report.html to {place}")
        return Page(self._read(place, "report.html").decode())

    def _target(self) -> S3Uri | None:
        """Finds where the job itself uploads its model, if it does."""
        hyperparameters = self._description.get("HyperParameters", {})
        own = "manual_upload_model_path"
        for name in spellings(own, Hyperparameters.model_fields[own]):
            target = hyperparameters.get(name, "").strip('"')
            if target.startswith("s3://"):  # another image may mean something else by it
                return S3Uri.parse(target)
        return None

    def _samples_place(self) -> str:
        """Finds the pictures: beside the model, or, until there is one, in what the platform keeps in S3 or here."""
        if self._status in ENDED or self._target():
            return self.model_uri
        if self._directory:
            return str(self._directory / "model")
        synced = str(self._description.get("CheckpointConfig", {}).get("S3Uri", ""))
        return synced.rstrip("/") if synced.startswith("s3://") else self.model_uri

    def _names(self, place: str) -> list[str]:
        """The job's files below a place; of a place that other jobs used as well, those of this one."""
        if place.endswith(".tar.gz"):
            raise UserError(f"{place} is an archive: download() unpacks it")
        if not place.startswith("s3://"):
            return [path.relative_to(place).as_posix() for path in Path(place).rglob("*") if path.is_file()]
        source, s3 = S3Uri.parse(place), self._clients("s3")
        if source != self._target():
            return list(list_objects(source, client=s3))
        body = get_object(source / MANIFEST_NAME, client=s3)
        with suppress(ValueError):  # something else of this name
            if body and (manifest := Manifest.from_json(body)).job == self._name:
                return [entry.path for entry in manifest.files]
        # Until then, what has come since the job was created. S3 keeps whole seconds.
        since = self._description["CreationTime"].replace(microsecond=0)
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=source.bucket, Prefix=f"{source.prefix}/")
        with asking(f"{source} can't be listed"):
            objects = [item for page in pages for item in page.get("Contents", [])]
        return [o["Key"].removeprefix(f"{source.prefix}/") for o in objects if o["LastModified"] >= since]

    def _read(self, place: str, name: str) -> bytes:
        if not place.startswith("s3://"):
            return (Path(place) / name).read_bytes()
        uri = S3Uri.parse(place) / name
        with asking(f"{uri} can't be read"):
            body: bytes = self._clients("s3").get_object(Bucket=uri.bucket, Key=uri.prefix)["Body"].read()
        return body
