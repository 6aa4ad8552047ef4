"""Continuations of prompts: prompts, systems, measures, and results."""
