"""Corpora of audio and of codes, the order they are read in, and rows of a batch; making codes of audio."""
