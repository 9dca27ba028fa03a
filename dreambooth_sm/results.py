"""The account that a finished job gives of itself: ``report.json``, a model card (``README.md``) and ``report.html``.

Both open with pictures, and fold what few people look up. The page needs nothing but itself: styles, curves and
pictures are part of it.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dreambooth_sm import __build__, __version__
from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.gallery import SUBJECT_FILE, before_and_after, gallery, write_subjects
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.report import Attempt, Reporter
from dreambooth_sm.toybox import SHIPPED

JobFacts = dict[str, Any]

REPORT_FILES = ("README.md", "loss.svg", "report.html", "report.json", SUBJECT_FILE)
_CURVE_FILE = "loss.svg"
# What is told of each subject.
_SUBJECT = ("instance_prompt", "pictures", "class_prompt", "class_pictures")
_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
# Licences by the start of the base model's name, as the hub gives them.
_LICENCES = {start: licence for family in FAMILIES.values() for start, licence in family.facts.licences.items()} | {
    str(directory): "apache-2.0" for directory in SHIPPED.values()
}
_NAMES = {str(directory): name for name, directory in SHIPPED.items()}
# What YAML has to have escaped, beside what JSON escapes: signs that it does not print, and its further line breaks.
_NOT_IN_YAML = re.compile("[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --one: #2563eb; --two: #d97706; --three: #059669; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
figcaption { white-space: nowrap; } table { border-collapse: collapse; }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } figure { margin: 0; } .row { display: flex; flex-wrap: wrap; gap: .8rem; }
figure img { display: block; max-width: 100%; border-radius: 4px; } td img, .row img { width: 12rem; max-width: none; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
code { overflow-wrap: anywhere; } .bar { background: var(--one); height: .8rem; border-radius: 2px; }
"""


def gather_facts(
    base: str,
    subjects: Sequence[Subject],
    h: Hyperparameters,
    plan: Plan,
    report: Reporter,
    step: int,
    directory: Path,
) -> JobFacts:
    """All that the three files tell, as JSON's types: of all attempts, where the job was interrupted.

    Args:
        base: name of the base model.
        step: optimizer steps done.
        directory: the trained model's, which the validation pictures are below.
    """
    steps, attempts = report.training_rows, report.attempts(step)
    licence = next((name for start, name in _LICENCES.items() if base.startswith(start)), None)
    return {
        "model_name": h.model_name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": _NAMES.get(base, base),
        "base_architecture": h.architecture,
        "base_model_licence": licence,
        "subjects": [
            {
                "instance_prompt": subject.prompt,
                "class_prompt": subject.class_prompt,
                "pictures": len(subject.pictures),
                "class_pictures": len(subject.class_pictures),
            }
            for subject in subjects
        ],
        "hyperparameters": h.told(),
        "plan": plan.settings(),
        "plan_notes": list(plan.notes),
        "attempts": [asdict(attempt) for attempt in attempts],
        "phases_seconds": _seconds(attempts),
        "peak_vram_gb": max((float(str(row.get("vram_gb", 0))) for row in steps), default=0.0),
        "peak_host_memory_gb": max(attempt.peak_host_memory_gb for attempt in attempts),
        "steps": steps,
        "candidates": [row for row in report.history if "candidate" in row],
        "verdicts": list(report.verdicts),
        "class_files": sorted(path.relative_to(directory).as_posix() for path in directory.glob("samples/class-*.png")),
        "samples": [
            {
                "step": sample.step,
                "prompt": sample.prompt,
                "seed": sample.seed,
                "file": sample.path.relative_to(directory).as_posix(),
            }
            for sample in sorted(report.samples, key=lambda sample: sample.step)
        ],
        "versions": {
            "dreambooth-sm": __version__,
            "image": __build__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
            "cuda": torch.version.cuda,
        },
    }


def _seconds(attempts: Iterable[Attempt]) -> dict[str, float]:
    """Adds up the seconds of each phase, over all attempts."""
    seconds: dict[str, float] = {}
    for attempt in attempts:
        for name, taken in attempt.seconds.items():
            seconds[name] = round(seconds.get(name, 0.0) + taken, 2)
    return seconds


def write_results(facts: JobFacts, subjects: Sequence[Subject], directory: Path) -> None:
    """Writes the three files, the curve that the model card shows, and some pictures of the subjects."""
    write_subjects(subjects, directory)
    (directory / _CURVE_FILE).write_text(loss_curve(facts["steps"], standalone=True), encoding="utf-8")
    (directory / "report.json").write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(model_card(facts), encoding="utf-8")
    (directory / "report.html").write_text(page(facts, directory), encoding="utf-8")


