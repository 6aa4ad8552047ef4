"""Build the dataloaders for training and validation from the settings."""

import dataclasses
from typing import Any

from torchtitan.tools.utils import device_type

from llama_mimi.audio.mimi import DTYPES, MimiCodec, load_codec_config, whole_frames
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.clips import AudioReader
from llama_mimi.corpora.code_shards import CodeCorpus, is_store
from llama_mimi.corpora.formats import open_source
from llama_mimi.data.dataloader import ClipOrder, DataMeter, SpeechDataLoader
from llama_mimi.data.order import ClipReader, RowsInOrder, ShuffledOrder
from llama_mimi.data.packing import BatchPacker
from llama_mimi.tokens.tokenizer import SpeechTokenizer


def build_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: SpeechTokenizer,
    job_config: Any,
    meter: DataMeter | None = None,
    is_validation: bool = False,
) -> SpeechDataLoader:
    """Build the dataloader for training or validation.

    The training loader is endless and shuffled with ``debug.seed`` (default 0). The validation loader reads the first
    ``data.validation_clips`` clips once, in order. Validation clips are not packed, so that runs with and without
    packing have comparable losses.
    """
    data, section = job_config.data, job_config.validation if is_validation else job_config.training
    readers = open_readers(job_config, section)
    ranks = dp_rank, dp_world_size
    order: ClipOrder
    if is_validation:
        order = RowsInOrder(readers[0].rows_per_unit, *ranks, data.validation_clips)
    else:
        fractions = _clip_fractions(readers, data.weights, data.max_audio_seconds)
        order = ShuffledOrder(readers, fractions, *ranks, data.shuffle_window, job_config.debug.seed or 0)
    is_packed, shape = data.packing == "pack", (section.local_batch_size, section.seq_len)
    packer = BatchPacker(tokenizer, *shape, is_packed=is_packed and not is_validation, has_positions=is_packed)
    codec, own = None, job_config.codec
    if any(isinstance(reader, AudioReader) for reader in readers):
        codec = MimiCodec(own.name, own.num_quantizers, device_type, DTYPES[own.dtype], own.sliding_window)
    options = {
        "workers": dataclasses.asdict(section.dataloader),
        "max_skip_fraction": data.max_skip_fraction,
        "depth_train_fraction": 1.0 if is_validation else job_config.model.depth_train_fraction,
    }
    return SpeechDataLoader(readers, order, packer, codec, meter=meter or DataMeter(), **options)


def dataset_names(section: Any) -> list[str]:
    """Return the list of corpora in ``[training]`` or ``[validation]``. In ``dataset``, commas separate the names."""
    return [name.strip() for name in section.dataset.split(",") if name.strip()]


def chosen_split(job_config: Any, section: Any) -> str | None:
    """Return the split to read for ``[training]`` or ``[validation]``, or None."""
    return job_config.data.split if section is job_config.training else job_config.data.validation_split


def open_readers(job_config: Any, section: Any) -> list[ClipReader]:
    """Open each corpus of ``[training]`` or ``[validation]``, as audio or as codes."""
    data, codec = job_config.data, job_config.codec
    config = load_codec_config(codec.name, codec.num_quantizers)
    max_frames, with_text = whole_frames(data.max_audio_seconds, config), data.task == "tts"
    text_column, split = data.text_column if with_text else None, chosen_split(job_config, section)
    wanted: dict[str, Any] = {"max_frames": max_frames, "with_text": with_text}
    readers: list[ClipReader] = []
    for name in dataset_names(section):
        if is_store(name):
            readers.append(CodeCorpus(name, codec.name, codec.num_quantizers, codec.sliding_window, **wanted))
        else:
            source = open_source(name, section.dataset_path, data.audio_column, text_column, split=split)
            rate_hz, frame_size = config.sampling_rate, config.frame_size
            readers.append(AudioReader(source, sample_rate_hz=rate_hz, frame_size=frame_size, **wanted))
    return readers


def _clip_fractions(readers: list[ClipReader], weights: list[float], max_audio_seconds: float) -> list[float]:
    """Return the relative number of clips to draw from each corpus. ``weights``: their fractions of the audio time."""
    if not weights or len(readers) == 1:
        return [float(reader.rows_per_unit.sum()) for reader in readers]
    fractions = []
    for weight, reader in zip(weights, readers, strict=True):
        if not isinstance(reader, CodeCorpus):
            raise UserError(f"data.weights needs tokenised corpora; tokenise '{reader.name}', or remove data.weights")
        fractions.append(weight / reader.mean_seconds(max_audio_seconds))
    return fractions
