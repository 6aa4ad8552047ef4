"""Functions for training a small Mimi. The model is an unchanged `transformers.MimiModel` with learned codebooks.

Shapes: B batch, S samples, T frames, D latent width, E width of the quantizer, K codebook size, N vectors, C channels.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torchaudio
from scipy.cluster.vq import kmeans2
from torch import nn
from torch.nn import functional as F
from transformers import EncodecFeatureExtractor, MimiConfig, MimiModel, PreTrainedModel

from llama_mimi.common.errors import UserError
from llama_mimi.common.files import share_weights
from llama_mimi.corpora.clips import AudioReader, CodedClip
from llama_mimi.corpora.formats import open_source

LAYER_SCALE = 0.2  # initial value; Mimi's value of 0.01 suits far longer training
EMA_DECAY = 0.99  # decay of codebooks per step, as in VQ-VAE (arXiv 1711.00937, appendix A)
DEAD_FRACTION = 0.25  # a code restarts if its usage is below this fraction of the mean usage
# STFT windows in samples (10.7, 21.3, 42.7, 85.3 ms at 24 kHz) and numbers of mel bands; a window has four hops.
RESOLUTIONS = ((256, 20), (512, 40), (1024, 80), (2048, 128))
DEPTHS = (1, 2, 4, 8)  # numbers of levels at which a codec is scored
MEL_FLOOR = 3e-4  # lower limit of magnitudes; a full-scale sine has a magnitude of 0.5


def tiny_mimi_config(codebook_size: int) -> MimiConfig:
    """Return the configuration of a codec with 24 kHz, 12.5 frames/s, 8 levels and 1.8 million parameters.

    Mimi's strides are used in reverse order, because the reverse order halves the computation. The attention window is
    as long as a training crop, so that long clips are reconstructed with the same quality.
    """
    filters = {"num_filters": 16, "hidden_size": 128, "upsampling_ratios": [4, 5, 6, 8], "frame_rate": 12.5}
    books = {"codebook_size": codebook_size, "codebook_dim": 32, "vector_quantization_hidden_dimension": 32}
    books |= {"num_quantizers": 8, "num_semantic_quantizers": 1, "upsample_groups": 128}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    return MimiConfig(**filters, **books, **layers, intermediate_size=256, sliding_window=24)


def new_codec(config: MimiConfig) -> MimiModel:
    """Return a codec with PyTorch's initial weights. With the initial weights of `transformers`, it hardly learns."""
    model = MimiModel(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.Linear):
            module.reset_parameters()
        elif name.endswith("layer_scale"):
            nn.init.constant_(module.scale, LAYER_SCALE)
    for book in codebooks(model):
        nn.init.normal_(book.embed_sum)
    return model


