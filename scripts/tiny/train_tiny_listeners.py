"""Train the small ASR model or the small speaker encoder of assets/tiny, for evaluation without internet.

uv run python scripts/tiny/train_tiny_listeners.py --listener recogniser \\
    --corpus "assets/tiny/corpus/train-*.parquet" --output_dir assets/tiny/recogniser
uv run python scripts/tiny/train_tiny_listeners.py --listener speaker_encoder \\
    --corpus "assets/tiny/corpus/train-*.parquet" --output_dir assets/tiny/speaker_encoder

The classes of the two models are `Wav2Vec2ForCTC` and `WavLMForXVector`. eval/generation.py can also load large models
of these classes. The small models know only the words and voices of the corpus. scripts/tiny/score_listeners.py
measures the errors of the small models.

Shapes: B clips, S samples, C channels, K taps of a kernel, L letters of a text.
"""

import itertools
import json
import math
import random
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from soxr import resample
from tiny_codec import LabelledClip, read_clips, save_in_float16
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.common.versions import versions

RATE_HZ = 16_000
SPEEDS = (0.9, 1.0, 1.1)  # speeds of each clip; for the speaker encoder, each speed counts as another voice
LETTERS = "abcdefghijklmnopqrstuvwxyz'"
PAD, UNKNOWN, SPACE = "<pad>", "<unk>", "|"
VOCABULARY = {symbol: index for index, symbol in enumerate((PAD, UNKNOWN, SPACE, *LETTERS))}
PHASES = 4  # phases of each frequency in the first layer
FREQUENCIES_HZ = (60.0, 7_600.0)
CROP_SECONDS = (0.8, 2.4)  # for the speaker encoder; prompts and continuations have similar lengths
NOISE_DB = (-60.0, -20.0)  # relative to the speech
MARGIN = 0.1  # final margin of the speaker encoder's softmax; a full margin from the start would prevent learning
# Steps, clips per step and peak learning rate.
RECIPES = {"recogniser": (2500, 8, 1.5e-3), "speaker_encoder": (1500, 16, 4e-4)}
# The first layer is a fixed filter bank with 25 ms windows every 5 ms. The output has frames of 20 ms (wav2vec 2.0).
FRONT_END = {"conv_kernel": (400, 3, 3), "conv_stride": (80, 2, 2), "feat_extract_norm": "layer", "conv_bias": True}
FRONT_END |= {"do_stable_layer_norm": True, "num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 8}
FRONT_END |= {"num_attention_heads": 4, "hidden_dropout": 0.1, "attention_dropout": 0.0, "activation_dropout": 0.0}
FRONT_END |= {"final_dropout": 0.0, "feat_proj_dropout": 0.0, "layerdrop": 0.0}
Batch = dict[str, torch.Tensor]


def normalize(text: str) -> str:
    """Convert a text to the format of the ASR model: lower-case letters and single spaces."""
    return " ".join("".join(letter for letter in text.lower() if letter in LETTERS + " ").split())


def set_filter_bank(weight_C1K: torch.Tensor) -> None:
    """Set kernels to windowed cosines: `PHASES` phases per frequency, frequencies evenly spaced on the mel scale."""
    C, _, K = weight_C1K.shape
    low, high = (math.log1p(hz / 700) for hz in FREQUENCIES_HZ)
    hz_C = 700 * torch.linspace(low, high, C // PHASES).expm1().repeat_interleave(PHASES)
    phase_C = torch.arange(C) % PHASES * (math.pi / 2)
    waves_CK = torch.cos(2 * math.pi * hz_C[:, None] * torch.arange(K) / RATE_HZ + phase_C[:, None])
    kernels_CK = waves_CK * torch.hann_window(K)
    weight_C1K.data.copy_((kernels_CK / kernels_CK.norm(dim=1, keepdim=True))[:, None])


def with_noise(samples_S: torch.Tensor) -> torch.Tensor:
    """Add white noise of a random level. Then scale the audio to mean 0 and variance 1, like the feature extractor."""
    scale = samples_S.std() * 10 ** (random.uniform(*NOISE_DB) / 20)
    noisy_S = samples_S + scale * torch.randn_like(samples_S)
    return (noisy_S - noisy_S.mean()) / (noisy_S.std() + 1e-7)


def collate(clips: Sequence[torch.Tensor], labels: torch.Tensor) -> Batch:
    """Return a batch of padded clips (B, S), with their attention mask and their labels."""
    mask_BS = pad_sequence([torch.ones(len(clip_S), dtype=torch.long) for clip_S in clips], batch_first=True)
    return {"input_values": pad_sequence(list(clips), batch_first=True), "attention_mask": mask_BS, "labels": labels}


def at_speeds(clips: Sequence[LabelledClip]) -> list[tuple[LabelledClip, float]]:
    """Return every clip at every speed in `SPEEDS`. A change of speed also changes the pitch."""
    changed = []
    for clip, speed in itertools.product(clips, SPEEDS):
        samples = resample(clip.samples_S.numpy(), round(RATE_HZ * speed), RATE_HZ)
        changed.append((clip._replace(samples_S=torch.from_numpy(samples)), speed))
    return changed


def recogniser(clips: Sequence[LabelledClip]) -> tuple[transformers.PreTrainedModel, Callable[[int], Batch]]:
    """Return a new ASR model that recognises letters, and a function that draws a batch of a given size."""
    shape = {"hidden_size": 160, "num_hidden_layers": 4, "intermediate_size": 480, "conv_dim": (160, 160, 160)}
    masks = {"mask_time_prob": 0.1, "mask_time_length": 5, "mask_feature_prob": 0.1, "mask_feature_length": 10}
    loss = {"ctc_loss_reduction": "mean", "ctc_zero_infinity": True}
    entries = {"vocab_size": len(VOCABULARY), "pad_token_id": VOCABULARY[PAD]}
    config = transformers.Wav2Vec2Config(**FRONT_END, **shape, **masks, **loss, **entries)
    labelled = [
        (clip.samples_S, torch.tensor([VOCABULARY[letter] for letter in normalize(clip.text).replace(" ", SPACE)]))
        for clip, _ in at_speeds(clips)
    ]

    def draw(batch_size: int) -> Batch:
        samples, letters = zip(*random.sample(labelled, batch_size), strict=True)
        noisy = [with_noise(samples_S) for samples_S in samples]
        return collate(noisy, pad_sequence(letters, batch_first=True, padding_value=-100))

    return transformers.Wav2Vec2ForCTC(config), draw


def speaker_encoder(clips: Sequence[LabelledClip]) -> tuple[transformers.PreTrainedModel, Callable[[int], Batch]]:
    """Return a new x-vector model that classifies voices and speeds, and a function that draws a batch."""
    changed = at_speeds(clips)
    voices = sorted({(clip.speaker, speed) for clip, speed in changed})
    shape = {"hidden_size": 128, "num_hidden_layers": 1, "intermediate_size": 384, "conv_dim": (160, 128, 128)}
    shape |= {"tdnn_dim": (128, 128, 128, 128, 256), "xvector_output_dim": 128}
    config = transformers.WavLMConfig(**FRONT_END, **shape, apply_spec_augment=False, num_labels=len(voices))
    labelled = [(clip.samples_S, voices.index((clip.speaker, speed))) for clip, speed in changed]

    def draw(batch_size: int) -> Batch:
        chosen = random.sample(labelled, batch_size)
        size = round(random.uniform(*CROP_SECONDS) * RATE_HZ)
        crops = []
        for samples_S, _ in chosen:
            start = random.randint(0, max(len(samples_S) - size, 0))
            crops.append(with_noise(samples_S[start : start + size]))
        return collate(crops, torch.tensor([label for _, label in chosen]))

    return transformers.WavLMForXVector(config), draw


def train_listener(listener: Literal["recogniser", "speaker_encoder"], corpus: str, output_dir: Path) -> None:
    """Train a model, and write a folder that `transformers` loads.

    Args:
        corpus: corpus with the columns audio, speaker and text, in any format that llama_mimi.train reads
        output_dir: folder to write the model to
    """
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):  # NumPy draws the masks of the ASR model
        set_seed(1)
    clips = read_clips(corpus, RATE_HZ)
    model, draw = {"recogniser": recogniser, "speaker_encoder": speaker_encoder}[listener](clips)
    steps, batch_size, learning_rate = RECIPES[listener]
    first_layer = model.base_model.feature_extractor.conv_layers[0].conv
    set_filter_bank(first_layer.weight)
    first_layer.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98))
    model.train()
    for step in (progress := tqdm(range(1, steps + 1), unit="step")):
        decay = 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, step / 200) * decay
        if isinstance(model, transformers.WavLMForXVector):
            model.objective.margin = MARGIN * step / steps
        loss = model(**draw(batch_size)).loss
        optimizer.zero_grad()
        if not loss.isfinite():
            raise UserError(
                f"the loss of step {step} is {loss.item()}; lower the learning rate in RECIPES in this script"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    command = shlex.join(["uv", "run", "python", *sys.argv])
    save(model, output_dir, {"command": command, "clips": len(clips), "steps": steps, "versions": versions()})


def save(model: transformers.PreTrainedModel, folder: Path, record: dict) -> None:
    """Write the model in float16, its feature extractor and tokenizer, and a record of its training."""
    save_in_float16(model, folder)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE_HZ, return_attention_mask=True).save_pretrained(folder)
    if isinstance(model, transformers.Wav2Vec2ForCTC):
        vocabulary = folder / "vocab.json"
        vocabulary.write_text(json.dumps(VOCABULARY, indent=1) + "\n")
        symbols = {"unk_token": UNKNOWN, "pad_token": PAD, "word_delimiter_token": SPACE, "bos_token": None}
        transformers.Wav2Vec2CTCTokenizer(str(vocabulary), **symbols, eos_token=None).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_command(train_listener, __doc__)
