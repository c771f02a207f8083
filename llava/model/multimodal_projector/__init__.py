"""Projectors from a tower's width to the language model's."""