def model_card(facts: JobFacts) -> str:
    """The model card, with the front matter that the model hub reads."""
    prompts = [subject["instance_prompt"] for subject in facts["subjects"]]
    base, family = facts["base_model"], FAMILIES[facts["base_architecture"]].facts
    method = METHODS[facts["hyperparameters"]["method"]]
    on_hub = _HUB_ID.fullmatch(base)  # the hub takes nothing else
    lines = [
        "---",
        *([f"license: {facts['base_model_licence']}"] if facts["base_model_licence"] else []),
        *([f"base_model: {_yaml(base)}"] if on_hub else []),
        f"instance_prompt: {_yaml(prompts[0])}",
        *(f"{name}: {value}" for name, value in method.hub.items()),
        "pipeline_tag: text-to-image",
        f"tags: [{', '.join((*family.tags, 'text-to-image', 'dreambooth', *method.tags))}]",
        "---",
        "",
        f"# {_markdown(facts['model_name'])}",
        "",
        f"![the subject]({SUBJECT_FILE})",
        "",
        f"The subject: **{_markdown(', '.join(prompts))}**",
    ]
    for prompt, pairs in before_and_after(facts["samples"]).items():
        last = pairs[0][1]["step"]
        lines += ["", f"**{_markdown(prompt)}**", "", f"| before | after step {last} |", "|---|---|"]
        for pair in pairs:
            pictures = (f"![step {each['step']}, seed {each['seed']}]({each['file']})" for each in pair)
            lines.append(f"| {' | '.join(pictures)} |")
    if facts["class_files"]:
        lines += ["", "Class pictures that it was trained with:", ""]
        lines.append(" ".join(f"![class picture]({file})" for file in facts["class_files"]))
    lines += ["", *(f"- {_markdown(verdict)}" for verdict in facts["verdicts"])]
    lines += [
        "",
        f"{_markdown(base)}, {method.title}. Licence of the base model: "
        f"{facts['base_model_licence'] or 'not known; see where it came from'}.",
        "",
        method.usage(family.pipeline, base if on_hub else "the-base-model", prompts[0], facts["hyperparameters"]),
        "",
        f"![loss over the steps]({_CURVE_FILE})",
    ]
    subjects = [tuple(s[key] for key in _SUBJECT) for s in facts["subjects"]]
    for title, head, rows in (
        ("Data", ("prompt", "pictures", "class prompt", "class pictures"), subjects),
        ("Training", ("", ""), _summary(facts)),
        ("Seconds", ("phase", "seconds"), facts["phases_seconds"].items()),
        ("Hyperparameters", ("name", "value"), [p for p in facts["hyperparameters"].items() if p[1] is not None]),
    ):
        lines += ["", f"<details><summary>{title}</summary>", "", _row(head), "|---" * len(head) + "|"]
        lines += [*map(_row, rows), "", "</details>"]
    return "\n".join(lines) + "\n"


def page(facts: JobFacts, directory: Path) -> str:
    """The report as one page.

    Args:
        directory: that the samples' files are relative to.
    """
    shown = {
        "Pictures": gallery(facts, directory),
        "Verdict": "".join(f"<p>{escape(verdict)}</p>" for verdict in facts["verdicts"])
        + _records(facts["candidates"]),
        "Loss and learning rate": loss_curve(facts["steps"]),
    }
    folded = {
        "Summary": _pairs(_summary(facts)),
        "Phases": _phases(facts["phases_seconds"]),
        "Attempts": _records([_flat(a) for a in facts["attempts"]]) if len(facts["attempts"]) > 1 else "",
        "Data": _records(facts["subjects"]),
        "Plan": "".join(f"<p>{escape(note)}</p>" for note in facts["plan_notes"]) + _pairs(facts["plan"].items()),
        "Hyperparameters": _pairs(facts["hyperparameters"].items()),
        "Versions": _pairs(facts["versions"].items()),
    }
    body = [f"<section><h2>{title}</h2>{content}</section>" for title, content in shown.items() if content]
    body += [f"<details><summary>{title}</summary>{content}</details>" for title, content in folded.items() if content]
    name = escape(facts["model_name"])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{name}</title><style>{_STYLE}</style></head><body><h1>{name}</h1>{''.join(body)}</body></html>\n"
    )


