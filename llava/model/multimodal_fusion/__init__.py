"""Ways to join an image's branches into the image tokens of the language model."""
