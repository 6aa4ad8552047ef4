"""The Llama decoder as TorchTitan trains it, and its cross-entropy.

May import: tokens, common.
"""
