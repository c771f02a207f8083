"""Published systems, one package each; ``base`` is what they have in common."""
