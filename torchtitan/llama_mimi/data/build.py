"""Build the dataloaders for training and validation from the settings."""

import dataclasses
from typing import Any

from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from llama_mimi.audio.mimi import DTYPES, MimiCodec, load_codec_config, whole_frames
from llama_mimi.common.choices import Task
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.clips import AudioReader
from llama_mimi.corpora.code_shards import CodeCorpus, is_store, read_manifest
from llama_mimi.corpora.formats import open_source
from llama_mimi.corpora.texts import TextCorpus
from llama_mimi.corpora.utterances import UtteranceCorpus
from llama_mimi.data.dataloader import ClipOrder, DataMeter, SpeechDataLoader
from llama_mimi.data.order import RowsInOrder, ShuffledOrder, Stream
from llama_mimi.data.packing import BatchPacker
from llama_mimi.tokens.tokenizer import SpeechTokenizer


def build_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: SpeechTokenizer,
    job_config: Any,
    meter: DataMeter | None = None,
    is_validation: bool = False,
    corpus: str | None = None,
) -> SpeechDataLoader:
    """Build the dataloader for training or validation.

    The training loader is endless and shuffled with ``debug.seed`` (default 0). The validation loader reads the first
    ``data.validation_clips`` clips once, in order. Validation clips are not packed, so that runs with and without
    packing have comparable losses. ``corpus``: one of several validation corpora; the first one includes the texts of
    ``data.validation_text_dataset``.
    """
    data, section = job_config.data, job_config.validation if is_validation else job_config.training
    streams, fractions = open_streams(job_config, section)
    if corpus is not None:
        is_first = corpus == dataset_names(section)[0]
        streams = [some for some in streams if (is_first if some.task == "text" else some.reader.name == corpus)]
        if not streams:
            raise UserError(f"'{corpus}' lacks the columns for data.tasks; remove it from validation.dataset")
    ranks = dp_rank, dp_world_size
    order: ClipOrder
    if is_validation:
        order = RowsInOrder(streams, *ranks, data.validation_clips)
    else:
        order = ShuffledOrder(streams, fractions, *ranks, data.shuffle_window, job_config.debug.seed or 0)
    is_packed, shape = data.packing == "pack", (section.local_batch_size, section.seq_len)
    packer = BatchPacker(tokenizer, *shape, is_packed=is_packed and not is_validation, has_positions=is_packed)
    codec, own = None, job_config.codec
    if any(isinstance(stream.reader, AudioReader) for stream in streams):
        codec = MimiCodec(own.name, own.num_quantizers, device_type, DTYPES[own.dtype], own.sliding_window)
    options = {
        "tasks": data.tasks,
        "workers": dataclasses.asdict(section.dataloader),
        "max_skip_fraction": data.max_skip_fraction,
        "depth_train_fraction": 1.0 if is_validation else job_config.model.depth_train_fraction,
    }
    return SpeechDataLoader(streams, order, packer, codec, meter=meter or DataMeter(), **options)


def dataset_names(section: Any) -> list[str]:
    """Return the list of corpora in ``[training]`` or ``[validation]``. In ``dataset``, commas separate the names."""
    return [name.strip() for name in section.dataset.split(",") if name.strip()]


def chosen_split(job_config: Any, section: Any) -> str | None:
    """Return the split to read for ``[training]`` or ``[validation]``, or None."""
    return job_config.data.split if section is job_config.training else job_config.data.validation_split


def open_streams(job_config: Any, section: Any) -> tuple[list[Stream], list[float]]:
    """Open the corpora of ``[training]`` or ``[validation]`` for each task; return relative numbers of clips."""
    data = job_config.data
    streams: list[Stream] = []
    fractions: list[float] = []
    for task, weight in zip(data.tasks, data.task_weights or [1.0] * len(data.tasks), strict=True):
        if task == "text":
            is_training = section is job_config.training
            name = data.text_dataset if is_training else data.validation_text_dataset
            some = [TextCorpus(name, data.text_column)] if name else []
            of_task = [1.0] * len(some)
        else:
            some, of_task = _open_audio(job_config, section, task)
        streams += [Stream(task, reader) for reader in some]
        fractions += [weight * fraction / sum(of_task) for fraction in of_task]
    return streams, fractions


def _open_audio(job_config: Any, section: Any, task: Task) -> tuple[list[Any], list[float]]:
    """Open the corpora of audio or codes for a task. Folders of codes that lack a needed column are not used."""
    data, codec, names = job_config.data, job_config.codec, dataset_names(section)
    config = load_codec_config(codec.name, codec.num_quantizers)
    max_frames, with_text = whole_frames(data.max_audio_seconds, config), task != "audio"
    text_column, split = data.text_column if with_text else None, chosen_split(job_config, section)
    wanted: dict[str, Any] = {"max_frames": max_frames, "with_text": with_text}
    weights = dict(zip(names, data.weights, strict=True)) if section is job_config.training and data.weights else {}
    if with_text and len(names) > 1:
        needed = ["text", "speaker"] if task == "interleaved" else ["text"]
        usable = [name for name in names if {*needed} <= {*read_manifest(name)["columns"]}]
        if left_out := ", ".join(name for name in names if name not in usable):
            logger.info(f"the task '{task}' does not use {left_out}, because these corpora lack {' or '.join(needed)}")
        names = usable or names[:1]  # to raise the error of a corpus without text or speakers
    readers: list[Any] = []
    for name in names:
        if is_store(name):
            kind = UtteranceCorpus if task == "interleaved" else CodeCorpus
            readers.append(kind(name, codec.name, codec.num_quantizers, codec.sliding_window, **wanted))
        elif task == "interleaved":
            raise UserError(f"the task 'interleaved' needs tokenised corpora; tokenise '{name}', or remove the task")
        else:
            source = open_source(name, section.dataset_path, data.audio_column, text_column, split=split)
            rate_hz, frame_size = config.sampling_rate, config.frame_size
            readers.append(AudioReader(source, sample_rate_hz=rate_hz, frame_size=frame_size, **wanted))
    if not weights or len(readers) == 1:
        return readers, [float(reader.rows_per_unit.sum()) for reader in readers]
    if audio := [reader.name for reader in readers if isinstance(reader, AudioReader)]:
        raise UserError(f"data.weights needs tokenised corpora; tokenise '{audio[0]}', or remove data.weights")
    return readers, [weights[reader.name] / reader.mean_seconds(data.max_audio_seconds) for reader in readers]
