"""Result files as one table, comparisons with pictures, Markdown and HTML.

May import: evaluation, audio, common.
"""