def loss_curve(steps: Sequence[Mapping[str, Any]], *, standalone: bool = False) -> str:
    """Losses (left axis) and the learning rate (right axis) over the steps, as SVG.

    Args:
        standalone: whether it is a file of its own rather than part of a page.
    """
    if not steps:
        return ""
    width, height, left, right, top, bottom = 900, 280, 60, 70, 24, 30
    names = {"loss": "--one, #2563eb", "instance_loss": "--two, #d97706", "prior_loss": "--three, #059669"}
    shown = {name: colour for name, colour in names.items() if any(name in row for row in steps)}
    first, last = steps[0]["step"], steps[-1]["step"]
    highest = max(float(row[name]) for row in steps for name in shown if name in row) or 1.0
    fastest = max(float(row.get("lr", 0)) for row in steps) or 1.0

    def line(name: str, most: float, style: str) -> str:
        points = " ".join(
            f"{left + (row['step'] - first) / max(1, last - first) * (width - left - right):.1f},"
            f"{height - bottom - float(row[name]) / most * (height - top - bottom):.1f}"
            for row in steps
            if name in row
        )
        return f'<polyline points="{points}" fill="none" {style}/>'

    parts = [line("lr", fastest, 'stroke="#888" stroke-dasharray="3 3"')]
    for number, (name, colour) in enumerate(shown.items()):
        parts.append(line(name, highest, f'style="stroke: var({colour})" stroke-width="{2 if name == "loss" else 1}"'))
        place = f'x="{left + 110 * number}" y="14"'
        parts.append(f'<text {place} style="fill: var({colour})">{name}</text>')
    for share in (0, 0.5, 1):
        y = height - bottom - share * (height - top - bottom)
        parts.append(f'<path d="M{left} {y}H{width - right}" stroke="#8884"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{highest * share:.3g}</text>')
        parts.append(f'<text x="{width - right + 6}" y="{y + 4}">{fastest * share:.3g}</text>')
    parts.append(f'<text x="{width - right}" y="14" text-anchor="end">learning rate (dashed, right)</text>')
    parts.append(f'<text x="{left}" y="{height - 8}">step {first}</text>')
    parts.append(f'<text x="{width - right}" y="{height - 8}" text-anchor="end">step {last}</text>')
    own = ' xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="11"' if standalone else ""
    label = 'role="img" aria-label="loss and learning rate over the steps"'
    return f'<svg viewBox="0 0 {width} {height}" {label}{own}>{"".join(parts)}</svg>'


def _summary(facts: JobFacts) -> list[tuple[str, Any]]:
    steps = facts["steps"]
    return [
        ("base model", facts["base_model"]),
        ("licence of the base model", facts["base_model_licence"] or "not known"),
        ("finished", facts["finished"]),
        ("steps", facts["attempts"][-1]["last_step"]),
        ("attempts", _attempts(facts["attempts"])),
        ("loss, first and last line", f"{steps[0]['loss']:.4g}, {steps[-1]['loss']:.4g}" if steps else ""),
        ("peak memory of the device, GB", f"{facts['peak_vram_gb']:.2f}"),
        ("peak memory of the host, GB", facts["peak_host_memory_gb"]),
        ("software", ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)),
    ]


def _attempts(attempts: Sequence[Mapping[str, Any]]) -> str:
    """``3, interrupted after steps 400, 650``."""
    stops = [str(attempt["last_step"]) for attempt in attempts[:-1]]
    if not stops:
        return "1"
    return f"{len(attempts)}, interrupted after step{'s' if len(stops) > 1 else ''} {', '.join(stops)}"


def _phases(seconds: Mapping[str, float]) -> str:
    longest = max(seconds.values(), default=0) or 1
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{value:.1f} s</td>'
        f'<td style="width: 30rem"><div class="bar" style="width: {100 * value / longest:.1f}%"></div></td></tr>'
        for name, value in seconds.items()
    )
    return f"<table>{rows}</table>"


def _pairs(pairs: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(f"<tr><th>{escape(str(k))}</th><td><code>{escape(_text(v))}</code></td></tr>" for k, v in pairs)
    return f"<table>{rows}</table>"


def _records(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_text(row.get(name)))}</td>" for name in names) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _flat(attempt: Mapping[str, Any]) -> dict[str, Any]:
    """An attempt as a row of a table."""
    return {
        "started, UTC": attempt["started"][:16].replace("T", " "),
        "steps": f"{attempt['first_step']} to {attempt['last_step']}",
        "seconds": ", ".join(f"{name} {value:.1f}" for name, value in attempt["seconds"].items()),
        "host memory, GB": attempt["peak_host_memory_gb"],
    }


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(_markdown(_text(cell)) for cell in cells) + " |"


def _markdown(text: str) -> str:
    """A text as Markdown shows it: no markup, no entities, no cell borders, no line breaks, no heading or list."""
    text = re.sub(r"([\\`*_\[\]<>|&~$])", r"\\\1", " ".join(text.split()))
    return re.sub(r"^(\d*)([#+.)=-])(?=\s|\2|$)", r"\1\\\2", text)


def _yaml(text: str) -> str:
    """A text as YAML's and JSON's quoted one, with all signs that can be shown."""
    return _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))
