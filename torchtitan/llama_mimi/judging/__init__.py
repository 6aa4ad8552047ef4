"""Evaluation of continued prompts: prompts, systems, measures and results."""
