"""Conversion of codes to token ids and token sequences."""
