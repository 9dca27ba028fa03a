"""``dreambooth-sm``: the library's command line, and the demo, which needs the launcher."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dreambooth_sm import cli
from dreambooth_sm.errors import EXIT_FAILURE, EXIT_OK
from dreambooth_sm.storage import TransferError
from launcher.jobs.job import JobFailed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    return cli.main(arguments, run_demo)


def run_demo(output: Path, base_model: str) -> int:
    """Runs the demo; 1 where anything of it failed."""
    from launcher import demo  # brings drawing and numpy

    try:
        demo.main(output, base_model)
    except (demo.DemoFailed, JobFailed, TransferError) as error:
        print(f"error: the demo failed: {error}", file=sys.stderr)
        return EXIT_FAILURE
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
