"""Distributed checkpoints, and models in Hugging Face's format."""
