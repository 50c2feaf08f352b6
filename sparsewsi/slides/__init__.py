"""Slides: what a file is, its resolution, its pixels, where its tissue lies."""