@torch.no_grad()
def standardize(model: MimiModel, audio_B1S: torch.Tensor) -> None:
    """Scale the weights so that convolutions map speech to mean 0 and variance 1 per channel (as in arXiv 1511.06422).

    Without this scaling, the output of about twenty layers hardly depends on the input, and the codec outputs only the
    average spectrum for many training steps.
    """

    def scale(conv: nn.Conv1d | nn.ConvTranspose1d, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        mean_C, deviation_C = output.mean(dim=(0, 2)), output.std(dim=(0, 2)).clamp(min=1e-6)
        if conv.bias is None:
            mean_C = torch.zeros_like(mean_C)
        else:
            conv.bias.sub_(mean_C).div_(deviation_C)
        is_output_first = isinstance(conv, nn.Conv1d) or conv.groups > 1
        conv.weight.div_(deviation_C.view((-1, 1, 1) if is_output_first else (1, -1, 1)))
        return (output - mean_C[:, None]) / deviation_C[:, None]

    convs = [module for module in model.modules() if isinstance(module, nn.Conv1d | nn.ConvTranspose1d)]
    handles = [conv.register_forward_hook(scale) for conv in convs]
    every_level_B = torch.full((len(audio_B1S),), model.config.num_quantizers, device=audio_B1S.device)
    reconstruct(model, audio_B1S, every_level_B, is_quantized=False)
    for handle in handles:
        handle.remove()
    last = model.decoder.decoder_seanet.layers[-1].conv
    last.weight.mul_(audio_B1S.std())
    last.bias.mul_(audio_B1S.std())


def codebooks(model: MimiModel) -> list[nn.Module]:
    """Return the codebooks of all levels, in order."""
    return [layer.codebook for branch in _branches(model) for layer in branch.layers]


def _branches(model: MimiModel) -> tuple[nn.Module, nn.Module]:
    """Return the semantic and the acoustic quantizer; both quantize the same latents, and Mimi adds the results."""
    quantizer = model.quantizer
    return quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer


def reconstruct(
    model: MimiModel, audio_B1S: torch.Tensor, depth_B: torch.Tensor, *, is_quantized: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode and decode whole frames in training. Quantization also updates the codebooks.

    Args:
        depth_B: number of levels from which each clip is decoded.
        is_quantized: whether latents are quantized; False in the warm-up.

    Returns:
        The decoded audio (B, 1, S), and the commitment loss: the mean squared distance between latents and their codes.
    """
    latents_BDT = model.encoder(audio_B1S).latents
    total_BDT, commitment, first = torch.zeros_like(latents_BDT), latents_BDT.new_zeros(()), 0
    for branch in _branches(model):
        vectors_BTE = branch.input_proj(latents_BDT).mT
        if is_quantized:
            vectors_BTE, distance = quantize(branch, vectors_BTE, depth_B - first)
            commitment = commitment + distance
        total_BDT = total_BDT + branch.output_proj(vectors_BTE.mT) * (depth_B > first)[:, None, None]
        first += len(branch.layers)
    return model.decoder(total_BDT).audio_values, commitment


def quantize(branch: nn.Module, vectors_BTE: torch.Tensor, depth_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize vectors to ``depth_B`` levels (straight-through gradient); return the result and the commitment loss."""
    residual_BTE, kept_BTE = vectors_BTE, torch.zeros_like(vectors_BTE)
    commitment = vectors_BTE.new_zeros(())
    for level, layer in enumerate(branch.layers):
        residual_NE = residual_BTE.detach().flatten(0, 1)
        index_N = layer.codebook.quantize(residual_NE)
        code_BTE = layer.codebook.decode(index_N).view_as(residual_BTE)
        _move_codebook(layer.codebook, residual_NE, index_N)
        commitment = commitment + F.mse_loss(residual_BTE, code_BTE) / len(branch.layers)
        kept_BTE = kept_BTE + code_BTE * (depth_B > level)[:, None, None]
        residual_BTE = residual_BTE - code_BTE
    return vectors_BTE + (kept_BTE - vectors_BTE).detach(), commitment


@torch.no_grad()
def _move_codebook(book: nn.Module, vectors_NE: torch.Tensor, index_N: torch.Tensor) -> None:
    """Update the moving average of each code's vectors; a dead code restarts at a random vector of the batch."""
    size = book.codebook_size
    usage_K = torch.bincount(index_N, minlength=size).to(vectors_NE)
    sum_KE = torch.zeros_like(book.embed_sum).index_add_(0, index_N, vectors_NE)
    book.cluster_usage.lerp_(usage_K, 1 - EMA_DECAY)
    book.embed_sum.lerp_(sum_KE, 1 - EMA_DECAY)
    even = len(vectors_NE) / size
    is_dead_K = book.cluster_usage < DEAD_FRACTION * even
    drawn_NE = vectors_NE[torch.randint(len(vectors_NE), (int(is_dead_K.sum()),), device=vectors_NE.device)]
    book.embed_sum[is_dead_K] = drawn_NE * even
    book.cluster_usage[is_dead_K] = even
    book._embed = None  # transformers caches embed_sum / cluster_usage here


@torch.no_grad()
def fit_codebooks(model: MimiModel, crops: list[torch.Tensor]) -> None:
    """Fit the codebooks by k-means after the warm-up, level by level. ``crops`` is a list of tensors (B, 1, S)."""
    latents_BDT = torch.cat([model.encoder(audio_B1S).latents for audio_B1S in crops])
    for branch in _branches(model):
        residual_NE = branch.input_proj(latents_BDT).mT.flatten(0, 1)
        for layer in branch.layers:
            book = layer.codebook
            # 20 steps of Lloyd's algorithm, from random vectors
            centers = kmeans2(residual_NE.cpu().numpy(), book.codebook_size, iter=20, minit="points", rng=0)[0]
            center_KE = torch.from_numpy(centers).to(residual_NE)
            # Set the usage as if every training step had used all codes equally often.
            even = len(residual_NE) / len(crops) / book.codebook_size
            book.cluster_usage.fill_(even)
            book.embed_sum.copy_(center_KE * even)
            book._embed = None
            residual_NE = residual_NE - book.decode(book.quantize(residual_NE))


class MelMagnitude(nn.Module):
    """Mel magnitudes (..., bands, windows) of audio (..., S) at one resolution, relative to full scale."""

    def __init__(self, sample_rate_hz: int, window: int = 1024, num_bands: int = 80) -> None:
        super().__init__()
        self.mel = torchaudio.transforms.MelSpectrogram(
            sample_rate_hz, n_fft=window, hop_length=window // 4, n_mels=num_bands, power=1.0
        )
        self.scale = 1 / float(torch.hann_window(window).sum())

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        return (self.mel(audio) * self.scale).clamp(min=MEL_FLOOR)

    def distances(self, decoded: torch.Tensor, original: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean log-mel distance (natural logarithm) and the spectral convergence of two signals (..., S)."""
        ours, theirs = self(decoded), self(original)
        convergence = torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)
        return F.l1_loss(ours.log(), theirs.log()), convergence


class SpectralLoss(nn.Module):
    """Log-mel distance plus spectral convergence, averaged over several resolutions (arXiv 1910.11480)."""

    def __init__(self, sample_rate_hz: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(MelMagnitude(sample_rate_hz, window, bands) for window, bands in RESOLUTIONS)

    def forward(self, decoded_B1S: torch.Tensor, original_B1S: torch.Tensor) -> torch.Tensor:
        distances = [value for scale in self.scales for value in scale.distances(decoded_B1S, original_B1S)]
        return sum(distances, decoded_B1S.new_zeros(())) / len(self.scales)


def save_half(model: MimiModel, folder: Path) -> None:
    """Save a codec in float16, together with its feature extractor."""
    half = MimiModel(model.config)
    half.load_state_dict(model.state_dict())
    for book in codebooks(half):
        book.embed_sum.copy_(book.embed)  # with usage 1, float16 rounds each center once
        book.cluster_usage.fill_(1.0)
    save_in_float16(half, folder)
    write_feature_extractor(model.config, folder)


def save_in_float16(model: PreTrainedModel, folder: Path) -> None:
    """Save a model in float16, with a config that makes `transformers` load the model in float32."""
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    share_weights(folder)


def write_feature_extractor(config: MimiConfig, folder: Path) -> None:
    """Write the ``preprocessor_config.json`` that `AutoFeatureExtractor` reads."""
    EncodecFeatureExtractor(config.audio_channels, config.sampling_rate).save_pretrained(folder)


class LabelledClip(NamedTuple):
    samples_S: torch.Tensor
    speaker: str  # empty if unknown
    text: str  # empty if unknown


def read_clips(corpus: str, sample_rate_hz: int) -> list[LabelledClip]:
    """Read the clips of a corpus into memory, with their speakers and texts; print a reason for each skipped clip."""
    source = open_source(corpus, None, "audio", None, extra_columns={"text": "text", "speaker": "speaker"})
    reader = AudioReader(source, sample_rate_hz=sample_rate_hz, frame_size=1024, max_frames=10**9)
    rows = (row for unit in range(len(source.units)) for row in source.rows(unit))
    clips = []
    for clip in (clip for row in rows for clip in reader.clips(row)):
        if isinstance(clip, CodedClip):
            clips.append(LabelledClip(torch.as_tensor(clip.samples_S), clip.speaker or "", clip.text or ""))
        else:
            print(f"skipped: {clip.message}", flush=True)
    if not clips:
        raise UserError(f"all clips of '{corpus}' were skipped (see the lines above); choose a corpus of valid clips")
    return clips
