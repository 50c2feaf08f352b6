"""From a selection to an answer, its evidence and its files."""
