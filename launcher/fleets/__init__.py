"""Fleets: from a list of subjects to jobs that train them all, and their state in S3."""
