"""Draws with trained models in an environment of its own: ``python draw.py TARGET NAME=DIRECTORY...``.

Writes the pixels of a picture for each model and each way of drawing with it, as float arrays, to TARGET. With
``NAME=DIRECTORY+FILE`` the model draws with an adapter, in one way; with ``NAME=DIRECTORY+`` in this way, without one.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline

# The type that a model is loaded in, steps, and the picture's side in pixels: a CPU takes 20 times as long in float16.
LOADS: dict[str, tuple[dict[str, torch.dtype], int, int]] = {
    "bare": ({}, 3, 64),
    "float32": ({"torch_dtype": torch.float32}, 3, 64),
    "small": ({}, 1, 32),
    "small float16": ({"torch_dtype": torch.float16}, 1, 32),
}
# Of them, the one for adapters.
ADAPTER = "small"
# Upper case, a sign that is SDXL's padding, letters of two and four bytes, and a word that is spelled.
PROMPT = "Photo of ZWX toy! café, 🦆"

torch.set_num_threads(1)
pictures = {}
for argument in sys.argv[2:]:
    name, directory = argument.split("=", 1)
    directory, plus, adapter = directory.partition("+")
    for load, (options, steps, side) in LOADS.items():
        if plus and load != ADAPTER:
            continue
        pipeline = DiffusionPipeline.from_pretrained(directory, **options)
        if adapter:
            folder, _, file = adapter.rpartition("/")
            pipeline.load_lora_weights(folder, weight_name=file)
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(
            PROMPT,
            num_inference_steps=steps,
            height=side,
            width=side,
            generator=torch.Generator().manual_seed(1),
            output_type="np",
        )
        pictures[f"{name} {load}"] = drawn.images[0]
np.savez(sys.argv[1], **pictures)
