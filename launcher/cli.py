"""``dreambooth-launcher``: the client's functions, in the same words."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

from botocore.exceptions import BotoCoreError, ClientError
from pydantic.fields import FieldInfo

import launcher
from dreambooth_sm import __version__, command_line
from dreambooth_sm.command_line import add_options, joined, read_options, read_pairs
from dreambooth_sm.errors import EXIT_OK, Problems, UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.printing import redact
from dreambooth_sm.storage import S3Uri, TransferError
from launcher import endpoint_commands, pipeline_commands, tuning_commands
from launcher.aws.iam import (
    endpoint_policy,
    events_policy,
    execution_policy,
    notebook_policy,
    pipeline_policy,
    pipeline_role_policy,
    registry_policy,
    trust_policy,
)
from launcher.estimates import documented_table, table
from launcher.events.api import DEFAULT_NAME
from launcher.jobs.outputs import ENDED
from launcher.options import Data, all_options, split_options
from launcher.registry.requests import APPROVED, PENDING, REJECTED
from launcher.resources import Resources
from launcher.tuning.ranges import parse_ranges
from launcher.tuning.search import Search

# Options of a search that are not those of a job.
_SEARCH = [field.name for field in fields(Search)]
# Credentials of the environment, which would win over a profile.
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


_FAILURES = (
    launcher.JobFailed,
    launcher.EndpointFailed,
    launcher.ServiceError,
    TransferError,
    BotoCoreError,
    ClientError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    return command_line.run(_run, arguments, _FAILURES, redact)


def _run(arguments: Sequence[str]) -> int:
    options = vars(_parser(everything="--help-all" in arguments).parse_args(arguments))
    command: Callable[..., None] = options.pop("run")
    profile, region = options.pop("aws_profile", None), options.pop("aws_region", None)
    with _aws_settings(profile, region):
        command(**options)
    return EXIT_OK


@contextmanager
def _aws_settings(profile: str | None, region: str | None) -> Iterator[None]:
    """A profile and a region for everything that a command does; a job of this machine inherits them."""
    chosen = {"AWS_PROFILE": profile, "AWS_DEFAULT_REGION": region, "AWS_REGION": region}
    with patch.dict(os.environ, {name: value for name, value in chosen.items() if value}):
        for name in _KEYS if profile else ():
            os.environ.pop(name, None)
        yield


def fit(no_wait: bool, directory: Path | None, **options: Any) -> None:
    job = launcher.fit(**_read(options), directory=directory, wait=not no_wait)
    print(f"model: {job.model_uri}" if not no_wait else f"started: dreambooth-launcher attach {job.name}")


def fleet(
    subjects: str,
    dry_run: bool,
    skip_bad: bool,
    parallel: int,
    subjects_per_job: int | None,
    alternatives: list[str],
    queue: str | None,
    share: str | None,
    priority: int | None,
    attempts: int,
    no_wait: bool,
    directory: Path | None,
    **options: Any,
) -> None:
    how: dict[str, Any] = {
        "skip_bad": skip_bad,
        "parallel": parallel,
        "subjects_per_job": subjects_per_job,
        "alternatives": alternatives,
        "queue": queue,
        "share": share,
        "priority": priority,
        "attempts": attempts,
    }
    if dry_run:
        launcher.check_many(subjects, **how, **_read(options))
        return
    started = launcher.fit_many(subjects, **how, directory=directory, wait=not no_wait, **_read(options))
    _tell_of_fleet(started)


def attach_fleet(name: str, retry: bool, stop: bool, bad_input: bool, no_wait: bool) -> None:
    found = launcher.attach_fleet(name)
    if isinstance(found, launcher.Fleet):
        if retry:
            found.retry(bad_input=bad_input)
        elif stop:
            found.stop()
        if not no_wait:
            found.wait()
    elif stop:
        raise UserError("a fleet on this machine runs in the process that started it: stop that one")
    _tell_of_fleet(found)


def _tell_of_fleet(fleet: Any) -> None:
    """Raises JobFailed where subjects have failed."""
    status = fleet.status()
    print(status.line())
    for subject, place in fleet.models().items():
        print(f"model: {subject}: {place}")
    if status.failed:
        lines = [f"  {subject}: {reason}" for subject, reason in status.failed.items()]
        raise launcher.JobFailed("fleet", "\n".join([f"{len(lines)} subjects failed", *lines]))


def tune(
    ranges: list[str] | None, dry_run: bool, no_wait: bool, directory: Path | None, grid: Path | None, **options: Any
) -> None:
    how = {name: options.pop(name) for name in _SEARCH if name in options}
    asked = {"ranges": parse_ranges(ranges) if ranges else None, **how}
    if dry_run:
        launcher.check_tuning(**asked, **_read(options))
        return
    started = launcher.tune(**asked, directory=directory, wait=not no_wait, **_read(options))
    if no_wait:
        print(f"started: dreambooth-launcher attach_tuning {started.name}")
    else:
        _tell_of_tuning(started, grid)


def attach_tuning(name: str, stop: bool, no_wait: bool, grid: Path | None) -> None:
    found = launcher.attach_tuning(name)
    if stop:
        found.stop()
    if no_wait:
        print(found.status().line())
    else:
        _tell_of_tuning(found.wait(), grid)


def _tell_of_tuning(tuning: launcher.Tuning, grid: Path | None) -> None:
    best = tuning.best
    print(f"best: trial {best.number}: {' '.join(f'--{name} {value}' for name, value in best.values.items())}")
    print(f"model: {tuning.job(best).model_uri}")
    if grid is not None and (sheet := tuning.samples().image()):
        sheet.save(grid)
        print(f"pictures: {grid}")


def pipeline(
    group: str, require: list[str], approval: str, check_instance: str, dry_run: bool, start: bool, **options: Any
) -> None:
    how = {"group": group, "approval": approval, "check_instance": check_instance, "dry_run": dry_run}
    pipeline_commands.make(require, start and not dry_run, {**how, **_read(options)})


def check(**options: Any) -> None:
    launcher.check(**_read(options))


def estimate(**options: Any) -> None:
    read = _read(options)
    for line in launcher.estimate(**read).lines():
        print(line)
    if "instance_type" not in read:
        _, _, values = split_options(read, Problems())
        print(f"\n{table({'this job': Hyperparameters.parse(values)})}")


def instances() -> None:
    print(documented_table())


def request(**options: Any) -> None:
    print(json.dumps(launcher.request(**_read(options)), indent=2))


def iam(
    bucket: str, account: str, region: str, role: str, partition: str, secret: list[str], mlflow: str | None
) -> None:
    S3Uri.parse(f"s3://{bucket}/")
    execution = execution_policy(
        bucket, account=account, region=region, partition=partition, secrets=secret, mlflow=mlflow
    )
    policies = {
        "notebook": notebook_policy(bucket, account=account, region=region, role=role, partition=partition),
        "notebook, for endpoints": endpoint_policy(account=account, region=region, partition=partition),
        "notebook, for the registry": registry_policy(account=account, region=region, partition=partition),
        "notebook, for events": events_policy(account=account, region=region, partition=partition),
        "notebook, for pipelines": pipeline_policy(account=account, region=region, partition=partition),
        "execution": execution,
        "execution, for pipelines": pipeline_role_policy(
            account=account, region=region, role=role, partition=partition
        ),
        "execution role's trust": trust_policy(),
    }
    print(json.dumps(policies, indent=2))


def attach(name: str) -> None:
    print(f"model: {launcher.attach(name).wait().model_uri}")


def register(name: str, group: str, approval: str, base_model: str | None, tags: list[str]) -> None:
    of_group = read_pairs("tags", tags) if tags else None
    package = launcher.attach(name).register(group, approval=approval, base_model=base_model, tags=of_group)
    print(f"package: {package.arn}")


def notify(to: str, jobs: list[str], statuses: list[str], tags: list[str], **options: Any) -> None:
    launcher.notify(to, jobs=jobs, statuses=statuses, tags=read_pairs("tags", tags), log=print, **options)


def stop_notifying(name: str) -> None:
    launcher.stop_notifying(name)
    print(f"{name} is removed, with all that was made for it")


def logs(name: str, follow: bool) -> None:
    for line in launcher.attach(name).logs(follow=follow):
        print(line, flush=True)


def stop(name: str) -> None:
    job = launcher.attach(name)
    if (status := job.status) in ENDED:
        print(f"{name} has ended before: {status}")
        return
    job.stop()
    print(f"{name} is asked to stop; it saves a checkpoint first")


def download(name: str, directory: Path) -> None:
    print(launcher.attach(name).download(directory))


def list_jobs(name_contains: str, limit: int) -> None:
    for job in launcher.list_jobs(name_contains=name_contains, limit=limit):
        print(f"{job.created:%Y-%m-%d %H:%M}  {job.status:10}  {job.name}")


_IN_AN_ACCOUNT = (
    fit,
    fleet,
    attach_fleet,
    tune,
    attach_tuning,
    check,
    request,
    attach,
    logs,
    stop,
    download,
    list_jobs,
    register,
    notify,
    stop_notifying,
    pipeline,
    pipeline_commands.run_pipeline,
    pipeline_commands.delete_pipeline,
    *endpoint_commands.COMMANDS,
)


def _parser(*, everything: bool) -> command_line.Parser:
    parser = command_line.Parser(prog="dreambooth-launcher", description="Starts and follows DreamBooth jobs.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(run: Callable[..., None], name: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=f"{help}.")
        command.set_defaults(run=run)
        if run in _IN_AN_ACCOUNT:
            account = command.add_argument_group("AWS account")
            account.add_argument("--profile", dest="aws_profile", help="of the AWS settings")
            account.add_argument("--region", dest="aws_region", help="of the job, such as us-west-2")
        return command

    for run, function, help in (
        (fit, launcher.fit, "Check everything, start a job and follow it"),
        (check, launcher.check, "Check everything, and start nothing"),
        (estimate, launcher.estimate, "Print plan, memory, minutes and dollars for one instance type, or for all"),
        (request, launcher.request, "Print the job's request as JSON"),
    ):
        command = add(run, run.__name__, help)
        images = "[IMAGES ...]" if run is estimate else "IMAGES ..."
        command.usage = f"dreambooth-launcher {run.__name__} {images} [--NAME VALUE] ..."
        command.add_argument(
            "images", nargs="*" if run is estimate else "+", help=Data.model_fields["images"].description
        )
        default = inspect.signature(function).parameters["instance_type"].default
        add_options(command, _fields(), _group, everything=everything, defaults={"instance_type": default})
        if run is fit:
            command.add_argument("--no_wait", action="store_true", help="only start the job")
            command.add_argument("--directory", type=Path, help="of a job on this machine, which keeps its files there")

    many = add(fleet, "fleet", "Check many subjects, start jobs that train several each, and follow them")
    many.usage = "dreambooth-launcher fleet SUBJECTS [--NAME VALUE] ..."
    many.add_argument("subjects", help="a folder of folders of pictures, or a .csv or .jsonl, here or s3://...")
    own = {name: field for name, field in _fields().items() if not name.startswith("fleet")}
    default = inspect.signature(launcher.fit_many).parameters["instance_type"].default
    add_options(many, own, _group, everything=everything, defaults={"instance_type": default})
    many.add_argument("--dry_run", action="store_true", help="only check, and print minutes and dollars")
    many.add_argument("--skip_bad", action="store_true", help="leave out subjects that can't be trained")
    many.add_argument("--parallel", type=_count, default=4, help="jobs that run at a time; 4 if left out")
    many.add_argument("--subjects_per_job", type=_count, help="at most; chosen by the estimate if left out")
    many.add_argument(
        "--alternatives",
        nargs="+",
        default=[],
        metavar="TYPE",
        help="other instance types, where the first has no room",
    )
    many.add_argument("--queue", help="of AWS Batch for SageMaker training jobs, by name or ARN: all jobs wait there")
    many.add_argument("--share", help="with --queue: its share identifier, where it has a scheduling policy")
    many.add_argument("--priority", type=int, help="with --queue: within the share, 0 to 9999; higher ones first")
    many.add_argument("--attempts", type=_count, default=1, help="with --queue: starts of a job, after faults of AWS")
    many.add_argument("--no_wait", action="store_true", help="only start the jobs that may run now")
    many.add_argument("--directory", type=Path, help="of a fleet on this machine, which keeps its files there")
    followed = add(attach_fleet, "attach_fleet", "Follow a fleet, and start what remains of it")
    followed.add_argument("name", help="of the fleet, the s3:// place of its state, or its directory")
    either = followed.add_mutually_exclusive_group()
    either.add_argument("--retry", action="store_true", help="try failed subjects again, or go on after --stop")
    either.add_argument("--stop", action="store_true", help="stop its jobs, and start no more")
    followed.add_argument("--bad_input", action="store_true", help="with --retry: those with bad input as well")
    followed.add_argument("--no_wait", action="store_true", help="only print how far it is")

    search = add(tune, "tune", "Check everything, search for the best hyperparameters, and follow the trials")
    search.usage = "dreambooth-launcher tune IMAGES ... [--ranges NAME NAME=LEAST..MOST NAME=A,B] [--NAME VALUE] ..."
    search.add_argument("images", nargs="+", help=Data.model_fields["images"].description)
    default = inspect.signature(launcher.tune).parameters["instance_type"].default
    add_options(search, own, _group, everything=everything, defaults={"instance_type": default})
    tuning_commands.add_search(search, _count)
    search.add_argument("--dry_run", action="store_true", help="only check, and print minutes and dollars")
    search.add_argument("--no_wait", action="store_true", help="only start the search")
    search.add_argument("--directory", type=Path, help="of a search on this machine, which keeps its trials there")
    looked_at = add(attach_tuning, "attach_tuning", "Follow a search until it has ended, and print the best values")
    looked_at.add_argument("name", help="of the tuning job")
    looked_at.add_argument("--stop", action="store_true", help="stop its trials, and start no more")
    looked_at.add_argument("--no_wait", action="store_true", help="only print how far it is")
    for command in (search, looked_at):
        command.add_argument("--grid", type=Path, help="file for pictures of the best trials, side by side")

    piped = add(pipeline, "pipeline", "Check everything, and make a pipeline that trains, measures and registers")
    piped.usage = (
        "dreambooth-launcher pipeline IMAGES ... --group GROUP --require MEASURE=NUMBER ... [--NAME VALUE] ..."
    )
    piped.add_argument("images", nargs="+", help=Data.model_fields["images"].description)
    add_options(piped, own, _group, everything=everything, defaults={"instance_type": "auto"})
    pipeline_commands.add_options_of_pipelines(piped)
    pipeline_commands.add_run(add)

    endpoint_commands.add_commands(add, _count)
    add(instances, "instances", "Print what usual jobs need on each instance type, as a Markdown table")
    policies = add(iam, "iam", "Print the least policies of the notebook's role and of the execution role")
    policies.add_argument("bucket", help="that pictures, checkpoints and models lie in")
    policies.add_argument("--account", default="*", help="number of the account")
    policies.add_argument("--region", default="*", help="that jobs run in")
    policies.add_argument("--role", default="dreambooth-sm", help="name of the execution role")
    policies.add_argument("--partition", default="aws", help="aws, aws-cn or aws-us-gov")
    policies.add_argument(
        "--secret",
        action="append",
        default=[],
        help="name of a secret: that of the model hub's token (hf_token_secret), of trackers' keys (tracker_secret)",
    )
    policies.add_argument("--mlflow", help="ARN of the server that mlflow_tracking_uri names")

    add(attach, "attach", "Follow a job until it has ended").add_argument("name", help="of the job")
    kept = add(register, "register", "Put the model of a job into SageMaker's registry")
    kept.add_argument("name", help="of the job")
    kept.add_argument("group", help="of its versions; made if missing")
    kept.add_argument("--approval", default=PENDING, help=f"{PENDING}, {APPROVED} or {REJECTED}")
    kept.add_argument("--base_model", help="that an adapter lies beside: an s3:// prefix or a hub id")
    kept.add_argument("--tags", nargs="+", default=[], help="NAME=VALUE, of a group that is made; or the job's")
    telling = add(notify, "notify", "Let EventBridge tell that jobs have ended, by mail, SNS or a webhook")
    telling.add_argument("to", help="an address of mail, the ARN of a topic of SNS, or https://... of a webhook")
    telling.add_argument("--name", default=DEFAULT_NAME, help="of the rule; begins with dreambooth-sm-")
    telling.add_argument("--jobs", nargs="+", default=["dreambooth-"], help="what the names of jobs begin with")
    telling.add_argument("--statuses", nargs="+", default=list(ENDED), help="of them")
    telling.add_argument("--secret", help="name of the secret whose text a webhook gets as a header")
    telling.add_argument("--header", default="Authorization", help="of that name")
    telling.add_argument("--tags", nargs="+", default=[], help="NAME=VALUE, of rule, topic and role")
    telling.add_argument("--dry_run", action="store_true", help="only print the requests")
    add(stop_notifying, "stop_notifying", "Remove what notify has made").add_argument(
        "name", nargs="?", default=DEFAULT_NAME, help="of the rule"
    )
    log = add(logs, "logs", "Print the log of a job")
    log.add_argument("name", help="of the job")
    log.add_argument("--follow", action="store_true", help="continue until the job has ended")
    add(stop, "stop", "Stop a job, which saves a checkpoint first").add_argument("name", help="of the job")
    fetch = add(download, "download", "Fetch the model of a job that has ended, each file checked")
    fetch.add_argument("name", help="of the job")
    fetch.add_argument("directory", type=Path, help="where the diffusers directory is to lie")
    jobs = add(list_jobs, "list", "List the latest jobs")
    jobs.add_argument("--name_contains", default="", help="only jobs with this in their name")
    jobs.add_argument("--limit", type=_count, default=20, help="how many at most")
    return parser


def _fields() -> dict[str, FieldInfo]:
    return {name: field for name, field in all_options().items() if name != "images"}


def _group(name: str) -> str:
    if name in Hyperparameters.model_fields:
        return Hyperparameters.group_of(name)
    return "Data" if name in Data.model_fields else "Job"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _read(options: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given, as the values that Python code would give."""
    images = {"images": options["images"]} if options.get("images") else {}
    return {name: _value(name, words) for name, words in {**images, **read_options(options, _fields())}.items()}


def _value(name: str, words: list[str]) -> Any:
    if name in ("images", "class_images"):
        return words[0] if len(words) == 1 else words
    if name == "vpc":
        return [each for word in words for each in word.split(",")]
    if name in ("tags", "environment"):
        return read_pairs(name, words) if all("=" in word for word in words) else words
    text = joined(words)
    if name not in Resources.model_fields:
        return text  # the schema reads text as SageMaker hands it over
    kinds = {Resources.model_fields[name].annotation, *get_args(Resources.model_fields[name].annotation)}
    if bool in kinds:
        return {"true": True, "false": False}.get(text.lower(), text)
    return int(text) if text.isdecimal() and str not in kinds else text


if __name__ == "__main__":
    sys.exit(main())
