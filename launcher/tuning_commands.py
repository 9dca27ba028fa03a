"""The options of ``dreambooth-launcher tune`` that say how is searched."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from launcher.tuning.search import OBJECTIVES, STRATEGIES


def add_search(command: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """Adds them to a command.

    Args:
        count: reads a whole number from 1.
    """
    group = command.add_argument_group("Search")
    group.add_argument(
        "--ranges",
        nargs="+",
        metavar="RANGE",
        help="NAME: its own range; NAME=1e-5..1e-3, NAME=4..64:linear, NAME=a,b. Left out: all that have one, belong "
        "to the method, and are not set",
    )
    group.add_argument("--objective", default="score", help=f"{', '.join(OBJECTIVES)}; score if left out")
    group.add_argument("--strategy", default="bayesian", help=f"{', '.join(STRATEGIES)}; bayesian if left out")
    group.add_argument("--max_trials", type=count, help="in all; 12 if left out")
    group.add_argument("--parallel", type=count, default=2, help="trials at a time; 2 if left out")
    group.add_argument("--early_stopping", action="store_true", help="stop trials that fall behind the others' median")
    group.add_argument("--warm_start", nargs="+", default=[], metavar="NAME", help="earlier searches that count")
    group.add_argument("--same_data", action="store_true", help="with --warm_start: had the same pictures and image")
    group.add_argument("--target", type=float, help="end when a trial is as good as this")
    group.add_argument("--patience", type=count, help="end when so many trials were not better, 3 or more")
    group.add_argument("--until_convergence", action="store_true", help="end when SageMaker expects nothing better")
    group.add_argument("--max_total_minutes", type=count, help="end after so many")
    group.add_argument("--search_seed", type=int, help="of the values that are drawn")
