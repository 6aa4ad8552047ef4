"""Settings and defaults of this project. ``[job] custom_config_module`` adds them to TorchTitan's settings."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama_mimi.common.choices import Architecture, Precision, VocabularyKind


@dataclass
class Job:
    save_config_file: str | None = "job_config.json"
    """Name of the file in dump_folder that records all settings of the run"""


@dataclass
class Metrics:
    enable_tensorboard: bool = True
    """Log metrics to TensorBoard"""


@dataclass
class Checkpoint:
    verify: bool = True
    """Verify the checksums of a checkpoint when it is loaded"""


@dataclass
class Comm:
    # TorchTitan's defaults are 300 s and 100 s. A rank can take longer on a slow shared file system.
    init_timeout_seconds: int = 1800
    """Timeout of collectives until the first step ends, in seconds; a resumed run keeps this timeout for all steps"""

    train_timeout_seconds: int = 1800
    """Timeout of collectives after the first step, in seconds"""


@dataclass
class Model:
    vocabulary: VocabularyKind = "llama"
    """Vocabulary; 'llama': audio tokens and the text tokens in model.hf_assets_path; 'audio': only audio tokens"""

    architecture: Architecture = "flattened"
    """Architecture; 'flattened': a decoder over tokens; 'hierarchical': one decoder over frames and one over levels"""

    depth_train_fraction: float = 1.0
    """Fraction of frames on which the hierarchical model's depth decoder is trained; the frames change in each epoch"""


@dataclass
class Loss:
    level_weights: str = "uniform"
    """Weights of levels in the loss, scaled to a mean of 1; 'uniform': equal weights; 'semantic:100': 100 for level 0
    and 1 for other levels; 'geometric:100': geometric decay from 100 at level 0 to 1 at the last level; or Q numbers
    separated by commas"""

    text_weight: float = 1.0
    """Weight of a text token in the loss; the mean weight of an audio token is 1"""


@dataclass
class Lora:
    rank: int = 16
    """Rank of the trained updates; used if model.converters is ['lora']"""

    alpha: float = 32.0
    """Updates are multiplied by alpha / rank"""

    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Layers with updates, by their names in Hugging Face models"""

    dropout: float = 0.0
    """Probability of dropout before the updates"""

    train_audio_tokens: bool = False
    """Also train the embeddings and the output rows of audio tokens"""


@dataclass
class Codec:
    name: str = "kyutai/mimi"
    """Mimi codec: hub id or folder"""

    num_quantizers: int = 4
    """Number of quantizer levels per frame (Q); each level adds 12.5 tokens per second of audio"""

    dtype: Precision = "float32"
    """Precision of the codec; bfloat16 changes about 2 % of the codes"""

    sliding_window: bool = True
    """Limit the codec's attention to 10 s, as in Mimi's training; false: unlimited, as in Llama-Mimi's first release"""


@dataclass
class Data:
    tasks: list[str] = field(default_factory=lambda: ["audio"])
    """Training tasks; 'audio': audio only; 'tts': a transcript, then its audio; 'asr': audio, then its transcript;
    'interleaved': consecutive utterances of a speaker, in turn as text and as audio; 'text': documents of
    data.text_dataset"""

    task_weights: list[float] = field(default_factory=list)
    """Relative numbers of clips (documents, groups of utterances) of the tasks; empty: equal numbers"""

    text_dataset: str | None = None
    """Corpus for the task 'text': text files (a document per line), or a data set
    with data.text_column"""

    validation_text_dataset: str | None = None
    """Corpus of text for validation; if unset, validation skips the task 'text'"""

    max_audio_seconds: float = 20.0
    """Maximum length of a clip, in seconds; longer clips are cut after a whole frame and end without </audio>"""

    packing: Literal["pad", "pack"] = "pad"
    """Content of a training sequence; 'pad': one clip and padding; 'pack': clips that do not attend to each other"""

    weights: list[float] = field(default_factory=list)
    """Fraction of audio time from each corpus in training.dataset; empty: each corpus in proportion to its size"""

    split: str | None = None
    """Split to read from training.dataset, such as 'train'; needed only if the dataset has several splits"""

    validation_split: str | None = None
    """Split to read from validation.dataset; needed only if the dataset has several splits"""

    validation_clips: int = -1
    """Number of validation clips of each task, from the start of each corpus, over all ranks; -1: all clips"""

    audio_column: str = "audio"
    """Column with audio; each value is a struct with the fields bytes and path"""

    text_column: str = "text"
    """Column with transcripts, and with the documents of data.text_dataset"""

    shuffle_window: int = 4096
    """Number of clips to shuffle together, rounded to whole row groups; each worker keeps these clips in memory.
    The default number needs about 1 GB per worker"""

    max_skip_fraction: float = 0.01
    """Maximum fraction of unusable clips; training stops if the fraction is higher. The fraction is checked from the
    100th clip on, and after each epoch"""


@dataclass
class Validation:
    patience: int = 0
    """Number of validations without a lower loss on the first corpus after which training stops; 0: no early stop. The
    schedule of the learning rate ends at training.steps, so at an early stop the rate has not decayed"""


@dataclass
class JobConfig:
    job: Job = field(default_factory=Job)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    comm: Comm = field(default_factory=Comm)
    metrics: Metrics = field(default_factory=Metrics)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    lora: Lora = field(default_factory=Lora)
    codec: Codec = field(default_factory=Codec)
    data: Data = field(default_factory=Data)
    validation: Validation = field(default_factory=Validation)


def checkpoint_folder(job_config: Any) -> Path:
    return Path(job_config.job.dump_folder) / job_config.checkpoint.folder
