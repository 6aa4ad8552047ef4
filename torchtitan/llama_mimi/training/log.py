"""Training log without the lines and warnings that a user cannot act on."""

import logging
import re
import warnings

from llama_mimi.common.command_line import is_first_rank

# Beginnings of TorchTitan's log lines, with the reason to hide them.
LINES = {
    "Error running lspci": "TorchTitan guesses the peak FLOP/s; `peak_flops` in metrics.py has its own table",
    "Peak flops undefined": "as above",
    "Peak FLOPS used": "as above: nothing is computed from this number",
    "Building llama_mimi": "60 lines of arguments; hf_assets/config.json of the dump folder has the same values",
    "ENV[TORCH_NCCL_ASYNC_ERROR_HANDLING]": "PyTorch sets this variable itself",
    "model.safetensors.index.json not found": "every model with a single file of weights lacks this index",
    "Mixed precision training is handled by": "the method follows from the parallelism",
    "Successfully created meshes": "repeats the line about the degrees of parallelism",
    "[GC] Initial GC collection": "garbage collection takes no time before the first step",
    "[GC] GC collection invoked by": "the time of the checkpoint includes the garbage collection",
    "Sleeping": "a fixed wait of two seconds at the end of a run",
    "Destroying the purge thread": "the end of the thread that deletes old checkpoints",
}
# Beginnings of PyTorch's warnings, with the reason to hide them.
WARNINGS = {
    "DTensor random operators may not have": "appears on CPUs; the golden run in tests/ shows equal losses on CPUs",
    "DTensor manual_seed()": "as above",
    "Set timeout is now only supported for": "appears on CPUs, because some process groups of CPUs have no timeout",
    "In CPU autocast, but the target dtype": "float32 needs no autocast",
    "Parallelize plan key 'output' could not": "a model with tied embeddings has no output matrix of its own",
    "Torchinductor does not support code": "the rotary embeddings of TorchTitan are complex numbers",
}


def hide_noise() -> None:
    """Hide `LINES` and `WARNINGS`, and on ranks above 0 also TorchTitan's warnings; shorten the prefix of each line."""
    is_first = is_first_rank()

    def is_shown(record: logging.LogRecord) -> bool:
        is_own = "llama_mimi" in record.pathname or record.levelno >= logging.ERROR
        return (is_first or is_own) and not record.getMessage().startswith(tuple(LINES))

    for handler in logging.getLogger().handlers:
        handler.addFilter(is_shown)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for beginning in WARNINGS:
        warnings.filterwarnings("ignore", re.escape(beginning))
