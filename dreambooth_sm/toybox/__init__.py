"""A small text-to-image model of toys that comes with the project: its base, photos of a subject, and its judge.

The base and the judge have never seen the subject. What made them is ``toybox/`` at the top of the repository; it is
no part of the image or of a wheel, and nothing in here imports it.
"""

from pathlib import Path

# What ``pretrained_model_name_or_path`` and ``base_model`` call it.
NAME = "toybox"
# Of its pictures, in pixels.
SIDE = 128
# A diffusers directory: a Stable Diffusion pipeline for pictures of that side.
BASE = Path(__file__).with_name("base")
# Five photos of a toy for DreamBooth to learn, ``0.png`` to ``4.png``.
PHOTOS = Path(__file__).with_name("teal_hatter")
