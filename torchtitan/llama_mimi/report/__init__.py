"""Reports: result files as one table, comparisons, plots, Markdown and HTML."""
