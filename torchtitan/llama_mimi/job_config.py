"""Settings and defaults of this project. ``custom_config_module`` in ``[job]`` merges them into TorchTitan's."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama_mimi.common.choices import Architecture, Precision, VocabularyKind


@dataclass
class Job:
    save_config_file: str | None = "job_config.json"
    """File in dump_folder for the resolved config"""


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
    # TorchTitan's defaults are 300 s and 100 s. A rank can take longer on a slow shared file system.
    init_timeout_seconds: int = 1800
    """Timeout of collectives before the first step, and of all collectives in a resumed run, in seconds"""

    train_timeout_seconds: int = 1800
    """Timeout of collectives after the first step, in seconds"""


@dataclass
class Model:
    vocabulary: VocabularyKind = "llama"
    """Vocabulary; llama: text tokens of the tokenizer in hf_assets_path, and audio tokens; audio: no text tokens"""

    architecture: Architecture = "flattened"
    """Architecture; flattened: a decoder over audio tokens; hierarchical: decoders over frames and over levels"""

    depth_train_fraction: float = 1.0
    """Fraction of frames that train the depth decoder (hierarchical architecture), sampled again in each epoch"""


@dataclass
class Loss:
    level_weights: str = "uniform"
    """Weights of the levels in the loss, scaled to a mean of 1: uniform; semantic:100 (100 for level 0, 1 for others);
    geometric:100 (decays geometrically from 100 at level 0 to 1 at the last); or Q numbers separated by commas"""


@dataclass
class Codec:
    name: str = "kyutai/mimi"
    """Mimi codec, hub id or folder"""

    num_quantizers: int = 4
    """Number of quantizer levels per frame (Q); each level adds 12.5 tokens per second of audio"""

    dtype: Precision = "float32"
    """Precision of the codec; bfloat16 changes about 2 % of the codes"""

    sliding_window: bool = True
    """Limit attention of the codec to 10 s, as in its training; false: no limit, as in released checkpoints"""


@dataclass
class Data:
    task: Literal["a2a", "tts"] = "a2a"
    """Task; a2a: audio only; tts: transcript, then audio"""

    max_audio_seconds: float = 20.0
    """Maximum length of a clip in seconds; longer clips are cut after a whole frame and get no </audio>"""

    packing: Literal["pad", "pack"] = "pad"
    """Content of a training sequence; pad: a clip and padding; pack: several clips, with attention inside each clip"""

    weights: list[float] = field(default_factory=list)
    """Fractions of audio from the corpora in training.dataset; empty: in proportion to their sizes"""

    split: str | None = None
    """Split of training.dataset, if the folder has several, such as train-* and test-*"""

    validation_split: str | None = None
    """Split of validation.dataset, if the folder has several"""

    validation_clips: int = -1
    """Number of clips from the start of validation.dataset, over all ranks; -1 for all clips"""

    audio_column: str = "audio"
    """Column with audio, as structs of bytes and path"""

    text_column: str = "text"
    """Column with transcripts, for the task tts only"""

    shuffle_window: int = 4096
    """Number of clips shuffled together, at least a row group; each worker keeps them in memory (1 GB by default)"""

    max_skip_fraction: float = 0.01
    """Maximum fraction of unusable clips, checked after 100 clips and after each epoch; above it, training stops"""


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
