"""Bags: the patches of a slide, encoded; from a slide or from a feature file."""
