"""Conversion of codes to token ids and sequences."""
