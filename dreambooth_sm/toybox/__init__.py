"""Small text-to-image models of toys that come with the project: bases, photos of a subject, and a judge.

Bases and judge have never seen the subject. What made them is ``toybox/`` at the top of the repository; it is not part
of the image or of a wheel, and nothing in here imports it.
"""

from pathlib import Path

# What ``pretrained_model_name_or_path`` and ``base_model`` call them.
NAME, FLOW_NAME = "toybox", "toybox-flow"
# Of their pictures, in pixels.
SIDE = 128
# A diffusers directory: a Stable Diffusion pipeline for pictures of that side.
BASE = Path(__file__).with_name("base")
# A Z-Image pipeline for such pictures, which the image does not have.
FLOW_BASE = Path(__file__).with_name("flow_base")
# Names to directories.
SHIPPED = {NAME: BASE, FLOW_NAME: FLOW_BASE}
# Five photos of a toy for DreamBooth to learn, ``0.png`` to ``4.png``.
PHOTOS = Path(__file__).with_name("teal_hatter")
