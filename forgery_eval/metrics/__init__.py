"""Figures over predictions. Imports no torch."""
