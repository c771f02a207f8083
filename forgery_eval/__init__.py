"""Scores over evaluation sets, inference on images, and reports."""
