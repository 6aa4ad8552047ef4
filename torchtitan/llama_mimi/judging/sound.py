"""Measures of how continuations sound: whose voice it is, and how good a recording it would be."""

from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from transformers import AutoFeatureExtractor, WavLMForXVector

from llama_mimi.audio.silence import silences
from llama_mimi.common.errors import UserError
from llama_mimi.common.hub import load_pretrained
from llama_mimi.judging.measures import in_batches
from llama_mimi.judging.models import describe_listener, load_listener
from llama_mimi.judging.systems import Clip

RATE_HZ = 16_000  # of all models here
PAUSE_SECONDS = 0.3  # shorter silences are part of speech
DISTILLMOS_SAMPLES = 122_880  # of its one window, 7.68 s


class Pair(NamedTuple):
    """A prompt and what comes after it."""

    prompt: Clip
    continuation: Clip

    @property
    def key(self) -> str:
        return f"{self.prompt.key}/{self.continuation.key}"


class SpeakerSimilarity:
    """Cosine of the x-vectors of a prompt and its continuation, in [-1, 1].

    Each clip goes through the model by itself: models with group normalisation, as microsoft/wavlm-base-plus-sv, would
    see the padding of a batch.

    Args:
        name: hub id or folder of a `WavLMForXVector`.
    """

    name = "similarity"

    def __init__(self, model_name: str, device: torch.device) -> None:
        self._device = device
        self._model = load_listener(WavLMForXVector, model_name, device, what="speaker model")
        self._description = describe_listener(model_name)
        self._features = load_pretrained(AutoFeatureExtractor, model_name, what="speaker model")

    def describe(self) -> dict[str, Any]:
        return self._description

    def values(self, inputs: Sequence[Pair]) -> Iterator[tuple[int, float]]:
        of_prompts: dict[str, torch.Tensor] = {}
        for place, (prompt, continuation) in enumerate(inputs):
            if prompt.key not in of_prompts:
                of_prompts[prompt.key] = self.embed(prompt)
            similarity = torch.nn.functional.cosine_similarity(of_prompts[prompt.key], self.embed(continuation), dim=0)
            yield place, float(similarity)

    @torch.inference_mode()
    def embed(self, clip: Clip) -> torch.Tensor:
        """The x-vector (D,) of a clip."""
        samples_S = clip.read(RATE_HZ).samples_S.numpy()
        features = self._features(samples_S, sampling_rate=RATE_HZ, return_tensors="pt").input_values
        return self._model(features.to(self._device)).embeddings[0].cpu()


class DistillMos:
    """Mean opinion score of 1 to 5 as DistillMOS (arXiv 2502.05356) predicts it; its weights are in its wheel.

    It was made for the damage that transmission does, and says less of how natural speech is.
    """

    name = "distillmos"

    def __init__(self, device: torch.device, batch_size: int) -> None:
        try:
            from distillmos import ConvTransformerSQAModel  # of an extra
        except ImportError as error:
            raise UserError(
                "--quality distillmos needs a package that is not installed; install llama-mimi[judging]"
            ) from error
        self._device, self._batch_size = device, batch_size
        with redirect_stdout(None):  # it says where its weights lie
            model = ConvTransformerSQAModel()
        self._model = model.to(device).eval()

    def describe(self) -> dict[str, Any]:
        return {"model": "distillmos", "version": version("distillmos")}

    @torch.inference_mode()
    def values(self, inputs: Sequence[Clip]) -> Iterator[tuple[int, float]]:
        """Longer clips than its window are judged alone, as the mean over several windows."""
        short: list[tuple[int, torch.Tensor]] = []
        for place, clip in enumerate(inputs):
            samples_S = clip.read(RATE_HZ).samples_S
            if len(samples_S) > DISTILLMOS_SAMPLES:
                yield place, float(self._model(samples_S[None].to(self._device)))
                continue
            short.append((place, torch.nn.functional.pad(samples_S, (0, DISTILLMOS_SAMPLES - len(samples_S)))))
            if len(short) == self._batch_size:
                yield from self._of_batch(short)
                short = []
        if short:
            yield from self._of_batch(short)

    def _of_batch(self, clips: Sequence[tuple[int, torch.Tensor]]) -> Iterator[tuple[int, float]]:
        """It pads with zeros to its window itself, so that a clip has the same score alone and in a batch."""
        places, samples = zip(*clips, strict=True)
        scores_B1 = self._model(torch.stack(samples).to(self._device))
        yield from zip(places, scores_B1[:, 0].tolist(), strict=True)


class Aesthetics:
    """The four axes of Audiobox-Aesthetics (arXiv 2502.05139), 1 to 10: enjoyment, usefulness, complexity, quality."""

    name = "aesthetics"

    def __init__(self, batch_size: int) -> None:
        try:
            from audiobox_aesthetics.infer import initialize_predictor  # only where a user has installed it
        except ImportError as error:
            raise UserError(
                "--quality aesthetics needs the package audiobox-aesthetics (CC BY 4.0), which is not installed; "
                "install it, or use --quality distillmos"
            ) from error
        self._batch_size = batch_size
        self._predictor = initialize_predictor()  # of facebook/audiobox-aesthetics, safetensors

    def describe(self) -> dict[str, Any]:
        return {"model": "facebook/audiobox-aesthetics", "version": version("audiobox_aesthetics")}

    def values(self, inputs: Sequence[Clip]) -> Iterator[tuple[int, dict[str, float]]]:
        for start, clips in in_batches(inputs, self._batch_size):
            samples = [clip.read(RATE_HZ).samples_S[None] for clip in clips]
            axes = self._predictor.forward([{"path": one_1S, "sample_rate": RATE_HZ} for one_1S in samples])
            yield from enumerate(axes, start)


class Pauses:
    """Length of a clip in seconds, and the share of it that is silence of `PAUSE_SECONDS` or more."""

    name = "pauses"

    def describe(self) -> dict[str, Any]:
        return {"pause_seconds": PAUSE_SECONDS}

    def values(self, inputs: Sequence[Clip]) -> Iterator[tuple[int, dict[str, float]]]:
        for place, clip in enumerate(inputs):
            waveform = clip.read(RATE_HZ)
            silent = sum(length for _, length in silences(waveform, PAUSE_SECONDS))
            yield place, {"seconds": waveform.seconds, "silent": min(silent / max(waveform.seconds, 1e-9), 1.0)}
