"""``launcher.fit``: one call from pictures to a training job, checked before a cent is spent; and its relatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.printing import redact
from launcher import sdks
from launcher.aws.account import Account
from launcher.aws.clients import Clients
from launcher.aws.service_errors import asking
from launcher.draft import LOCAL, ON_THIS_MACHINE
from launcher.estimates import Estimate
from launcher.jobs.job import Job
from launcher.local.run import local_job
from launcher.options import Images, split_options, with_options
from launcher.prepare import PreparedJob, prepare, prepare_local

if TYPE_CHECKING:
    from boto3.session import Session
    from PIL.Image import Image
    from sagemaker.estimator import Estimator
    from sagemaker.train import ModelTrainer


@with_options(instance_type=LOCAL)
def fit(
    images: Images,
    *,
    directory: str | Path | None = None,
    wait: bool = True,
    log: Callable[[str], None] | None = None,
    session: Session | None = None,
    **options: Any,
) -> Job:
    """Trains a Stable Diffusion model on a few pictures of a subject, on this machine or on SageMaker.

    Pictures, hyperparameters, the plan for the card, access to role, image and buckets, and the quota are checked
    first, and every problem is reported at once. Then the pictures go to S3, unless they are there, and the job starts.

    Args:
        images: 4 to 20 pictures: a folder, a list of files, or what lies in S3: a folder, keys with one start, an
            object, a manifest, or a list of these.
        directory: where a local job's ``/opt/ml`` tree is laid out; a temporary directory if left out.
        wait: follow the job until it has ended.
        log: gets each line of the checks and of the job's log; default: printed, with a progress display where a
            terminal or notebook can show one.
        session: boto3's, for credentials and region; default: the standard AWS settings.
        options: see below; ``instance_type="local"`` runs the job as a process of this machine, exactly as the
            container would; ``"local-container"`` runs the image ``image_uri`` with Docker.

    Raises:
        UserError: for bad input, before anything starts.
        JobFailed: with the job's own reason.

    Examples:
        >>> job = fit("duck/", instance_prompt="photo of zwx toy", class_prompt="photo of a toy",
        ...           instance_type="ml.g5.xlarge", max_train_steps=400)  # doctest: +SKIP
    """
    options = {"images": images, "instance_type": LOCAL, **options}
    say = log or print
    if options["instance_type"] in ON_THIS_MACHINE:
        local = prepare_local(options)
        _tell(local.lines(), say)
        return local.submit(directory, wait=wait, log=log)
    prepared = prepare(options, Account(Clients(session)), directory=directory)
    _tell(prepared.lines(), say)
    job = prepared.submit(say)
    return job.wait(log) if wait else job


@with_options(instance_type=LOCAL)
def contact_sheet(images: str | Path, **options: Any) -> Image:
    """Shows what the model will see of a folder: each picture in the shape it is trained in, cropped, with its prompt.

    Args:
        images: folder with 4 to 20 pictures.
        options: of :func:`fit`; none is needed, prompts neither.

    Returns:
        a picture, which a notebook shows.

    Raises:
        UserError: where a job could not use the folder, with everything that is wrong with it.
    """
    from dreambooth_sm.data.check import check_folder, for_folder
    from dreambooth_sm.data.sheet import contact_sheet as draw_sheet

    problems = Problems()
    data, _, values = split_options(options, problems)
    problems.raise_any()
    base = str(data["base_model"]) if "base_model" in data else None
    findings = check_folder(Path(images), for_folder(Path(images), values), name="images", base=base)
    if findings.errors:
        raise UserError(findings.errors)
    return draw_sheet(findings.pictures)


@with_options(instance_type=LOCAL)
def check(
    images: Images, *, log: Callable[[str], None] = print, session: Session | None = None, **options: Any
) -> None:
    """Checks and prints all that :func:`fit` does before a job starts, and starts none.

    Raises:
        UserError: with everything that is in the way of the job.
    """
    options = {"images": images, "instance_type": LOCAL, **options}
    if options["instance_type"] in ON_THIS_MACHINE:
        _tell([*prepare_local(options).lines(), "pictures and hyperparameters are in order"], log)
    else:
        _tell(prepare(options, Account(Clients(session))).lines(), log)


@with_options(instance_type="auto")
def estimate(images: Images | None = None, **options: Any) -> Estimate:
    """The plan, its peak memory, and the expected minutes and dollars of a job. No account is asked.

    Args:
        images: checked if given; a length in epochs depends on their number.

    Raises:
        UserError: where the job could not run like this.

    Examples:
        >>> estimate(instance_prompt="photo of zwx toy", instance_type="ml.g4dn.xlarge").lines()[0]
        'instance: ml.g4dn.xlarge (T4)'
    """
    return prepare({"images": images, **options}, None).estimate


@with_options(instance_type="auto")
def request(images: Images, *, session: Session | None = None, **options: Any) -> dict[str, Any]:
    """The request that :func:`fit` would send: for boto3, Step Functions, Terraform or AWS Batch.

    What it needs of this machine (pictures, a local base model, prompts too long for a hyperparameter) is put into S3,
    unless it is there, so that the request can be sent as it is. With everything in S3, and role, image and bucket
    given, no account is asked.

    Raises:
        UserError: for bad input.

    Examples:
        >>> job = request("s3://bucket/duck", instance_prompt="photo of zwx toy",
        ...               instance_type="ml.g5.xlarge")  # doctest: +SKIP
        >>> boto3.client("sagemaker").create_training_job(**job)  # doctest: +SKIP
    """
    return _staged({"images": images, **options}, session).request


@with_options(instance_type="auto")
def estimator(images: Images, *, session: Session | None = None, **options: Any) -> Estimator:
    """A ready Estimator of the SageMaker SDK 2 (extra ``[estimator]``): ``launcher.estimator(...).fit()``.

    Its ``fit()`` knows the job's inputs and name, and sends the request that :func:`fit` would send.

    Raises:
        UserError: for bad input, or where the SDK is not installed.
    """
    return sdks.estimator(_staged({"images": images, **options}, session).request, session)


@with_options(instance_type="auto")
def model_trainer(images: Images, *, session: Session | None = None, **options: Any) -> ModelTrainer:
    """A ready ModelTrainer of the SageMaker SDK 3 (extra ``[model-trainer]``): ``launcher.model_trainer(...).train()``.

    It sends the request that :func:`fit` would send, but for the name of the job, to which the SDK adds the time.

    Raises:
        UserError: for bad input, or where the SDK is not installed.
    """
    return sdks.model_trainer(_staged({"images": images, **options}, session).request, session)


def _staged(options: Mapping[str, Any], session: Session | None) -> PreparedJob:
    prepared = prepare(options, Account(Clients(session)), thorough=False)
    prepared.stage()
    return prepared


def _tell(lines: Iterable[str], say: Callable[[str], None]) -> None:
    for line in lines:
        say(redact(line))


@dataclass(frozen=True)
class JobSummary:
    """One line of :func:`list_jobs`."""

    name: str
    status: str
    created: datetime
    ended: datetime | None


def attach(name: str, clients: Clients | None = None, *, session: Session | None = None) -> Job:
    """A job that is running or has ended, such as one that an earlier notebook or another program started.

    Args:
        name: of the job.
        clients: of its services; default: those of the session.
        session: boto3's, for credentials and region; default: the standard AWS settings.

    Raises:
        UserError: there is no such job in this account and region.
    """
    here = local_job(name) if clients is None and session is None else None
    job = here or Job(name, clients or Clients(session))
    job.describe()
    return job


def list_jobs(
    *, name_contains: str = "", limit: int = 20, clients: Clients | None = None, session: Session | None = None
) -> list[JobSummary]:
    """The latest training jobs of this account and region, the newest first.

    Args:
        name_contains: only jobs with this in their name.
        limit: how many at most.
        clients: of SageMaker; default: those of the session.
        session: boto3's, for credentials and region; default: the standard AWS settings.
    """
    clients = clients or Clients(session)
    options = {"NameContains": name_contains} if name_contains else {}
    pages = clients("sagemaker").get_paginator("list_training_jobs")
    found = pages.paginate(
        SortBy="CreationTime", SortOrder="Descending", PaginationConfig={"MaxItems": limit}, **options
    )
    with asking("the jobs can't be listed"):
        return [
            JobSummary(
                job["TrainingJobName"], job["TrainingJobStatus"], job["CreationTime"], job.get("TrainingEndTime")
            )
            for page in found
            for job in page["TrainingJobSummaries"]
        ]
