"""Train the small recogniser and speaker encoder of assets/tiny, by which machines without a network judge speech.

uv run python scripts/tiny/train_tiny_listeners.py --listener recogniser \\
    --corpus "assets/tiny/corpus/train-*.parquet" --output_dir assets/tiny/recogniser
uv run python scripts/tiny/train_tiny_listeners.py --listener speaker_encoder \\
    --corpus "assets/tiny/corpus/train-*.parquet" --output_dir assets/tiny/speaker_encoder

They are of the classes that eval/generation.py takes at full scale, `Wav2Vec2ForCTC` and `WavLMForXVector`, and know
the words and voices of that corpus, no others. scripts/tiny/score_listeners.py says how well they hear.

Shapes: B clips, S samples, C channels, K taps of a kernel, L letters of a text.
"""

import json
import math
import random
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from soxr import resample
from speech_classifier import LabelledClip, read_clips
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForXVector,
)

from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import share_weights
from llama_mimi.common.versions import versions

RATE_HZ = 16_000
SPEEDS = (0.9, 1.0, 1.1)  # each clip is there at all three; to the speaker encoder, as other voices
LETTERS = "abcdefghijklmnopqrstuvwxyz'"
PAD, UNKNOWN, SPACE = "<pad>", "<unk>", "|"
VOCABULARY = {symbol: index for index, symbol in enumerate((PAD, UNKNOWN, SPACE, *LETTERS))}
PHASES = 4  # of each frequency in the first layer
FREQUENCIES_HZ = (60.0, 7_600.0)
CROP_SECONDS = (0.8, 2.4)  # that the speaker encoder hears: prompts and continuations are as short
NOISE_DB = (-60.0, -20.0)  # below the speech
MARGIN = (
    0.3  # of the speaker encoder's additive-margin softmax at the end; from the start on it learns nothing with one
)
LOG_EVERY = 50  # steps

# Frames of 25 ms every 5 ms, then of 20 ms, as in wav2vec 2.0; the first layer is a filter bank and stays as it is.
FRONT_END = {
    "conv_kernel": (400, 3, 3),
    "conv_stride": (80, 2, 2),
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 32,
    "num_conv_pos_embedding_groups": 8,
    "num_attention_heads": 4,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "final_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
}


@dataclass(frozen=True)
class ListenerFlags:
    """What is trained, on what, and where to.

    Args:
        listener: which of the two
        corpus: Parquet path or glob with columns audio, speaker, text
        output_dir: folder of the model
        steps: optimizer steps; this and the next two by the listener's recipe
        batch_size: clips a step
        learning_rate: peak
        seed: decides on weights, order and noise
    """

    listener: Literal["recogniser", "speaker_encoder"]
    corpus: str
    output_dir: Path
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    seed: int = 1


def spelled(text: str) -> str:
    """A text as the recogniser writes it: small letters and single spaces."""
    return " ".join("".join(letter for letter in text.lower() if letter in LETTERS + " ").split())


