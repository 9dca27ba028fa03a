"""Model files: diffusers directories and single files, in and out, without a second copy in memory."""
