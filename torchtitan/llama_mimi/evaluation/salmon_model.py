"""A speech model as SALMon's own evaluation loop wants it (arXiv 2409.07437, its ``InferenceModel``)."""

from collections.abc import Sequence

import torch

from llama_mimi.audio.reading import AudioError, resample
from llama_mimi.common.errors import UserError
from llama_mimi.evaluation.likelihood import batch_scores
from llama_mimi.evaluation.scoring import Scoring
from llama_mimi.generation.speech_model import SpeechModel

SALMON_RATE_HZ = 16_000  # of the benchmark's files; its loop hands over samples without their rate


class SalmonModel:
    """``log_likelihood(wavs)`` and ``to(device)``, which is all that SALMon's loop calls.

    Args:
        model: that scores.
        sample_rate_hz: of the samples that will come.
        scoring: by default that of preset "official".
        max_audio_seconds: longer clips are cut, as by the scripts in eval/.

    Raises:
        UserError: scoring as released by a codec with its window.
    """

    def __init__(
        self,
        model: SpeechModel,
        sample_rate_hz: int = SALMON_RATE_HZ,
        scoring: Scoring | None = None,
        max_audio_seconds: float = 20.0,
    ) -> None:
        self._model, self._rate_hz, self._max_seconds = model, sample_rate_hz, max_audio_seconds
        self._scoring = scoring or Scoring(levels=None)
        if self._scoring.as_released and model.codec.attention != "whole":
            raise UserError("scoring as released needs a codec without window; load the model with attention='whole'")

    def log_likelihood(self, wavs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Scores (B,), float64; higher is likelier.

        Args:
            wavs: clips of shape (channels, S) or (S,).

        Raises:
            AudioError: a clip is shorter than a frame of the codec.
        """
        codec = self._model.codec
        limit = round(self._max_seconds * codec.sample_rate_hz)
        samples = [
            torch.from_numpy(
                resample(
                    wav.float().cpu().reshape(-1, wav.shape[-1]).mean(dim=0).numpy(),
                    self._rate_hz,
                    codec.sample_rate_hz,
                )
            )
            for wav in wavs
        ]
        for samples_S in samples:
            if len(samples_S) < codec.frame_size:
                raise AudioError(
                    "too short",
                    f"a clip of {1000 * len(samples_S) / codec.sample_rate_hz:.1f} ms is less than one codec frame "
                    f"({1000 / codec.frame_rate_hz:.0f} ms); give longer clips",
                )
        cut = [samples_S[:limit] for samples_S in samples]
        if self._scoring.as_released:
            codes = [codec.encode_as_released(samples_S) for samples_S in cut]
        else:
            codes = codec.encode_many(cut)
        is_cut = [len(samples_S) > limit for samples_S in samples]
        scores = batch_scores(self._model, list(zip(codes, is_cut, strict=True)), self._scoring)
        return torch.tensor(scores, dtype=torch.float64)

    def to(self, device: torch.device | str) -> "SalmonModel":
        """The same model on another device."""
        return SalmonModel(self._model.to(device), self._rate_hz, self._scoring, self._max_seconds)
