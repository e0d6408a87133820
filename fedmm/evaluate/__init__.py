"""Scores: what a model answers, and whether it is right."""
