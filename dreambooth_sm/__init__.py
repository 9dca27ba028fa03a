"""DreamBooth fine-tuning of Stable Diffusion as a production job."""

__version__ = "0.1.0"
