"""Continuations of prompts: prompts, systems, measures, and results.

May import: report, evaluation, generation, data, audio, common.
"""
