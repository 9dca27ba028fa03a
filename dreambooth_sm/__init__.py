"""DreamBooth fine-tuning of Stable Diffusion as a production job."""

import os

__version__ = "0.1.0"
# Tag of the image that this runs in, which no other build has; None outside of one.
__build__ = os.environ.get("DREAMBOOTH_SM_BUILD") or None

from dreambooth_sm import runtime  # noqa: F401 - before any module of ours imports torch
