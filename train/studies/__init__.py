"""Measurements that use the recipe; the recipe knows none of them."""
