"""A small text-to-image model of toys that comes with the project, and all that it was made with.

``toys`` says what a toy and a photo of it are, and what a caption and a classifier say about it; ``paint`` draws it.
``train`` makes the base model and the ``judge`` again, from pictures that are painted for it.
"""

from pathlib import Path

# What ``pretrained_model_name_or_path`` and ``base_model`` call it.
NAME = "toybox"
# A diffusers directory: a Stable Diffusion pipeline for pictures of 128 pixels.
BASE = Path(__file__).with_name("base")
