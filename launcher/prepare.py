"""From options to a prepared job: checked as far as it can be before it starts, staged once, submitted at will."""

from __future__ import annotations

import atexit
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from dreambooth_sm.data.check import printable
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.storage import S3Options, S3Uri
from launcher.aws.account import Account
from launcher.aws.clients import Clients
from launcher.aws.lookup import MANIFEST_FILE, Listed, Lookup
from launcher.aws.service_errors import ServiceError
from launcher.channels import MANIFEST, Channel
from launcher.draft import Draft, read_draft
from launcher.estimates import Estimate, cheapest_that_fits, choose_instance, estimate_on
from launcher.instances import INSTANCES, find_instance
from launcher.jobs.job import Job
from launcher.jobs.times import OwnTimes, own_times
from launcher.jobs.warm_pools import WarmPool, find_warm_pools
from launcher.local.program import CONTAINER
from launcher.local.run import run_locally
from launcher.parts import Known, in_minutes, keeping_line
from launcher.resources import Resources
from launcher.staging import Files, digest, lay_out_files, stage
from launcher.submit import submit
from launcher.training_request import (
    CONCEPTS_FILE,
    CONFIG_CHANNEL,
    IMAGES_CHANNEL,
    MAX_NAME,
    find_secrets,
    move_long_values,
    refused_resources,
    training_request,
)

# What a request holds where there is no account to ask, or where the account had no answer.
_STANDINS = {"role": "arn:aws:iam::000000000000:role/unknown", "image_uri": "unknown", "bucket": "unknown"}


