"""LLaVA's public vocabulary."""

IGNORE_INDEX = -100
"""Label of a token that carries no loss."""
IMAGE_TOKEN_INDEX = -200
"""Id that stands for an image in a tokenised prompt."""
DEFAULT_IMAGE_TOKEN = "<image>"
"""What stands for an image in a prompt's text."""
