"""The model: which patches it keeps, and what its language model is given."""
