"""A folder for PYTHONPATH: whoever imports torch ends."""

raise SystemExit("torch was imported")
