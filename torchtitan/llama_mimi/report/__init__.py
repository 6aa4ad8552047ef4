"""Reports: read result files, compare systems, draw plots, and write Markdown and HTML."""
