"""Training of a small Mimi: `transformers.MimiModel` unchanged, with a quantizer whose codebooks learn.

Shapes: B batch, S samples, T frames, D latent width, E width of the quantizer, K codebook size, N vectors, C channels.
"""

import json
from pathlib import Path

import torch
import torchaudio
from torch import nn
from torch.nn import functional as F
from transformers import EncodecFeatureExtractor, MimiConfig, MimiModel

from llama_mimi.common.files import share_weights

LAYER_SCALE = 0.2  # initial value; Mimi's 0.01 is meant for far longer training
EMA_DECAY = 0.99  # of codebooks, per step; as in VQ-VAE (arXiv 1711.00937, appendix A)
DEAD_FRACTION = 0.25  # of an even use; a code that is used less often is drawn again
# STFT windows in samples (10.7, 21.3, 42.7, 85.3 ms at 24 kHz) and mel bands; four hops a window.
RESOLUTIONS = ((256, 20), (512, 40), (1024, 80), (2048, 128))
DEPTHS = (1, 2, 4, 8)  # numbers of levels at which a codec is scored
MEL_FLOOR = 3e-4  # lower limit of magnitudes; a sine of full scale has 0.5


def tiny_mimi_config(codebook_size: int) -> MimiConfig:
    """Return a configuration with 24 kHz, 12.5 frames/s, 8 levels and 1.8 million parameters.

    Mimi's strides are in reverse order, which halves the work. The attention window is one training crop, so that long
    clips are no harder than crops.
    """
    filters = {"num_filters": 16, "hidden_size": 128, "upsampling_ratios": [4, 5, 6, 8], "frame_rate": 12.5}
    books = {"codebook_size": codebook_size, "codebook_dim": 32, "vector_quantization_hidden_dimension": 32}
    books |= {"num_quantizers": 8, "num_semantic_quantizers": 1, "upsample_groups": 128}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    return MimiConfig(**filters, **books, **layers, intermediate_size=256, sliding_window=24)


def new_codec(config: MimiConfig) -> MimiModel:
    """Return a codec with PyTorch's default weights; the library's are meant to be overwritten and hardly learn."""
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
    """Scale every convolution to zero mean and unit variance per channel on speech (after arXiv 1511.06422).

    With PyTorch's default weights the output of some twenty layers hardly depends on the input, and training stays at
    the average spectrum for a long time.
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
    """Return the semantic and the acoustic quantizer; Mimi quantizes the same latents with both and adds the two."""
    quantizer = model.quantizer
    return quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer


def reconstruct(
    model: MimiModel, audio_B1S: torch.Tensor, depth_B: torch.Tensor, *, is_quantized: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode and decode whole frames in training, and move codebooks towards the latents.

    Args:
        depth_B: number of levels from which each clip is decoded.
        is_quantized: False leaves the projected latents unchanged, for the warm-up.

    Returns:
        The decoded audio_B1S, and the commitment loss: the mean square distance of latents from their codes.
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
    """Return the sum of the first ``depth_B`` codes with the gradient of ``vectors_BTE``, and the commitment loss."""
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
    book._embed = None  # transformers caches the quotient of the two


@torch.no_grad()
def fit_codebooks(model: MimiModel, crops: list[torch.Tensor]) -> None:
    """Set the codebooks by k-means, level after level, after the warm-up; crops are (B, 1, S) each."""
    latents_BDT = torch.cat([model.encoder(audio_B1S).latents for audio_B1S in crops])
    for branch in _branches(model):
        residual_NE = branch.input_proj(latents_BDT).mT.flatten(0, 1)
        for layer in branch.layers:
            book = layer.codebook
            center_KE = _k_means(residual_NE, book.codebook_size)
            # The state after even use at the rate of a training step.
            even = len(residual_NE) / len(crops) / book.codebook_size
            book.cluster_usage.fill_(even)
            book.embed_sum.copy_(center_KE * even)
            book._embed = None
            residual_NE = residual_NE - book.decode(book.quantize(residual_NE))


def _k_means(vectors_NE: torch.Tensor, k: int, steps: int = 20) -> torch.Tensor:
    """Return the centers (K, E) of Lloyd's algorithm; an empty cluster restarts at a random vector."""
    center_KE = vectors_NE[torch.randperm(len(vectors_NE), device=vectors_NE.device)[:k]].clone()
    for _ in range(steps):
        index_N = torch.cdist(vectors_NE, center_KE).argmin(dim=1)
        count_K = torch.bincount(index_N, minlength=k)
        sum_KE = torch.zeros_like(center_KE).index_add_(0, index_N, vectors_NE)
        center_KE = sum_KE / count_K.clamp(min=1)[:, None]
        empty_K = count_K == 0
        center_KE[empty_K] = vectors_NE[torch.randint(len(vectors_NE), (int(empty_K.sum()),), device=center_KE.device)]
    return center_KE


class MelMagnitude(nn.Module):
    """Mel magnitudes of one resolution, relative to full scale; audio (..., S) to (..., bands, windows)."""

    def __init__(self, sample_rate_hz: int, window: int = 1024, num_bands: int = 80) -> None:
        super().__init__()
        self.mel = torchaudio.transforms.MelSpectrogram(
            sample_rate_hz, n_fft=window, hop_length=window // 4, n_mels=num_bands, power=1.0
        )
        self.scale = 1 / float(torch.hann_window(window).sum())

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        return (self.mel(audio) * self.scale).clamp(min=MEL_FLOOR)

    def distances(self, decoded: torch.Tensor, original: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-mel distance (mean, natural logarithm) and the spectral convergence of signals (..., S)."""
        ours, theirs = self(decoded), self(original)
        convergence = torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)
        return F.l1_loss(ours.log(), theirs.log()), convergence


class SpectralLoss(nn.Module):
    """Log-mel distance plus spectral convergence of signals (B, 1, S) at several resolutions (arXiv 1910.11480)."""

    def __init__(self, sample_rate_hz: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(MelMagnitude(sample_rate_hz, window, bands) for window, bands in RESOLUTIONS)

    def forward(self, decoded_B1S: torch.Tensor, original_B1S: torch.Tensor) -> torch.Tensor:
        distances = [value for scale in self.scales for value in scale.distances(decoded_B1S, original_B1S)]
        return sum(distances, decoded_B1S.new_zeros(())) / len(self.scales)


def save_half(model: MimiModel, folder: Path) -> None:
    """Save a codec in float16 with its feature extractor, and a config that loads it in float32."""
    half = MimiModel(model.config)
    half.load_state_dict(model.state_dict())
    for book in codebooks(half):
        book.embed_sum.copy_(book.embed)  # usage 1: float16 then rounds each center once
        book.cluster_usage.fill_(1.0)
    half.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    share_weights(folder)
    write_feature_extractor(model.config, folder)


def write_feature_extractor(config: MimiConfig, folder: Path) -> None:
    """Write the ``preprocessor_config.json`` that `AutoFeatureExtractor` reads."""
    EncodecFeatureExtractor(config.audio_channels, config.sampling_rate).save_pretrained(folder)
