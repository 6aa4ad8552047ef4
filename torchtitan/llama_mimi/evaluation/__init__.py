"""Benchmarks: read pairs of clips, score the clips with a model, compute accuracies and write result files."""
