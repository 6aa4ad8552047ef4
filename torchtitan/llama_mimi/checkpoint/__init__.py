"""Distributed checkpoints, and models in the format of Hugging Face."""
