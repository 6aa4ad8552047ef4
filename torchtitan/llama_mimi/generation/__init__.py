"""A converted model at work: speech that goes on.

May import: tokens, audio, common.
"""
