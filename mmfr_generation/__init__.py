"""Annotation of images, download and building of data sets."""

from llava.interrupts import leave_at_once

leave_at_once()  # before anything that takes long to import
