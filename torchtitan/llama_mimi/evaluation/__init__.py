"""Benchmarks: pairs of clips, their likelihood under a model, accuracies and result files."""
