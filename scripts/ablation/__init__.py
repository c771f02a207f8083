"""Ablations that anyone can repeat: many small trainings, compared over seeds and images."""
