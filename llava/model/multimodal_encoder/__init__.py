"""Vision towers; ``builder`` has the registry."""
