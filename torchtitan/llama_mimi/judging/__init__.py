"""Continuations judged: prompts, what is beside them in a table, measures of sound and of what is said, results.

May import: evaluation, generation, data, audio, common.
"""
