"""Speech language models on Mimi codec codes, flattened or hierarchical: everything this project adds to TorchTitan.

Packages, from the top; a package imports only from lower ones (`tests/test_layout.py`):

| package | contents |
|---|---|
| `train` `train_spec` `job_config` | the entry point, the seams put together, the settings: what users name |
| `study` | many runs as one: which, what they cost, the way of each to its scores |
| `training` | settings and their checks, loss, metrics, validation |
| `checkpoint` | distributed checkpoints, Hugging Face folders, and the way between |
| `judging` | continuations of prompts: systems, measures, results |
| `evaluation` | benchmarks, scores, accuracies, result files |
| `generation` | converted models at work |
| `data` | corpora, order, packing, the loader; making codes of audio |
| `model` | the decoders and their cross-entropy |
| `tokens` | ids, text and sequences of codes |
| `audio` | recordings and Mimi |
| `common` | errors, files, hub, processes, versions |

Shape suffixes used throughout:

| suffix | axis |
|---|---|
| B | clips or rows in a batch |
| S | audio samples at the codec's rate (24,000 Hz for Mimi) |
| T | codec frames (12.5 frames/s for Mimi) |
| Q | residual quantizer levels; level 0 is the semantic one |
| W | ids of a position: 1, or Q in the hierarchical architecture |
| L | tokens of a flattened sequence |
| V | vocabulary entries |
| N | items of any kind, laid end to end: targets, audio tokens, frames of several clips |
| D | width of the model; in attention, of a head |
| H | query heads in attention |
| G | key heads in attention; elsewhere row groups of a corpus |
| K | codes of a level |
"""
