"""Helpers for errors, files, the Hugging Face Hub, processes and command lines."""
