"""Continuations of prompts: prompts, systems, measures, and results.

May import: evaluation, generation, data, audio, common.
"""
