"""``dreambooth-sm``: the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dreambooth_sm import __version__, storage
from dreambooth_sm.data.captions import read_dataset_info
from dreambooth_sm.data.check import check_folder
from dreambooth_sm.data.sheet import contact_sheet, table
from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_OK, UserError
from dreambooth_sm.hyperparameters import Hyperparameters, markdown_table, split_arguments
from dreambooth_sm.plan import find_card, make_plan, tier_table

# Stand-ins for what a plan does not depend on.
_ANY_PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="dreambooth-sm", description="DreamBooth on SageMaker, or on a laptop.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("hyperparameters", help="print every hyperparameter as a Markdown table")
    demo = commands.add_parser("demo", help="run the whole job on this machine, with an embedded S3 server")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="directory for what the demo makes")
    plan = commands.add_parser(
        "plan",
        help="print the settings that a card gets",
        description="Prints the settings that a card gets, without the card. Hyperparameters follow as --name value.",
    )
    plan.add_argument(
        "--gpu", help="T4, A10G, L4, V100, L40S, A100-40, H100, ... or a size such as 8GB; all if left out"
    )
    plan.add_argument("--json", action="store_true", help="as JSON")
    convert = commands.add_parser(
        "convert",
        help="convert a model between a diffusers directory and a single file",
        description="Converts a Stable Diffusion 1, 2 or XL model, without a GPU. A target that ends in .safetensors "
        "is one file in the original layout (WebUI, ComfyUI); any other is a diffusers directory.",
    )
    convert.add_argument("source", help=".safetensors or .ckpt file, diffusers directory, s3:// location or hub id")
    convert.add_argument("target", type=Path, help="must not exist")
    convert.add_argument("--precision", choices=["keep", "fp16", "bf16", "fp32"], default="keep", help="of the weights")
    convert.add_argument("--use-ema", action="store_true", help="take the EMA weights that the file carries")
    convert.add_argument(
        "--prediction-type", choices=["epsilon", "v_prediction"], help="what the UNet predicts; found out if left out"
    )
    check = commands.add_parser(
        "check",
        help="check a folder of pictures as a job would, and show what the model will see of it",
        description="Checks a folder of pictures as a job would. Hyperparameters follow as --name value.",
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
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("plan", "check"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.command == "hyperparameters":
            print(markdown_table())
        elif options.command == "plan":
            print_plan(options.gpu, rest, as_json=options.json)
        elif options.command == "convert":
            return run_convert(options)
        elif options.command == "check":
            print_check(options.directory, rest, sheet=options.sheet, as_json=options.json)
        elif options.command == "verify":
            return verify_upload(options.uri, as_json=options.json, requester_pays=options.requester_pays)
        else:
            return run_demo(options.output)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_OK


def print_plan(gpu: str | None, arguments: Sequence[str], *, as_json: bool) -> None:
    """Prints the plan for one card, or the table of all tiers."""
    h = Hyperparameters.parse({**_ANY_PROMPTS, **split_arguments(arguments)})
    if gpu is None:
        print(tier_table(h))
        return
    plan = make_plan(h, find_card(gpu))
    if as_json:
        print(json.dumps({**plan.settings(), "notes": plan.notes}, indent=2))
        return
    for name, value in plan.settings().items():
        print(f"{name:24} {value}")
    for note in plan.notes:
        print(f"- {note}")


def run_convert(options: argparse.Namespace) -> int:
    """Converts a model; 1 where a download failed."""
    from dreambooth_sm.quiet import quiet_libraries
    from dreambooth_sm.storage import TransferError

    quiet_libraries()
    from dreambooth_sm.convert import convert  # imports torch

    try:
        remarks = convert(
            options.source,
            options.target,
            precision=options.precision,
            use_ema=options.use_ema,
            prediction_type=options.prediction_type,
        )
    except TransferError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILURE
    for remark in remarks:
        print(f"warning: {remark}", file=sys.stderr)
    print(options.target)
    return EXIT_OK


def print_check(directory: Path, arguments: Sequence[str], *, sheet: Path | None, as_json: bool) -> None:
    """Prints what a job would find in a folder.

    Raises:
        UserError: where a job can't use it; what was found is printed all the same.
    """
    given = {"instance_data_dir": str(directory), **split_arguments(arguments)}
    h = Hyperparameters.parse({**_ANY_PROMPTS, **read_dataset_info(directory), **given})
    found = check_folder(directory, h)
    if as_json:
        rows = [{**vars(p), "path": str(p.path), "look": f"{p.look:0128x}"} for p in found.pictures]
        print(json.dumps({"errors": found.errors, "warnings": found.warnings, "pictures": rows}, indent=2))
    else:
        print(table(found.pictures, directory), *(f"warning: {line}" for line in found.warnings), sep="\n")
    if sheet and found.pictures:
        try:
            contact_sheet(found.pictures).save(sheet, format="PNG")
        except OSError as error:
            raise UserError([*found.errors, f"--sheet: {sheet} can't be written: {error.strerror}"]) from None
    if found.errors:
        raise UserError(found.errors)


def verify_upload(uri: str, *, as_json: bool, requester_pays: bool) -> int:
    """Prints how the objects differ from their manifest; 1 where they do."""
    source, options = storage.S3Uri.parse(uri), storage.S3Options(requester_pays=requester_pays)
    try:
        found = storage.verify(source, options)
    except storage.TransferError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILURE
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


def run_demo(output: Path) -> int:
    """Runs the demo; 1 where anything of it failed."""
    from dreambooth_sm import demo  # imports torch
    from dreambooth_sm.storage import TransferError
    from launcher import JobFailed

    try:
        demo.main(output)
    except (demo.DemoFailed, JobFailed, TransferError) as error:
        print(f"error: the demo failed: {error}", file=sys.stderr)
        return EXIT_FAILURE
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
