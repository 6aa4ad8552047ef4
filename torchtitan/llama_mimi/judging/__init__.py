"""Continuations judged: prompts, what is beside them in a table, measures of sound and of what is said, results.

May import: report, evaluation, generation, data, audio, common.
"""
