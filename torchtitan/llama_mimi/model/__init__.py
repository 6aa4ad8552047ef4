"""The Llama decoder as TorchTitan trains it, the hierarchical model made of two, and their cross-entropy."""
