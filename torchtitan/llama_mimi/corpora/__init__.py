"""Corpora of recordings: open, read, filter, tokenise, and store as codes."""
