"""Fleets: many subjects, each trained by itself, one after another, in one job or several."""
