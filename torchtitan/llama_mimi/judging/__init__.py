"""Evaluation of continuations: prompts, systems, measures and results."""
