"""Studies: grids of runs from one file, their cost, their commands and their records.

May import: judging, report, evaluation, training, checkpoint, model, data, tokens, audio, common.
"""
