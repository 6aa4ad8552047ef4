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
from llama_mimi.data.dataloader import DataMeter, UnitDataLoader
from llama_mimi.data.order import RowsInOrder, ShuffledOrder
from llama_mimi.data.packing import BatchPacker
from llama_mimi.tokens.sequences import SequenceBuilder

# Audio goes through the codec in batches of at least so many clips, and codes come from workers as many at a time.
MIN_CHUNK = 8
# A chunk has as many clips as a batch has rows, but a packed row of 20 s holds four clips of 5 s. With longer clips
# some samples wait in memory; with shorter ones the step waits while a part of them is encoded.
CHUNKS_A_PACKED_BATCH = 4


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: SequenceBuilder, job_config: Any, meter: DataMeter | None = None
) -> UnitDataLoader:
    """The training loader: endless, shuffled by ``debug.seed`` (0 if unset), rows as ``data.packing`` says.

    On a GPU the clips of the next step are encoded beside the step that runs.
    """
    data, training = job_config.data, job_config.training
    readers = open_readers(job_config, training)
    order = ShuffledOrder(
        [reader.corpus for reader in readers],
        clip_shares(readers, data.weights, data.max_audio_seconds),
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        shuffle_block=data.shuffle_block,
        seed=job_config.debug.seed or 0,
    )
    batches_a_step = max(1, training.global_batch_size // (training.local_batch_size * dp_world_size))
    chunks_a_batch = CHUNKS_A_PACKED_BATCH if _is_packed(job_config) else 1
    return _build(
        job_config,
        tokenizer,
        training,
        readers,
        order,
        dp_rank,
        dp_world_size,
        is_packed=_is_packed(job_config),
        meter=meter,
        depth_share=job_config.model.depth_share,
        chunks_ahead=chunks_a_batch * batches_a_step if device_type == "cuda" else 0,
    )


def build_validation_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: SequenceBuilder, job_config: Any
) -> UnitDataLoader:
    """The held-out corpus once, or its first ``data.validation_clips``, in its own order.

    Rows are of one clip, so that the loss does not depend on how training packs, and the clips are the same on any
    number of ranks.
    """
    readers = open_readers(job_config, job_config.validation)
    sizes_G = readers[0].corpus.sizes_G
    limit = job_config.data.validation_clips
    order = RowsInOrder(sizes_G, range(len(sizes_G)), dp_rank, dp_world_size, None if limit == -1 else limit)
    return _build(job_config, tokenizer, job_config.validation, readers, order, dp_rank, dp_world_size, is_packed=False)


def dataset_names(split: Any) -> list[str]:
    """The corpora of ``[training]`` or ``[validation]``: names divided by commas."""
    return [name.strip() for name in split.dataset.split(",") if name.strip()]


def chosen_split(job_config: Any, section: Any) -> str | None:
    """Which split of a folder of several ``[training]`` or ``[validation]`` takes."""
    data = job_config.data
    return data.split if section is job_config.training else data.validation_split


def open_readers(job_config: Any, split: Any) -> list[ClipReader]:
    """The corpora of a split, each as audio or as codes.

    Raises:
        UserError: one is missing, damaged or does not fit.
    """
    data, codec = job_config.data, job_config.codec
    config = load_codec_config(codec.name, codec.num_quantizers)
    max_frames = whole_frames(data.max_audio_seconds, config)
    with_text = data.task == "tts"
    readers: list[ClipReader] = []
    for name in dataset_names(split):
        if is_store(name):
            corpus = CodeCorpus(name, codec.name, codec.num_quantizers, codec.attention, with_text=with_text)
            readers.append(CodeReader(corpus, max_frames=max_frames, with_text=with_text))
            continue
        readers.append(
            AudioReader(
                open_corpus(
                    name,
                    split.dataset_path,
                    data.audio_column,
                    data.text_column if with_text else None,
                    split=chosen_split(job_config, split),
                ),
                sample_rate_hz=config.sampling_rate,
                frame_size=config.frame_size,
                max_frames=max_frames,
                with_text=with_text,
            )
        )
    return readers


def clip_shares(readers: list[ClipReader], weights: list[float], max_audio_seconds: float) -> list[float]:
    """How often a clip is drawn from each corpus.

    Args:
        weights: wanted shares of audio; empty for each corpus's own share, so that all have their epochs together.
        max_audio_seconds: training takes no more of a clip.

    Raises:
        UserError: weights for a corpus of audio, whose mean length is not known.
    """
    corpora = [reader.corpus for reader in readers]
    if not weights or len(corpora) == 1:
        return [float(corpus.sizes_G.sum()) for corpus in corpora]
    shares = []
    for weight, corpus in zip(weights, corpora, strict=True):
        if not isinstance(corpus, CodeCorpus):
            raise UserError(f"data.weights needs tokenised corpora, but '{corpus.name}' is audio; tokenise it")
        shares.append(weight / corpus.mean_seconds(max_audio_seconds))
    return shares


def _is_packed(job_config: Any) -> bool:
    return job_config.data.packing == "pack"


def _build(
    job_config: Any,
    sequences: SequenceBuilder,
    split: Any,
    readers: list[ClipReader],
    order: ShuffledOrder | RowsInOrder,
    dp_rank: int,
    dp_world_size: int,
    *,
    is_packed: bool,
    meter: DataMeter | None = None,
    depth_share: float = 1.0,
    chunks_ahead: int = 0,
) -> UnitDataLoader:
    """``split`` is ``[training]`` or ``[validation]``: dataset, batch size, seq_len and workers."""
    codec = None
    if any(isinstance(reader, AudioReader) for reader in readers):
        own, device = job_config.codec, torch.device(device_type)
        if device.type == "cuda":  # with its number, as the thread that encodes begins on the first GPU
            device = torch.device("cuda", torch.cuda.current_device())
        codec = MimiCodec(own.name, own.num_quantizers, device, DTYPES[own.dtype], attention=own.attention)
    packer = BatchPacker(
        sequences,
        split.local_batch_size,
        split.seq_len,
        is_packed=is_packed,
        has_positions=_is_packed(job_config),
    )
    return UnitDataLoader(
        readers,
        order,
        packer,
        codec,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        dataset=split.dataset,
        chunk_size=max(split.local_batch_size, MIN_CHUNK),
        max_bad_share=job_config.data.max_bad_share,
        workers=dataclasses.asdict(split.dataloader),
        meter=meter,
        depth_share=depth_share,
        chunks_ahead=chunks_ahead if codec is not None else 0,
    )
