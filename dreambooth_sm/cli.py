"""``dreambooth-sm``: the command line, but for the demo, which :mod:`launcher.tool` adds."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dreambooth_sm import __version__, command_line, storage
from dreambooth_sm.command_line import add_options, joined, read_options
from dreambooth_sm.data.check import ANY_PROMPTS, check_folder, for_folder
from dreambooth_sm.data.sheet import contact_sheet, table
from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_OK, UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.docs import markdown_table
from dreambooth_sm.planning.cards import find_card
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.planning.table import tier_rows, tier_table
from dreambooth_sm.toybox import FLOW_NAME, NAME, SHIPPED

# `check` takes the directory as a word of its own.
_FIELDS = {name: field for name, field in Hyperparameters.model_fields.items() if name != "instance_data_dir"}


Demo = Callable[[Path, str], int]


def main(arguments: Sequence[str] | None = None, demo: Demo | None = None) -> int:
    """Runs one command; returns its exit code.

    Args:
        arguments: default: those of the process.
        demo: runs the demo, which needs the launcher, in a directory with a base model that comes with the project, and
            returns the exit code; None leaves the command out.
    """
    return command_line.run(lambda words: _run(words, demo), arguments, (storage.TransferError,))


def _run(arguments: Sequence[str], demo: Demo | None) -> int:
    options = _parser(everything="--help-all" in arguments, demo=demo is not None).parse_args(arguments)
    if options.command == "hyperparameters":
        print(markdown_table(Hyperparameters))
    elif options.command == "plan":
        print_plan(options.gpu, _hyperparameters(options), as_json=options.json)
    elif options.command == "convert":
        run_convert(options)
    elif options.command == "describe":
        print_description(options.source, as_json=options.json)
    elif options.command == "check":
        return print_check(options.directory, _hyperparameters(options), sheet=options.sheet, as_json=options.json)
    elif options.command == "verify":
        return verify_upload(options.uri, as_json=options.json, requester_pays=options.requester_pays)
    elif demo:
        return demo(options.output, options.base_model)
    return EXIT_OK


def _parser(*, everything: bool, demo: bool = False) -> command_line.Parser:
    parser = command_line.Parser(prog="dreambooth-sm", description="DreamBooth on SageMaker, or on a laptop.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("hyperparameters", help="print every hyperparameter as a Markdown table")
    if demo:
        show = commands.add_parser("demo", help="run the whole job on this machine, with an embedded S3 server")
        show.add_argument("--output", type=Path, default=Path("demo-output"), help="directory for what the demo makes")
        show.add_argument(
            "--base-model",
            choices=SHIPPED,
            default=NAME,
            help=f"{NAME} is trained whole; {FLOW_NAME}, which matches flows, by LoRA (default: {NAME})",
        )
    plan = commands.add_parser(
        "plan",
        help="print the settings that a card gets",
        description="Prints the settings that a card gets, without the card. Hyperparameters are flags as well.",
    )
    plan.add_argument(
        "--gpu", help="T4, A10G, L4, V100, L40S, A100-40, H100, ... or a size such as 8GB; all if left out"
    )
    plan.add_argument("--json", action="store_true", help="as JSON")
    convert = commands.add_parser(
        "convert",
        help="convert a model between a diffusers directory and a single file, or an adapter between layouts",
        description="Converts a Stable Diffusion 1, 2 or XL model, without a GPU. A target that ends in .safetensors "
        "is one file in the original layout (WebUI, ComfyUI); any other is a diffusers directory. An adapter, such as "
        "a LoRA, is converted between the layouts of its files, or put into a model.",
    )
    convert.add_argument(
        "source", help=".safetensors or .ckpt file, diffusers directory, s3:// location or hub id; or an adapter's file"
    )
    convert.add_argument("target", type=Path, help="must not exist")
    convert.add_argument("--precision", choices=["keep", "fp16", "bf16", "fp32"], default="keep", help="of the weights")
    convert.add_argument("--use-ema", action="store_true", help="take the EMA weights that the file carries")
    convert.add_argument(
        "--prediction-type", choices=["epsilon", "v_prediction"], help="what the UNet predicts; found out if left out"
    )
    convert.add_argument(
        "--parts", metavar="MODEL", help="what the other parts come from, where a model is a file of its denoiser alone"
    )
    convert.add_argument(
        "--layout",
        choices=["diffusers", "kohya", "comfyui"],
        help="of an adapter's file: diffusers, or what other programs read: kohya (WebUI, ComfyUI and diffusers), of "
        "transformers comfyui (ComfyUI and diffusers); the other one if left out",
    )
    convert.add_argument("--merge-into", metavar="BASE", help="write this base model with the adapter in it")
    convert.add_argument("--strength", type=float, help="of the adapter in the base model; 1 if left out")
    convert.add_argument("--extract-from", metavar="BASE", help="write a LoRA of what the model differs in from this")
    convert.add_argument("--rank", type=int, help="of that LoRA; 32 if left out")
    describe = commands.add_parser(
        "describe",
        help="say what a file is: an adapter, a model, or something else",
        description="Says what a file is. Of an adapter: its kind, layout, base model, rank, alpha and layers.",
    )
    describe.add_argument("source", help="file, diffusers directory or s3:// location")
    describe.add_argument("--json", action="store_true", help="as JSON")
    check = commands.add_parser(
        "check",
        help="check a folder of pictures as a job would, and show what the model will see of it",
        description="Checks a folder of pictures as a job would. Hyperparameters are flags as well.",
    )
    check.add_argument("directory", type=Path, help="folder with the pictures of the subject")
    check.add_argument("--sheet", type=Path, help="PNG to draw what the model will see into")
    check.add_argument("--json", action="store_true", help="as JSON")
    verify = commands.add_parser(
        "verify",
        help="compare what lies in S3 with its manifest",
        description="Compares the objects below a prefix with their manifest: sizes and checksums.",
    )
    verify.add_argument("uri", help="s3://bucket/prefix that a model was uploaded to")
    verify.add_argument("--json", action="store_true", help="as JSON")
    verify.add_argument("--requester-pays", action="store_true", help="pay for the requests yourself")
    for command in (plan, check):
        add_options(command, _FIELDS, Hyperparameters.group_of, everything=everything)
        command.usage = f"{command.prog} {'[--gpu GPU]' if command is plan else 'DIRECTORY [--sheet PNG]'} [--json] "
        command.usage += "[--NAME VALUE] ..."
    return parser


def _hyperparameters(options: argparse.Namespace) -> dict[str, str]:
    return {name: joined(words) for name, words in read_options(vars(options), _FIELDS).items()}


def print_plan(gpu: str | None, hyperparameters: Mapping[str, str], *, as_json: bool) -> None:
    """Prints the plan for one card, or the table of all tiers."""
    h = Hyperparameters.parse({**ANY_PROMPTS, **hyperparameters})
    if gpu is None:
        print(json.dumps(tier_rows(h), indent=2) if as_json else tier_table(h))
        return
    plan = make_plan(h, find_card(gpu))
    if as_json:
        print(json.dumps({**plan.settings(), "notes": plan.notes}, indent=2))
        return
    for name, value in plan.settings().items():
        print(f"{name:24} {value}")
    for note in plan.notes:
        print(f"- {note}")


def run_convert(options: argparse.Namespace) -> None:
    """Converts a model, and prints where it lies."""
    from dreambooth_sm.quiet import quiet_libraries

    quiet_libraries()
    from dreambooth_sm.convert import convert, extract_from, merge_into  # imports torch

    _check_together(options)
    source, target, precision, parts = options.source, options.target, options.precision, options.parts
    if options.merge_into:
        strength = 1.0 if options.strength is None else options.strength
        remarks = merge_into(source, options.merge_into, target, strength=strength, precision=precision, parts=parts)
    elif options.extract_from:
        rank = 32 if options.rank is None else options.rank
        base = options.extract_from
        layout = options.layout
        remarks = extract_from(source, base, target, rank=rank, precision=precision, layout=layout, parts=parts)
    else:
        remarks = convert(
            source,
            target,
            precision=precision,
            use_ema=options.use_ema,
            prediction_type=options.prediction_type,
            layout=options.layout,
            parts=parts,
        )
    for remark in remarks:
        print(f"warning: {remark}", file=sys.stderr)
    print(options.target)


def _check_together(options: argparse.Namespace) -> None:
    """Raises UserError for options of ``convert`` that do not belong together."""
    merge, extract = options.merge_into, options.extract_from
    problems = []
    if merge and extract:
        problems.append("--merge-into takes an adapter, and --extract-from makes one: leave one of both out")
    if (merge or extract) and (options.use_ema or options.prediction_type):
        problems.append("--use-ema and --prediction-type are for models that are converted: convert the model first")
    if merge and options.layout:
        problems.append("--layout is of an adapter's file, and --merge-into writes a model: leave it out")
    if options.strength is not None and not merge:
        problems.append("--strength belongs to --merge-into: name the base model there")
    if options.rank is not None and not extract:
        problems.append("--rank belongs to --extract-from: name the base model there")
    if problems:
        raise UserError(problems)


def print_description(source: str, *, as_json: bool) -> None:
    """Prints what a file is."""
    from dreambooth_sm.quiet import quiet_libraries

    quiet_libraries()
    from dreambooth_sm.describe import describe  # imports torch

    found = describe(source)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for title, words in found.items():
            print(f"{title:16} {words}")


def print_check(directory: Path, hyperparameters: Mapping[str, str], *, sheet: Path | None, as_json: bool) -> int:
    """Prints what a job would find in a folder; 2 where it can't use it."""
    given = {"instance_data_dir": str(directory), **hyperparameters}
    found = check_folder(directory, for_folder(directory, given))
    errors = list(found.errors)
    if sheet and found.pictures:
        try:
            contact_sheet(found.pictures).save(sheet, format="PNG")
        except OSError as error:
            errors.append(f"--sheet: {sheet} can't be written: {error.strerror}")
    if as_json:
        rows = [{**vars(p), "path": str(p.path), "look": f"{p.look:0128x}"} for p in found.pictures]
        print(json.dumps({"errors": errors, "warnings": found.warnings, "pictures": rows}, indent=2))
    else:
        print(table(found.pictures, directory), *(f"warning: {line}" for line in found.warnings), sep="\n")
    for problem in errors:
        print(f"error: {problem}", file=sys.stderr)
    return EXIT_BAD_INPUT if errors else EXIT_OK


def verify_upload(uri: str, *, as_json: bool, requester_pays: bool) -> int:
    """Prints how the objects differ from their manifest; 1 where they do."""
    source, options = storage.S3Uri.parse(uri), storage.S3Options(requester_pays=requester_pays)
    found = storage.verify(source, options)
    findings = {"missing": found.missing, "different": found.different, "unknown": found.unknown}
    manifest = found.manifest
    if as_json:
        about = {"job": manifest.job, "step": manifest.step, "created": manifest.created}
        sizes = {"files": len(manifest.files), "bytes": manifest.size}
        print(json.dumps({"uri": str(source), "whole": found.whole, **about, **sizes, **findings}, indent=2))
    else:
        for kind, names in findings.items():
            for name in names:
                print(f"{kind:10} {name}")
        verdict = "whole" if found.whole else "NOT whole"
        print(f"{source}: {verdict}: {len(manifest.files)} files, {manifest.size:,} bytes, of {manifest.created}")
    return EXIT_OK if found.whole else EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