@dataclass
class PreparedJob:
    """A job for SageMaker that has been checked: its files are staged once, and it is submitted any number of times.

    Attributes:
        resources: with role, image, bucket and name filled in.
        channels: where each input channel lies in S3.
        estimate: plan, memory, minutes and dollars.
        files: what has to be in S3 before, by its place there.
        options: how they are written there.
        account: that it runs in; None: it is only described, and can't be staged.
        warnings: what is odd about the pictures, and what could not be checked.
        new_bucket: that has to be made before, if any.
        build: tag of the image that was found for this code; None where the image was given.
        pictures: how many there are of the subject.
    """

    hyperparameters: Hyperparameters
    resources: Resources
    channels: Mapping[str, Channel]
    estimate: Estimate
    files: Mapping[S3Uri, Files]
    options: S3Options
    account: Account | None = None
    warnings: tuple[str, ...] = ()
    new_bucket: str | None = None
    build: str | None = None
    pictures: int = 0
    _staged: bool = field(default=False, init=False, repr=False)
    _submitted: int = field(default=0, init=False, repr=False)

    @property
    def request(self) -> dict[str, Any]:
        """For ``create_training_job``."""
        return training_request(self.hyperparameters, self.resources, self.channels)

    def lines(self) -> list[str]:
        """Tells people what will be done."""
        image = [f"image: {self.build}"] if self.build else []
        lines = [f"job: {self.resources.name}", *image, *self.estimate.lines()]
        if self.new_bucket:
            lines.append(f"bucket: {self.new_bucket} is missing; a job that starts makes it")
        lines += [f"files: {len(files)} for {place}" for place, files in self.files.items()]
        return [*lines, *(f"warning: {warning}" for warning in self.warnings)]

    def stage(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Makes a bucket that is missing, and sends the files that are not in S3 yet; does nothing the second time.

        Args:
            say: gets a line about each of them.

        Raises:
            UserError: no permission.
            TransferError: the transfer failed in spite of retries.
        """
        if self._staged:
            return
        account = self._account
        if bucket := account.make_bucket():
            say(f"bucket: made {bucket}")
        for place, files in self.files.items():
            sent = stage(files, place, account.clients("s3"), self.options)
            say(f"files: {len(files)} {'sent to' if sent else 'already in'} {place}")
        self._staged = True

    def submit(self, say: Callable[[str], None] = lambda line: None, *, name: str | None = None) -> Job:
        """Stages the files, and starts a job with boto3.

        Args:
            say: as for :meth:`stage`.
            name: of this job; None: the one that was prepared, with a number from the second job on.

        Raises:
            UserError: SageMaker refuses the job, or its files can't be sent.
            ServiceError: AWS can't be reached, not with these credentials, or has a fault of its own.
            TransferError: the transfer failed in spite of retries.
        """
        self.stage(say)
        resources = self.resources.model_copy(update={"name": name or self._next_name()})
        request = training_request(self.hyperparameters, resources, self.channels)
        job = submit(request, self._account.clients, price=self.estimate.instance.usd_per_hour)
        self._submitted += 1
        return job

    @property
    def _account(self) -> Account:
        if self.account is None:
            raise ValueError("a job that was prepared without an account can't be staged")
        return self.account

    def _next_name(self) -> str:
        """SageMaker takes a name once, and checkpoints lie below it."""
        name, number = self.resources.name or "", f"-{self._submitted + 1}"
        return name[: MAX_NAME - len(number)] + number if self._submitted else name


@dataclass
class PreparedLocalJob:
    """A job for this machine that has been checked; it is submitted any number of times.

    Attributes:
        sources: channels to what they hold in S3, or to files of this machine.
        pictures: how many there are of the subject.
        image: that Docker runs; None: the job is a process.
        warnings: what is odd about the pictures.
    """

    hyperparameters: Hyperparameters
    sources: Mapping[str, Channel | Listed | Files]
    pictures: int
    image: str | None = None
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Tells people what to know before."""
        return [f"warning: {warning}" for warning in self.warnings]

    def submit(
        self, directory: str | Path | None = None, *, wait: bool = True, log: Callable[[str], None] | None = None
    ) -> Job:
        """Starts a job of this machine.

        Args:
            directory: root of its ``/opt/ml`` tree; a new temporary directory if None.
            wait: follow it until it has ended.
            log: gets each line of its log; default: printed, with a progress display.

        Raises:
            UserError: the entrypoint, or Docker, is not here.
            JobFailed: with the job's reason.
        """
        hyperparameters = self.hyperparameters.to_sagemaker()
        return run_locally(
            hyperparameters, self.data_sources, image=self.image, directory=directory, log=log, wait=wait
        )

    @cached_property
    def data_sources(self) -> dict[str, dict[str, str]]:
        """The channels as S3DataSources, files of this machine laid out in a folder of their own."""
        # A job that nobody waits for reads its channels later.
        scratch = tempfile.TemporaryDirectory(prefix="dreambooth-sm-")
        atexit.register(scratch.cleanup)
        found: dict[str, dict[str, str]] = {}
        for name, source in self.sources.items():
            if isinstance(source, Channel):
                found[name] = source.data_source
                continue
            folder = Path(scratch.name, name)
            lay_out_files(source.files if isinstance(source, Listed) else source, folder)
            found[name] = {"S3DataType": "S3Prefix", "S3Uri": folder.resolve().as_uri()}
            if isinstance(source, Listed):
                found[name] = {"S3DataType": "ManifestFile", "S3Uri": (folder / MANIFEST_FILE).resolve().as_uri()}
        return found


def prepare_local(options: Mapping[str, Any]) -> PreparedLocalJob:
    """Checks what a job of this machine needs.

    Raises:
        UserError: with everything that was found.
    """
    draft = read_draft(options, Lookup(lambda: Clients()("s3")))
    resources, fitting = draft.resources, {"instance_type", "output"}
    if resources.instance_type == CONTAINER:
        fitting.add("image_uri")
        if resources.image_uri is None:
            draft.problems.found.append("image_uri is missing; name the image that Docker has to run")
    draft.problems.found += [
        f"{name} is for jobs on SageMaker; leave it out with instance_type={resources.instance_type!r}"
        for name in sorted(resources.model_fields_set - fitting)
    ]
    draft.raise_any()
    assert draft.hyperparameters is not None
    return PreparedLocalJob(
        draft.hyperparameters, draft.sources, draft.pictures, resources.image_uri, tuple(draft.warnings)
    )


def prepare(
    options: Mapping[str, Any],
    account: Account | None,
    *,
    thorough: bool = True,
    directory: str | Path | None = None,
) -> PreparedJob:
    """Checks everything that can be checked of a job on SageMaker.

    Args:
        account: where to look for what was not given; None: nowhere.
        thorough: ask the account as well whether the job could start.
        directory: of a local job, which this is not.

    Raises:
        UserError: with everything that was found.
    """
    draft = read_draft(options, _lookup(account, thorough=thorough))
    if directory is not None:
        draft.problems.found.append("directory is for local jobs; leave it out, or set instance_type='local'")
    chosen = _choose_instance(draft)
    h, resources = draft.hyperparameters, draft.resources
    if chosen is not None:
        resources = resources.model_copy(update={"instance_type": chosen.instance.name})
    if resources.instance_type in INSTANCES or chosen is not None:
        resources = _complete(resources, draft, account)
        if account is not None and thorough:
            _check_account(account, resources, draft)
    if h is None or chosen is None:
        # What is wrong with the rest of the request is worth knowing at once as well.
        known = {"name": "unknown", **_STANDINS}
        given = {name: text for name, text in known.items() if not getattr(resources, name)}
        if resources.role and not resources.role.startswith("arn:"):
            given["role"] = _STANDINS["role"]
        if resources.instance_type == "auto":
            given["instance_type"] = next(iter(INSTANCES))
        whole = resources.model_copy(update=given)
        draft.problems.found += refused_resources(whole, {IMAGES_CHANNEL: whole.workspace})
        draft.raise_any()
    assert h is not None
    assert chosen is not None
    h, concepts = move_long_values(h)
    if concepts is not None:
        draft.sources[CONFIG_CHANNEL] = {CONCEPTS_FILE: concepts.encode()}
    channels: dict[str, Channel] = {}
    files: dict[S3Uri, Files] = {}
    for name, source in draft.sources.items():
        if isinstance(source, Channel):
            channels[name] = source
            continue
        sent = source.files if isinstance(source, Listed) else source
        if odd := [file for file in sent if not _is_utf8(file)]:
            draft.problems.found += [
                f"the name of {printable(file)} is not UTF-8, as names in S3 are; rename it" for file in odd
            ]
            continue
        # A digest reads everything, gigabytes of a base model perhaps: not for an estimate.
        place = resources.workspace / name / (digest(sent) if account else "unsent")
        files[place] = sent
        channels[name] = Channel(place / MANIFEST_FILE, MANIFEST) if isinstance(source, Listed) else Channel(place)
    request: dict[str, Any] = {}
    with draft.problems.collected():
        request = training_request(h, resources, channels or {IMAGES_CHANNEL: Channel(resources.workspace / "unknown")})
    draft.problems.found += find_secrets(request, os.environ)
    if account is not None and thorough and not draft.problems.found:
        chosen = estimate_on(
            h,
            chosen.instance,
            instance_count=resources.instance_count,
            pictures=draft.pictures,
            known=_look_around(account, request),
        )
    with draft.problems.collected():
        _check_limit(chosen, resources.max_minutes)
    draft.raise_any()
    if resources.keep_alive:
        hourly = chosen.instance.usd_per_hour
        price = None if hourly is None else hourly * resources.instance_count
        kept = keeping_line(h, chosen.known, resources.keep_alive, price)
        chosen = replace(chosen, notes=(*chosen.notes, kept))
    warnings = (*draft.warnings, *(account.warnings if account else ()))
    missing, build = (account.missing_bucket, account.build) if account else (None, None)
    return PreparedJob(
        h, resources, channels, chosen, files, draft.writing, account, warnings, missing, build, draft.pictures
    )


def _lookup(account: Account | None, *, thorough: bool) -> Lookup:
    if account is None:
        return Lookup()
    clients = account.clients
    return Lookup(lambda: clients("s3")) if thorough else Lookup(clients.for_a_look, strict=False)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_account(account: Account, resources: Resources, draft: Draft) -> None:
    """Checks whether the job could start, where everything that it needs was found."""
    if any(getattr(resources, name) == standin for name, standin in _STANDINS.items()):
        return
    with draft.problems.collected():
        account.check(resources, draft.writing)


def _choose_instance(draft: Draft) -> Estimate | None:
    """Estimates what the job needs on its instance type; None where there is a problem."""
    h, resources = draft.hyperparameters, draft.resources
    with draft.problems.collected():
        if h is None:
            if resources.instance_type != "auto":
                find_instance(resources.instance_type)
            return None
        count, limit = resources.instance_count, resources.max_minutes
        if resources.instance_type == "auto":
            instance = choose_instance(h, max_minutes=limit, instance_count=count, pictures=draft.pictures)
        else:
            instance = find_instance(resources.instance_type)
        try:
            chosen = estimate_on(h, instance, instance_count=count, pictures=draft.pictures)
        except UserError as error:
            more = cheapest_that_fits(h, count, draft.pictures)
            raise UserError([*error.problems[:-1], error.problems[-1] + more]) from None
        return chosen
    return None


def _look_around(account: Account, request: Mapping[str, Any]) -> Known:
    """What the account's last jobs and warm pools say about a request's job. What can't be looked at becomes a
    warning."""
    own, pools = OwnTimes(), list[WarmPool]()
    try:
        own = own_times(account.clients, request)
        pools = find_warm_pools(account.clients, request)
    except ServiceError as error:
        account.warnings.append(f"estimate: more of it is assumed than need be: {error}")
    return Known(account.image_bytes, own, tuple(pools))


def _check_limit(chosen: Estimate, limit: int | None) -> None:
    """Raises UserError where a job is not expected to be done in time, which counts from the start of its instance."""
    if limit is not None and chosen.minutes is not None and chosen.minutes > limit:
        raise UserError(
            f"max_minutes={limit}: the job is expected to take about {in_minutes(chosen.minutes)} on "
            f"{chosen.instance.name}; allow more, train fewer steps, or choose instance_type='auto'"
        )


def _complete(resources: Resources, draft: Draft, account: Account | None) -> Resources:
    """Resources with the role, image, bucket and name that the job will have."""
    found: dict[str, str] = {}
    if resources.bucket is None and resources.output is not None:
        found["bucket"] = S3Uri.parse(resources.output).bucket
    look: dict[str, Callable[[], str]] = {}
    if account is not None:
        look = {"role": account.find_role, "image_uri": account.find_image, "bucket": account.find_bucket}
    for name, standin in _STANDINS.items():
        if getattr(resources, name) is None and name not in found:
            found[name] = standin
            if name in look:
                with draft.problems.collected():
                    found[name] = look[name]()
    if resources.role is not None and not resources.role.startswith("arn:"):
        found["role"] = _STANDINS["role"]
        if account is not None:
            with draft.problems.collected():
                found["role"] = account.complete_role(resources.role)
    if resources.image_uri is not None and account is not None:
        with draft.problems.collected():
            found["image_uri"] = account.complete_image(resources.image_uri)
    if resources.name is None:
        found["name"] = f"dreambooth-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return resources.model_copy(update=found)
