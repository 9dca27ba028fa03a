"""The program of a trial of :mod:`benchmarks.tuning`: ``container/train.py``, measured by few pictures in few steps.

``DRAWING_STEPS`` in the environment says in how many; four pictures of the subject and six of its class are measured.
"""

import dataclasses
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from dreambooth_sm import selection
    from dreambooth_sm.families import FAMILIES

    selection.PLACES, selection.CLASS_PICTURES = selection.PLACES[:4], 6
    steps = int(os.environ.get("DRAWING_STEPS", "25"))
    for family in FAMILIES.values():
        drawing = dataclasses.replace(family.facts.drawing, steps=steps, class_steps=steps)
        type(family).facts = dataclasses.replace(family.facts, drawing=drawing)  # type: ignore[assignment, misc]
    sys.argv[0] = str(ROOT / "container" / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
