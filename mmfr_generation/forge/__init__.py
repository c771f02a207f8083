"""Turns a folder of photographs into a data set whose truth is known: real crops, and the same crops forged."""
