"""What a run saves: distributed checkpoints, and the same model in Hugging Face's format."""
