"""Features of many slides."""
