"""Mimi codec: waveforms <-> codes (T, Q)."""

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import MimiConfig, MimiModel, PreTrainedConfig
from transformers.utils import cached_file

from llama_mimi.common.batching import bucket_by_length
from llama_mimi.common.cpu import keep_freed_memory
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.hub import load_pretrained

BATCH_SECONDS = (32.0, 160.0)  # seconds of audio in a batch on CPU and GPU (scripts/benchmarks/bench_data.py)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_codec_config(name: str, num_quantizers: int) -> MimiConfig:
    """Load a codec's configuration; raise a `UserError` if the codec is missing or lacks ``num_quantizers`` levels."""
    config = load_pretrained(MimiConfig, name, what="codec")
    if not config.num_semantic_quantizers <= num_quantizers <= config.num_quantizers:
        levels = f"{config.num_semantic_quantizers} to {config.num_quantizers} levels"
        problem = f"num_quantizers is {num_quantizers}, but the codec '{name}' supports {levels}"
        raise UserError(f"{problem}; choose a number in that range, or choose another codec")
    return config


def local_codec(name: str, folder: str | Path) -> str | None:
    """Return the path of the codec folder that a model's config names, or None if the folder does not exist.

    A relative path is looked up in the model's folder and its parent folders, but not in the working directory.
    """
    folder = Path(folder).absolute()
    for place in (folder, *folder.parents):
        if (place / name).is_dir():
            return name if Path(name).is_absolute() else os.path.relpath(place / name)
    return None


def whole_frames(seconds: float, config: MimiConfig, setting: str = "data.max_audio_seconds") -> int:
    """Return the number of whole frames in ``seconds``; if it is 0, raise a `UserError` that names ``setting``."""
    frames = int(seconds * config.sampling_rate / config.frame_size + 1e-6)
    if not frames:
        raise UserError(f"{setting} is {seconds}, less than one codec frame; set {setting} to a larger value")
    return frames


def is_released(config: PreTrainedConfig) -> bool:
    """Return True if the config is of Llama-Mimi's first release: the entry for the sliding window is missing."""
    return not hasattr(config, "codec_sliding_window")


def is_trained(config: PreTrainedConfig) -> bool:
    """Return True for a trained Llama-Mimi, and False for a base model, even if its vocabulary has audio tokens.

    scripts/prepare_base_model.py writes the entries ``num_quantizers`` and ``codec``. The first release has only
    ``num_quantizers``, and a converted model also has ``codec_sliding_window``.
    """
    return hasattr(config, "num_quantizers") and not (is_released(config) and hasattr(config, "codec"))


def has_sliding_window(config: PreTrainedConfig) -> bool:
    """Return True if a model was trained with a sliding window in the codec; False for Llama-Mimi's first release."""
    return not is_released(config) and config.codec_sliding_window


