"""The program of a job, ``container/train.py``, that draws in ten steps and measures in half as many places."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from dreambooth_sm import selection
    from tests.helpers.drawing import draw_otherwise

    selection.PLACES = selection.PLACES[:4]
    draw_otherwise(setattr, steps=10, class_steps=10)
    sys.argv[0] = str(ROOT / "container" / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
