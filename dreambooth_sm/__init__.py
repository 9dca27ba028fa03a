"""DreamBooth fine-tuning of Stable Diffusion as a production job."""

__version__ = "0.1.0"

from dreambooth_sm import runtime  # noqa: F401 - before any module of ours imports torch
