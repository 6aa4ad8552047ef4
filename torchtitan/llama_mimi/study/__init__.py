"""Studies: grids of runs from one file, their cost, their commands and their records."""
