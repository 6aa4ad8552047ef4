"""The Llama decoder, the hierarchical model of two decoders, and their cross-entropy."""
