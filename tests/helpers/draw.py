"""Draws with trained models in an environment of its own: ``python draw.py TARGET NAME=DIRECTORY...``.

Writes the pixels of a picture for each model and each way of drawing with it, as float arrays, to TARGET. With
``NAME=DIRECTORY+FILE`` the model draws with an adapter, in one way; with ``NAME=DIRECTORY+`` in this way, without one.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline

# How a model is loaded, and how it then draws: by which name, in how many steps, and a picture of which side in pixels.
# A CPU takes 20 times as long in float16.
LARGE, SMALL = (2, 64), (1, 32)
LOADS: list[tuple[dict[str, torch.dtype], dict[str, tuple[int, int]]]] = [
    ({}, {"bare": LARGE, "small": SMALL}),
    ({"torch_dtype": torch.float32}, {"float32": LARGE}),
    ({"torch_dtype": torch.float16}, {"small float16": SMALL}),
]
# Of them, the one for adapters.
ADAPTER = "small"
# Upper case, a sign that is SDXL's padding, letters of two and four bytes, and a word that is spelled.
PROMPT = "Photo of ZWX toy! café, 🦆"

torch.set_num_threads(1)
pictures = {}
for argument in sys.argv[2:]:
    name, directory = argument.split("=", 1)
    directory, plus, adapter = directory.partition("+")
    for options, each in LOADS:
        ways = {way: how for way, how in each.items() if way == ADAPTER} if plus else each
        if not ways:
            continue
        pipeline = DiffusionPipeline.from_pretrained(directory, **options)
        if adapter:
            folder, _, file = adapter.rpartition("/")
            pipeline.load_lora_weights(folder, weight_name=file)
        pipeline.set_progress_bar_config(disable=True)
        for way, (steps, side) in ways.items():
            drawn = pipeline(
                PROMPT,
                num_inference_steps=steps,
                height=side,
                width=side,
                generator=torch.Generator().manual_seed(1),
                output_type="np",
            )
            pictures[f"{name} {way}"] = drawn.images[0]
np.savez(sys.argv[1], **pictures)
