"""Weights that were trained here; README.md is their card."""
