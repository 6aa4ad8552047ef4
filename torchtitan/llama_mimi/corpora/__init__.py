"""Corpora of recordings: open, read, filter and tokenise them, and store codes."""
