"""Keeps the libraries' bars and hints out of the log: the job's own lines are the log.

To be imported before diffusers and transformers are; it imports neither.
"""

from __future__ import annotations

import logging
import os
import warnings

for name, value in {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # The container has few cores; tokenizers' threads and a forked process warn otherwise.
    "TOKENIZERS_PARALLELISM": "false",
    # Triton 3.9 warns where nobody says it, and 3.10 will round kernels' sums otherwise.
    "TRITON_DEFAULT_FP_FUSION": "1",
}.items():
    os.environ.setdefault(name, value)
# tqdm's, in a notebook without ipywidgets.
warnings.filterwarnings("ignore", message="IProgress not found")
# diffusers' own, of classes that its own modules make.
warnings.filterwarnings("ignore", message=r"`\w+` is deprecated .* Please import it from `diffusers")
# It asks every job on a newer CPU for a package that only its 4-bit inference would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Turns off the bars that no environment variable reaches."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
