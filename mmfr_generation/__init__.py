"""Annotation of images, download and building of data sets."""
