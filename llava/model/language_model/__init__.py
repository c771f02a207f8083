"""Language models that take images."""
