"""The offline codec carries speech; the ledger's figures: `uv run pytest tests/test_tiny_codec.py -n 0 -s`."""

import pyarrow.parquet as pq
import pytest
import torch
import torchaudio
from conftest import TINY

from llama_mimi.audio import read_audio
from llama_mimi.codec import MimiCodec

NUM_TRAIN = 200  # clips that the linear map and the centroids are fitted to


def rows(pattern, limit=None):
    files = sorted((TINY / "corpus").glob(pattern))
    return [row for file in files for row in pq.read_table(file).to_pylist()][:limit]


@pytest.fixture(scope="module")
def features():
    """For train and validation: per clip the dequantized latents (T, D), log-mel bands (T, 20) and the speaker."""
    codec = MimiCodec(str(TINY / "mimi"), 8)
    log_mel = torchaudio.transforms.MelSpectrogram(24_000, n_fft=1024, hop_length=480, n_mels=20)
    splits = []
    for clips in (rows("train-*", NUM_TRAIN), rows("validation-*")):
        split = []
        for row in clips:
            samples_S = read_audio(row["audio"]["bytes"], 24_000).samples_S
            (codes_TQ,) = codec.encode([samples_S])
            with torch.no_grad():
                latents_TD = codec.model.quantizer.decode(codes_TQ.T[None])[0].T
            padded_S = torch.nn.functional.pad(samples_S, (0, len(codes_TQ) * 1920 - len(samples_S)))
            bands = (log_mel(padded_S)[:, : 4 * len(codes_TQ)] + 1e-4).log()  # four hops of 20 ms a frame
            split.append((latents_TD, bands.unflatten(1, (-1, 4)).mean(-1).T, row["speaker"]))
        splits.append(split)
    return splits


def test_a_linear_map_finds_the_spectrum(features):
    def stack(split):
        latents_ND = torch.cat([latents for latents, _, _ in split])
        with_bias = torch.cat([latents_ND, torch.ones(len(latents_ND), 1)], dim=1).double()
        return with_bias, torch.cat([bands for _, bands, _ in split]).double()

    (x_train, y_train), (x, y) = map(stack, features)
    weights = torch.linalg.lstsq(x_train, y_train, driver="gelsd").solution
    explained = 1 - float(((x @ weights - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())
    print(f"\nlog-mel variance explained by the codes of 8 levels: {explained:.3f}")
    assert explained > 0.25  # a codec of unscaled random filters reached 0.02


def test_the_nearest_centroid_is_the_speaker(features):
    train, validation = features
    scale = torch.cat([latents for latents, _, _ in train]).std(0) + 1e-9
    speakers = sorted({speaker for _, _, speaker in train})
    mean_D = {
        speaker: torch.stack([(latents / scale).mean(0) for latents, _, s in train if s == speaker]).mean(0)
        for speaker in speakers
    }
    centroids = torch.stack([mean_D[speaker] for speaker in speakers])
    clips = torch.stack([(latents / scale).mean(0) for latents, _, _ in validation])
    named = torch.cdist(clips, centroids).argmin(1).tolist()
    share = sum(speakers[i] == speaker for i, (_, _, speaker) in zip(named, validation, strict=True)) / len(clips)
    print(f"\nspeaker named by the nearest centroid: {share:.2f} of {len(clips)} clips, {len(speakers)} speakers")
    assert share > 0.7  # a codec of unscaled random filters reached 0.26
