"""Pictures, prompts and class images, and what of them stays on the device while training."""
