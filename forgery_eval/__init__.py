"""Scores over evaluation sets, inference on images, and reports."""

from llava.interrupts import leave_at_once

leave_at_once()  # before anything that takes long to import
