"""The model card of a package, from the report of the job that made the model.

https://docs.aws.amazon.com/sagemaker/latest/dg/model-registry-details.html
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dreambooth_sm.storage import S3Uri

# The schema's own limits.
_DATASETS, _METRICS, _HYPERPARAMETERS = 15, 50, 100
_SHORT, _LONG = 255, 1024
# Of the last line of training.
_MEASURED = ("loss", "instance_loss", "prior_loss", "steps_per_s")


def card_content(
    report: Mapping[str, Any], place: S3Uri, *, image_uri: str, job_arn: str, datasets: list[str]
) -> dict[str, Any]:
    """What the card says, by the schema of model cards of model packages.

    Args:
        report: the job's ``report.json``.
        place: that the model lies below, with its pictures.
        image_uri: that trained it.
        job_arn: of the training job.
        datasets: ``s3://`` locations of its pictures.
    """
    prompts = [str(subject["instance_prompt"]) for subject in report["subjects"]]
    details = {
        "instance prompts": " | ".join(prompts),
        "base model": str(report["base_model"]),
        "licence of the base model": str(report["base_model_licence"] or "not known"),
        "finished": str(report["finished"]),
        "report": str(place / "report.html"),
        "subject": str(place / "subject.jpg"),
        **dict(_pictures(report, place)),
        **{name: str(value) for name, value in report["versions"].items() if value},
    }
    content: dict[str, Any] = {
        "model_overview": {
            "model_creator": f"dreambooth-sm {report['versions'].get('dreambooth-sm', '')}".strip(),
            "model_artifact": [f"{place}/"],
        },
        "intended_uses": {
            "purpose_of_model": f"Draws what it was shown pictures of: {', '.join(prompts)}"[:_LONG],
            "risk_rating": "Unknown",
        },
        "training_details": {
            "training_observations": " ".join(report["verdicts"])[:_LONG],
            "training_job_details": {
                "training_arn": job_arn,
                "training_datasets": datasets[:_DATASETS],
                "training_environment": {"container_image": [image_uri]},
                "training_metrics": _training_metrics(report),
                "hyper_parameters": _hyperparameters(report),
            },
        },
        "additional_information": {"custom_details": {name: text[:_LONG] for name, text in details.items()}},
    }
    if groups := list(_groups(report)):
        verdicts = " ".join(report["verdicts"])[:_LONG]
        job = {"name": "fidelity", "evaluation_observation": verdicts, "metric_groups": groups}
        content["evaluation_details"] = [job]
    return content


def _pictures(report: Mapping[str, Any], place: S3Uri) -> Iterator[tuple[str, str]]:
    """Where validation pictures before and after training lie: of each prompt the first."""
    steps = [sample["step"] for sample in report["samples"]]
    for when, step in (("before", min(steps, default=0)), ("after", max(steps, default=0))):
        prompts: dict[str, str] = {}
        for sample in report["samples"]:
            if sample["step"] == step:
                prompts.setdefault(sample["prompt"], str(place / sample["file"]))
        for number, where in enumerate(prompts.values(), start=1):
            yield f"picture {number}, {when} training", where


def _training_metrics(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    last = report["steps"][-1] if report["steps"] else {}
    found = {name: last[name] for name in _MEASURED if name in last}
    found |= {"steps": report["attempts"][-1]["last_step"], "peak_vram_gb": report["peak_vram_gb"]}
    found |= {f"seconds of {name}": seconds for name, seconds in report["phases_seconds"].items()}
    return [{"name": name, "value": float(value)} for name, value in found.items()][:_METRICS]


def _hyperparameters(report: Mapping[str, Any]) -> list[dict[str, str]]:
    known = {name: value for name, value in report["hyperparameters"].items() if value is not None}
    return [{"name": name, "value": str(value)[:_SHORT]} for name, value in known.items()][:_HYPERPARAMETERS]


def _groups(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The measures of each state of the model that was examined."""
    for row in report["candidates"]:
        measures = {name: value for name, value in row.items() if name != "candidate" and value is not None}
        step = row["candidate"]
        yield {
            "name": f"after step {step}" if step else "before training",
            "metric_data": [{"name": n, "type": "number", "value": float(value)} for n, value in measures.items()],
        }
