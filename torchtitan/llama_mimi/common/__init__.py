"""Shared helpers: errors, files, the Hugging Face Hub, processes, command lines."""
