"""Ways to join the CLIP and the DINO branch into the image tokens of the language model."""
