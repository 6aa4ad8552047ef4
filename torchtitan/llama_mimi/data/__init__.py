"""Training data: order of clips, packing, and dataloader."""
