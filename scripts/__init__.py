"""Commands to test, measure and convert."""
