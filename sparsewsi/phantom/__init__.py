"""Computer-generated slides whose content is known."""
