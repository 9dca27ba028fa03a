"""``launcher.pipeline``: one call from pictures to a pipeline that trains, measures, and registers what is good."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dreambooth_sm.printing import redact
from launcher.aws.account import Account
from launcher.aws.clients import Clients
from launcher.options import Images, with_options
from launcher.pipelines.pipeline import TrainingPipeline
from launcher.pipelines.prepare import CHECK_INSTANCE, prepare_pipeline
from launcher.pipelines.sdk import sdk_pipeline
from launcher.registry.requests import PENDING

if TYPE_CHECKING:
    from boto3.session import Session

# What a pipeline for one subject can't have.
_NOT_OURS = ("fleet", "fleet_outcomes")


@with_options(instance_type="auto", without=_NOT_OURS)
def pipeline(
    images: Images,
    *,
    group: str,
    require: Mapping[str, float],
    approval: str = PENDING,
    check_instance: str = CHECK_INSTANCE,
    dry_run: bool = False,
    log: Callable[[str], None] = print,
    session: Session | None = None,
    **options: Any,
) -> TrainingPipeline:
    """Makes a SageMaker pipeline: pictures are checked, a model is trained and measured, and registered if it is good.

    All that :func:`fit` checks is checked first; every problem is reported at once. The same call again changes the
    pipeline; one that the launcher has not made is left alone.

    Args:
        images: 4 to 20 pictures, as for :func:`fit`; an execution may have others (``Images``).
        group: of the registry, that models go to; made if it is missing.
        require: measures to what a model has to reach: ``{"score": 0.2}``; the least, of ``prior`` the most.
        approval: of what is registered: ``PendingManualApproval``, ``Approved`` or ``Rejected``.
        check_instance: instance type of the steps before and after the training.
        dry_run: only check, and print the definition as JSON.
        log: gets each line.
        session: boto3's, for credentials and region; default: the standard AWS settings.
        options: of the training job; ``name`` is the pipeline's (``dreambooth-GROUP`` if left out), and ``output`` the
            prefix that all executions have their results below. See below.

    Raises:
        UserError: for bad input, before anything is made.

    Examples:
        >>> made = pipeline("duck/", group="toys", require={"score": 0.2}, instance_prompt="photo of zwx toy",
        ...                 class_prompt="photo of a toy", instance_type="ml.g5.xlarge")  # doctest: +SKIP
        >>> made.start(Images="s3://pictures/cat/", InstancePrompt="photo of zwx cat").wait().package  # doctest: +SKIP
    """
    account = Account(Clients(session))
    prepared = prepare_pipeline(
        {"images": images, "instance_type": "auto", **options},
        group,
        require,
        account,
        approval=approval,
        check_instance=check_instance,
    )
    if dry_run:
        log(json.dumps(prepared.definition, indent=2))
        return TrainingPipeline(prepared.name, account.clients)
    for line in prepared.lines():
        log(redact(line))
    return prepared.submit(log)


@with_options(instance_type="auto", without=_NOT_OURS)
def pipeline_request(
    images: Images,
    *,
    group: str,
    require: Mapping[str, float],
    approval: str = PENDING,
    check_instance: str = CHECK_INSTANCE,
    session: Session | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The request that :func:`pipeline` would send, for boto3's ``create_pipeline`` or Terraform; its files are staged.

    Args:
        options: as for :func:`pipeline`, whose other arguments these are as well.

    Raises:
        UserError: for bad input.
    """
    prepared = prepare_pipeline(
        {"images": images, "instance_type": "auto", **options},
        group,
        require,
        Account(Clients(session)),
        approval=approval,
        check_instance=check_instance,
    )
    prepared.job.stage()
    return prepared.request


def sagemaker_pipeline(request: Mapping[str, Any], session: Session | None = None) -> Any:
    """The pipeline of a request as an object of the SageMaker SDK that is installed, 2 or 3: to add steps to, to
    ``upsert`` and to ``start``.

    Args:
        request: of :func:`pipeline_request`.
        session: boto3's; default: the standard AWS settings.

    Raises:
        UserError: no SDK with pipelines is installed.
    """
    return sdk_pipeline(request, session)


def attach_pipeline(name: str, clients: Clients | None = None, *, session: Session | None = None) -> TrainingPipeline:
    """A pipeline that was made before.

    Args:
        name: of it.
        clients: of its services; default: those of the session.
        session: boto3's, for credentials and region; default: the standard AWS settings.

    Raises:
        UserError: it was not found.
    """
    found = TrainingPipeline(name, clients or Clients(session))
    found.describe()
    return found