def set_filter_bank(weight_C1K: torch.Tensor) -> None:
    """Make kernels windowed waves of `PHASES` phases at frequencies that are even in mel."""
    C, _, K = weight_C1K.shape
    low, high = (math.log1p(hz / 700) for hz in FREQUENCIES_HZ)
    hz_C = 700 * torch.linspace(low, high, C // PHASES).expm1().repeat_interleave(PHASES)
    phase_C = torch.arange(C) % PHASES * (math.pi / 2)
    waves_CK = torch.cos(2 * math.pi * hz_C[:, None] * torch.arange(K) / RATE_HZ + phase_C[:, None])
    kernels_CK = waves_CK * torch.hann_window(K)
    weight_C1K.data.copy_((kernels_CK / kernels_CK.norm(dim=1, keepdim=True))[:, None])


def with_noise(samples_S: torch.Tensor) -> torch.Tensor:
    """A clip with white noise of a random level, mean 0 and variance 1, as the feature extractor makes it."""
    scale = samples_S.std() * 10 ** (random.uniform(*NOISE_DB) / 20)
    noisy_S = samples_S + scale * torch.randn_like(samples_S)
    return (noisy_S - noisy_S.mean()) / (noisy_S.std() + 1e-7)


def batch_of(clips: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Clips side by side (B, S), and where they have samples."""
    return {
        "input_values": pad_sequence(list(clips), batch_first=True),
        "attention_mask": pad_sequence(
            [torch.ones(len(clip_S), dtype=torch.long) for clip_S in clips], batch_first=True
        ),
    }


def at_speeds(clips: Sequence[LabelledClip]) -> list[tuple[LabelledClip, float]]:
    """Each clip at each of `SPEEDS`, its pitch changed with it."""
    return [
        (
            LabelledClip(torch.from_numpy(resample(clip.samples_S.numpy(), round(RATE_HZ * speed), RATE_HZ)), *labels),
            speed,
        )
        for clip in clips
        for labels in [(clip.speaker, clip.text)]
        for speed in SPEEDS
    ]


def recogniser(clips: Sequence[LabelledClip]) -> tuple[PreTrainedModel, Callable[[int], dict[str, torch.Tensor]]]:
    """A letter recogniser, and what draws a batch for it."""
    config = Wav2Vec2Config(
        **FRONT_END,
        vocab_size=len(VOCABULARY),
        hidden_size=160,
        num_hidden_layers=4,
        intermediate_size=480,
        conv_dim=(160, 160, 160),
        mask_time_prob=0.1,
        mask_time_length=5,
        mask_feature_prob=0.1,
        mask_feature_length=10,
        pad_token_id=VOCABULARY[PAD],
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
    )
    spoken = [
        (
            clip.samples_S,
            torch.tensor([VOCABULARY[SPACE if letter == " " else letter] for letter in spelled(clip.text)]),
        )
        for clip, _ in at_speeds(clips)
    ]

    def draw(batch_size: int) -> dict[str, torch.Tensor]:
        chosen = random.sample(spoken, batch_size)
        labels_BL = pad_sequence([letters_L for _, letters_L in chosen], batch_first=True, padding_value=-100)
        return {**batch_of([with_noise(samples_S) for samples_S, _ in chosen]), "labels": labels_BL}

    return Wav2Vec2ForCTC(config), draw


def speaker_encoder(clips: Sequence[LabelledClip]) -> tuple[PreTrainedModel, Callable[[int], dict[str, torch.Tensor]]]:
    """An x-vector model that tells voices and speeds apart, and what draws a batch for it."""
    spoken = at_speeds(clips)
    voices = sorted({(clip.speaker, speed) for clip, speed in spoken})
    config = WavLMConfig(
        **FRONT_END,
        hidden_size=128,
        num_hidden_layers=1,
        intermediate_size=384,
        conv_dim=(160, 128, 128),
        tdnn_dim=(128, 128, 128, 128, 256),
        xvector_output_dim=128,
        apply_spec_augment=False,
        num_labels=len(voices),
    )
    labelled = [(clip.samples_S, voices.index((clip.speaker, speed))) for clip, speed in spoken]

    def draw(batch_size: int) -> dict[str, torch.Tensor]:
        chosen = random.sample(labelled, batch_size)
        size = round(random.uniform(*CROP_SECONDS) * RATE_HZ)
        crops = []
        for samples_S, _ in chosen:
            start = random.randint(0, max(len(samples_S) - size, 0))
            crops.append(with_noise(samples_S[start : start + size]))
        return {**batch_of(crops), "labels": torch.tensor([label for _, label in chosen])}

    return WavLMForXVector(config), draw


@dataclass(frozen=True)
class Recipe:
    """How a listener is trained.

    Args:
        make: the model and what draws batches, of clips.
        steps: optimizer steps.
        batch_size: clips a step.
        learning_rate: peak.
    """

    make: Callable[[Sequence[LabelledClip]], Any]
    steps: int
    batch_size: int
    learning_rate: float


RECIPES = {
    "recogniser": Recipe(recogniser, 2500, 8, 1.5e-3),
    "speaker_encoder": Recipe(speaker_encoder, 1500, 16, 4e-4),
}


def train_listener(flags: ListenerFlags) -> None:
    """Train, and write a folder that stock `transformers` loads.

    Raises:
        UserError: the corpus cannot be used, or the loss is not finite.
    """
    random.seed(flags.seed)
    np.random.seed(flags.seed)  # draws what the recogniser's training hides
    torch.manual_seed(flags.seed)
    clips = read_clips(flags.corpus, RATE_HZ)
    recipe = RECIPES[flags.listener]
    model, draw = recipe.make(clips)
    steps, batch_size = flags.steps or recipe.steps, flags.batch_size or recipe.batch_size
    learning_rate = flags.learning_rate or recipe.learning_rate
    first_layer = model.base_model.feature_extractor.conv_layers[0].conv
    set_filter_bank(first_layer.weight)
    first_layer.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98))
    began, total = time.monotonic(), 0.0
    model.train()
    for step in range(1, steps + 1):
        decay = 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / 200) * decay
        if isinstance(model, WavLMForXVector):
            model.objective.margin = MARGIN * step / steps
        loss = model(**draw(batch_size)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        total += loss.item()
        if not math.isfinite(total):
            raise UserError(f"the loss of step {step} is {loss.item()}; lower --learning_rate {learning_rate:g}")
        if step % LOG_EVERY == 0 or step == steps:
            rate = step / (time.monotonic() - began)
            mean = total / ((step - 1) % LOG_EVERY + 1)
            left = (steps - step) / rate / 60
            print(f"step {step}/{steps}: loss {mean:.3f}; {rate:.2f} steps/s, {left:.0f} min left", flush=True)
            total = 0.0
    save(model, flags, steps, len(clips), time.monotonic() - began)


def save(model: PreTrainedModel, flags: ListenerFlags, steps: int, num_clips: int, seconds: float) -> None:
    """Weights in float16, a configuration that has them loaded in float32, and how they were made."""
    folder = flags.output_dir
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    share_weights(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE_HZ, return_attention_mask=True).save_pretrained(folder)
    if flags.listener == "recogniser":
        vocabulary = folder / "vocab.json"
        vocabulary.write_text(json.dumps(VOCABULARY, indent=1) + "\n")
        Wav2Vec2CTCTokenizer(
            str(vocabulary),
            unk_token=UNKNOWN,
            pad_token=PAD,
            word_delimiter_token=SPACE,
            bos_token=None,
            eos_token=None,
        ).save_pretrained(folder)
    record = {
        "command": shlex.join(["uv", "run", "python", *sys.argv]),
        "clips": num_clips,
        "steps": steps,
        "minutes": round(seconds / 60, 1),
        "device": f"CPU, {torch.get_num_threads()} threads",
        "versions": versions(),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_command(train_listener, __doc__)
