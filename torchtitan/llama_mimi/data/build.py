"""From the settings to the loaders of training and validation: which corpora, as audio or as codes, in which order."""

import dataclasses
from typing import Any

import torch
from torchtitan.tools.utils import device_type

from llama_mimi.audio.mimi import DTYPES, MimiCodec, load_codec_config, whole_frames
from llama_mimi.common.errors import UserError
from llama_mimi.data.clip_readers import AudioReader, ClipReader, CodeReader
from llama_mimi.data.code_store import CodeCorpus, is_store
from llama_mimi.data.corpora import open_corpus
from llama_mimi.data.dataloader import DataMeter, SpeechDataLoader
from llama_mimi.data.order import RowsInOrder, ShuffledOrder
from llama_mimi.data.packing import BatchPacker
from llama_mimi.tokens.tokenizer import SpeechTokenizer

# Audio goes through the codec in batches of at least so many clips, and codes come from workers as many at a time.
MIN_CHUNK = 8


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: SpeechTokenizer, job_config: Any, meter: DataMeter | None = None
) -> SpeechDataLoader:
    """Build the training loader: endless, shuffled by ``debug.seed`` (0 if unset), rows as ``data.packing`` says."""
    data, training = job_config.data, job_config.training
    readers = open_readers(job_config, training)
    order = ShuffledOrder(
        [reader.corpus for reader in readers],
        clip_shares(readers, data.weights, data.max_audio_seconds),
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        shuffle_window=data.shuffle_window,
        seed=job_config.debug.seed or 0,
    )
    return _build(
        job_config,
        tokenizer,
        training,
        readers,
        order,
        dp_rank,
        dp_world_size,
        is_packed=data.packing == "pack",
        meter=meter,
        depth_train_fraction=job_config.model.depth_train_fraction,
    )


def build_validation_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: SpeechTokenizer, job_config: Any
) -> SpeechDataLoader:
    """Build the loader of the held-out corpus, or its first ``data.validation_clips``, once and in its own order.

    Rows contain one clip, so that the loss does not depend on how training packs.
    """
    readers = open_readers(job_config, job_config.validation)
    rows_per_group = readers[0].corpus.rows_per_group
    limit = job_config.data.validation_clips
    order = RowsInOrder(
        rows_per_group, range(len(rows_per_group)), dp_rank, dp_world_size, None if limit == -1 else limit
    )
    return _build(job_config, tokenizer, job_config.validation, readers, order, dp_rank, dp_world_size, is_packed=False)


def dataset_names(split: Any) -> list[str]:
    """Return the corpora of ``[training]`` or ``[validation]``: names divided by commas."""
    return [name.strip() for name in split.dataset.split(",") if name.strip()]


def chosen_split(job_config: Any, section: Any) -> str | None:
    """Return the split that ``[training]`` or ``[validation]`` takes of a folder of several."""
    data = job_config.data
    return data.split if section is job_config.training else data.validation_split


def open_readers(job_config: Any, split: Any) -> list[ClipReader]:
    """Open the corpora of ``[training]`` or ``[validation]``, each as audio or as codes, or raise a UserError."""
    data, codec = job_config.data, job_config.codec
    config = load_codec_config(codec.name, codec.num_quantizers)
    max_frames = whole_frames(data.max_audio_seconds, config)
    with_text = data.task == "tts"
    readers: list[ClipReader] = []
    for name in dataset_names(split):
        if is_store(name):
            codes = CodeCorpus(name, codec.name, codec.num_quantizers, codec.sliding_window, with_text=with_text)
            readers.append(CodeReader(codes, max_frames=max_frames, with_text=with_text))
        else:
            text_column = data.text_column if with_text else None
            wanted = chosen_split(job_config, split)
            corpus = open_corpus(name, split.dataset_path, data.audio_column, text_column, split=wanted)
            readers.append(
                AudioReader(
                    corpus,
                    sample_rate_hz=config.sampling_rate,
                    frame_size=config.frame_size,
                    max_frames=max_frames,
                    with_text=with_text,
                )
            )
    return readers


def clip_shares(readers: list[ClipReader], weights: list[float], max_audio_seconds: float) -> list[float]:
    """Return the fraction of clips that is drawn from each corpus, unscaled.

    ``weights`` are fractions of audio; without them each corpus has its own, so that all have their epochs together.

    Raises:
        UserError: weights for a corpus of audio, whose mean length is not known.
    """
    corpora = [reader.corpus for reader in readers]
    if not weights or len(corpora) == 1:
        return [float(corpus.rows_per_group.sum()) for corpus in corpora]
    shares = []
    for weight, corpus in zip(weights, corpora, strict=True):
        if not isinstance(corpus, CodeCorpus):
            raise UserError(f"data.weights needs tokenised corpora, but '{corpus.name}' is audio; tokenise it")
        shares.append(weight / corpus.mean_seconds(max_audio_seconds))
    return shares


def _build(
    job_config: Any,
    tokenizer: SpeechTokenizer,
    split: Any,
    readers: list[ClipReader],
    order: ShuffledOrder | RowsInOrder,
    dp_rank: int,
    dp_world_size: int,
    *,
    is_packed: bool,
    meter: DataMeter | None = None,
    depth_train_fraction: float = 1.0,
) -> SpeechDataLoader:
    """``split`` is ``[training]`` or ``[validation]``: dataset, batch size, seq_len and workers."""
    own, codec = job_config.codec, None
    if any(isinstance(reader, AudioReader) for reader in readers):
        device = torch.device(device_type)
        codec = MimiCodec(own.name, own.num_quantizers, device, DTYPES[own.dtype], own.sliding_window)
    has_positions = job_config.data.packing == "pack"
    return SpeechDataLoader(
        readers,
        order,
        BatchPacker(tokenizer, split.local_batch_size, split.seq_len, is_packed=is_packed, has_positions=has_positions),
        codec,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        dataset=split.dataset,
        chunk_size=max(split.local_batch_size, MIN_CHUNK),
        max_skip_fraction=job_config.data.max_skip_fraction,
        workers=dataclasses.asdict(split.dataloader),
        meter=meter,
        depth_train_fraction=depth_train_fraction,
    )
