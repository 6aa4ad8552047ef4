"""From corpora to batches: the order of clips, packing, and the loader."""
