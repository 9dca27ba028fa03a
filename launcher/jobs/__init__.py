"""Jobs after their start: state, log, progress, and what they leave."""
