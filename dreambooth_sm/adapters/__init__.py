"""Adapters: what was trained beside a model that stays as it is, in memory and in the layouts of their files."""
