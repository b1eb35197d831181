"""Whole jobs built from runs: comparison, demo."""
