"""Settings and defaults beside TorchTitan's; ``[job] custom_config_module = "llama_mimi.job_config"`` merges them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama_mimi.audio.mimi import Precision
from llama_mimi.tokens.vocabulary import Architecture, VocabularyKind


@dataclass
class Job:
    save_config_file: str | None = "job_config.json"
    """file in dump_folder for the resolved config"""


@dataclass
class Metrics:
    enable_tensorboard: bool = True
    """Log metrics to TensorBoard"""


@dataclass
class Checkpoint:
    verify: bool = True
    """Compare the checksums of a checkpoint when it is loaded"""


@dataclass
class Comm:
    # All ranks wait for the slowest one, such as on a shared file system. TorchTitan's limits are 300 s and 100 s.
    init_timeout_seconds: int = 1800
    """Timeout of collectives until the first step; in a resumed run, of all collectives"""

    train_timeout_seconds: int = 1800
    """Timeout of collectives after the first step"""


@dataclass
class Model:
    vocabulary: VocabularyKind = "llama"
    """llama: the tokenizer in hf_assets_path with audio tokens added; audio: its special tokens and audio tokens"""

    architecture: Architecture = "flattened"
    """flattened: one decoder over audio tokens; hierarchical: a backbone over frames, a depth decoder over levels"""

    depth_train_fraction: float = 1.0
    """Fraction of the frames that train the depth decoder (hierarchical architecture), drawn again in each epoch"""


@dataclass
class Loss:
    level_weights: str = "uniform"
    """Weights of the levels' losses, scaled to a mean of one: uniform; semantic:100, level 0 weighs 100 times as much
    as each other level; geometric:100, falling from 100 at level 0 to 1 at the last; or Q numbers divided by commas"""


@dataclass
class Codec:
    name: str = "kyutai/mimi"
    """Mimi codec: hub id or folder"""

    num_quantizers: int = 4
    """Q, quantizer levels per frame; each adds 12.5 tokens per second of audio"""

    dtype: Precision = "float32"
    """Precision of the codec; bfloat16 changes about 2 % of the codes"""

    sliding_window: bool = True
    """Attend to the last 10 s, as in Mimi's training; false: to all earlier audio, as released checkpoints"""


@dataclass
class Data:
    task: Literal["a2a", "tts"] = "a2a"
    """a2a: audio alone; tts: the transcript, then the audio"""

    max_audio_seconds: float = 20.0
    """Longer clips are cut here, after a whole frame, and get no </audio>"""

    packing: Literal["pad", "pack"] = "pad"
    """Rows of a training batch: one clip and padding, or clips end to end with attention within each clip only"""

    weights: list[float] = field(default_factory=list)
    """Fractions of audio of the corpora in training.dataset; empty for each in proportion to its size"""

    split: str | None = None
    """Split of training.dataset, if it is a folder with several, such as train-*, test-*"""

    validation_split: str | None = None
    """Split of validation.dataset, if it is a folder with several"""

    validation_clips: int = -1
    """Number of clips of validation.dataset, from its beginning and over all ranks; -1 for all"""

    audio_column: str = "audio"
    """Column of audio{bytes,path} structs"""

    text_column: str = "text"
    """Column of transcripts, read by the task tts only"""

    shuffle_window: int = 4096
    """Clips shuffled together, at least one row group; each worker has them in memory (4,096 of 14 s: 1 GB of FLAC)"""

    max_skip_fraction: float = 0.01
    """Training stops if a larger fraction of the clips cannot be used, checked after 100 clips and after each epoch"""


@dataclass
class JobConfig:
    job: Job = field(default_factory=Job)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    comm: Comm = field(default_factory=Comm)
    metrics: Metrics = field(default_factory=Metrics)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    codec: Codec = field(default_factory=Codec)
    data: Data = field(default_factory=Data)


def checkpoint_folder(job_config: Any) -> Path:
    return Path(job_config.job.dump_folder) / job_config.checkpoint.folder
