"""Speech language models on Mimi codec codes, flattened or hierarchical: everything this project adds to TorchTitan.

Packages, from the top; a package imports only from lower floors (`tests/test_layout.py`):

| package | contents |
|---|---|
| `train` `train_spec` `job_config` | entry point, registration with TorchTitan, settings |
| `study` | many runs from one file, and their reports |
| `training` | checks of settings, loss, optimizer, metrics, validation |
| `judging` | metrics of continued prompts |
| `report` | results as tables, plots and pages |
| `checkpoint` | distributed checkpoints, Hugging Face folders, conversion |
| `evaluation` | benchmarks, scores, result files |
| `generation` | continuation of speech by converted models |
| `data` | order, packing, dataloader |
| `model` | the decoders and their cross-entropy |
| `corpora` | formats of corpora, tokenisation, code shards |
| `tokens` | vocabulary and token sequences |
| `audio` | decoding of audio files, and Mimi |
| `common` | errors, files, hub, processes |

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
