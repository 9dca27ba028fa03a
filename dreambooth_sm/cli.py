"""``dreambooth-sm``: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dreambooth_sm import __version__
from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_OK, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dreambooth-sm", description="DreamBooth on SageMaker, or on a laptop.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("hyperparameters", help="print every hyperparameter as a Markdown table")
    demo = commands.add_parser("demo", help="run the whole job on this machine, with an embedded S3 server")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="directory for what the demo makes")
    options = parser.parse_args(arguments)
    try:
        if options.command == "hyperparameters":
            from dreambooth_sm.hyperparameters import markdown_table

            print(markdown_table())
        else:
            from dreambooth_sm.demo import main as run_demo

            run_demo(options.output)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
