"""Benchmarks: pairs of clips, how likely a model finds them, accuracies and result files."""
