"""Flattened speech language models on Mimi codec codes: everything this project adds to TorchTitan.

Shape suffixes used throughout:

| suffix | axis |
|---|---|
| B | clips in a batch |
| S | audio samples at the codec's rate (24,000 Hz for Mimi) |
| T | codec frames (12.5 frames/s for Mimi) |
| Q | residual quantizer levels; level 0 is the semantic one |
| L | tokens of a flattened sequence |
| V | vocabulary entries |
"""