class MimiCodec:
    """Mimi codec with a fixed number of quantizer levels.

    Args:
        dtype: type of weights and activations; bfloat16 changes about 2 % of the codes.
        sliding_window: if True, attend to the last 250 positions (10 s), as in Mimi's training; if False, attend to all
            earlier positions, as the library transformers did before February 2026 (its pull request 43971).
    """

    def __init__(
        self,
        name: str,
        num_quantizers: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        sliding_window: bool = True,
    ) -> None:
        self.config = config = load_codec_config(name, num_quantizers)
        self.name, self.num_quantizers, self.sliding_window = name, num_quantizers, sliding_window
        self.device, self.dtype = torch.device(device), dtype
        self.codebook_size: int = config.codebook_size
        self.sample_rate_hz: int = config.sampling_rate
        self.frame_size: int = config.frame_size
        self.frame_rate_hz: float = config.sampling_rate / config.frame_size
        if self.device.type == "cpu":
            keep_freed_memory()
        # By default, convolutions on a GPU round float32 to TF32. Only the codec has convolutions.
        torch.backends.cudnn.allow_tf32 = False
        extra: dict[str, Any] = {} if sliding_window else {"sliding_window": 10**9}  # wider than any clip
        if self.device.type == "cuda":
            # TorchTitan changes the attention kernels of the whole process during training, so codes would depend on
            # the time at which audio is encoded.
            extra["attn_implementation"] = "eager"
        self.model = load_pretrained(MimiModel, name, what="codec", dtype=dtype, **extra).to(self.device).eval()

    def at_depth(self, num_quantizers: int) -> "MimiCodec":
        """Return a codec with the same weights, but with another number of levels."""
        other = copy(self)
        other.num_quantizers = num_quantizers
        return other

    def encode(self, waveforms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Encode mono float32 clips (S,) at ``sample_rate_hz`` in one batch. Return int64 codes (T, Q) on the CPU.

        Each clip is padded with zeros to whole frames, then to the length of the longest clip. Mimi is causal, so the
        codes of a clip do not depend on the other clips.
        """
        if not waveforms:
            return []
        frames = [math.ceil(len(samples_S) / self.frame_size) for samples_S in waveforms]
        audio_BS = pad_sequence(list(waveforms), batch_first=True)
        audio_BS = torch.nn.functional.pad(audio_BS, (0, max(frames) * self.frame_size - audio_BS.shape[1]))
        # clone() frees the padding, and returns a normal tensor instead of an inference tensor.
        return [codes_TQ[:T].clone() for codes_TQ, T in zip(self._encode(audio_BS), frames, strict=True)]

    def encode_as_released(self, samples_S: torch.Tensor) -> torch.Tensor:
        """Encode a clip (S,) to codes (T, Q) as Llama-Mimi's first release did: convolutions pad a partial frame."""
        return self._encode(samples_S[None])[0].clone()

    @torch.inference_mode()
    def _encode(self, audio_BS: torch.Tensor) -> torch.Tensor:
        audio_B1S = audio_BS[:, None].to(self.device, self.dtype)
        codes_BQT = self.model.encode(audio_B1S, num_quantizers=self.num_quantizers, return_dict=True).audio_codes
        return codes_BQT.transpose(1, 2).cpu()

    def encode_many(self, waveforms: Sequence[torch.Tensor], batch_seconds: float | None = None) -> list[torch.Tensor]:
        """Encode any number of clips as `encode` does, in length-bucketed batches of up to ``batch_seconds``."""
        batch_seconds = batch_seconds or BATCH_SECONDS[self.device.type == "cuda"]
        sizes = [len(samples_S) for samples_S in waveforms]
        batches = bucket_by_length(sizes, batch_seconds * self.sample_rate_hz)
        encoded = self._encode_each([[waveforms[index] for index in batch] for batch in batches])
        codes = dict(zip(chain(*batches), chain(*encoded), strict=True))
        return [codes[index] for index in range(len(waveforms))]

    def _encode_each(self, batches: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """Encode each batch. On CPUs, one thread per batch is faster than many threads per convolution."""
        num_threads = torch.get_num_threads()
        if self.device.type != "cpu" or num_threads == 1 or len(batches) == 1:
            return list(map(self.encode, batches))
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            encoded = list(pool.map(self.encode, batches))
        torch.set_num_threads(num_threads)  # the pool's setting applies to later threads, too
        return encoded

    @torch.inference_mode()
    def decode(self, codes_TQ: torch.Tensor, **state: Any) -> torch.Tensor:
        """Decode codes (T, Q) to mono float32 samples (T * frame_size,) on the CPU. ``state``: model cache."""
        codes_1QT = codes_TQ.to(self.device).T[None]
        samples_11S = self.model.decode(codes_1QT, return_dict=True, **state).audio_values
        return samples_11S[0, 0].float().cpu().clone()


@lru_cache(maxsize=4)
def codec_hash(name: str, local_files_only: bool = False) -> str:
    """Return the SHA-256 of the weights of a codec (hub id or folder). ``local_files_only``: do not use the network."""
    try:
        path = cached_file(name, "model.safetensors", local_files_only=local_files_only)
    except OSError as error:
        problem = f"the weights of the codec '{name}' could not be read ({first_line(error)})"
        raise UserError(f"{problem}; check the name and the network, or copy the codec's folder again") from error
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
