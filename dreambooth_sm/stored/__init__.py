"""Model files: diffusers directories and single-file checkpoints, in and out, without a second copy in memory."""
