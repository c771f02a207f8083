"""Metrics of predictions. Imports no torch."""
