"""``quick_job.py`` that measures six pictures in place of twenty."""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent

if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    from dreambooth_sm import selection

    selection.PLACES, selection.CLASS_PICTURES = selection.PLACES[:2], 4
    runpy.run_path(str(HERE / "quick_job.py"), run_name="__main__")
