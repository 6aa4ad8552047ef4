"""The small codec of assets/tiny: Mimi's architecture with random filters and fitted codebooks.

No gradient is used. Filters are drawn and standardised on speech, quantizers are fitted to what they let through.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import MimiConfig, MimiModel

SAMPLE_RATE = 24_000  # Hz
SEMANTIC_DIMS = 12  # leading principal directions the semantic codebook sees


def nearest(points: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """Index of the nearest center for each point; points (n, d), centers (k, d)."""
    return torch.cdist(points, centers).argmin(dim=-1)


def k_means(points: torch.Tensor, k: int, generator: torch.Generator, steps: int = 30) -> torch.Tensor:
    """Centers (k, d) of Lloyd's algorithm on points (n, d); an empty cluster restarts at a random point."""
    centers = points[torch.randperm(len(points), generator=generator)[:k]].clone()
    for _ in range(steps):
        owner = nearest(points, centers)
        counts = torch.bincount(owner, minlength=k)
        centers = torch.zeros_like(centers).index_add_(0, owner, points) / counts.clamp(min=1)[:, None]
        empty = counts == 0
        centers[empty] = points[torch.randint(len(points), (int(empty.sum()),), generator=generator)]
    return centers


def fit_quantizer(
    rvq: nn.Module, latents: torch.Tensor, projection: torch.Tensor, share: torch.Tensor, generator: torch.Generator
) -> None:
    """Fits a residual quantizer level by level; latents (n, hidden), projection (vq_dim, hidden), share (vq_dim,)."""
    rvq.input_proj.weight.data.copy_(projection[:, :, None])
    rvq.output_proj.weight.data.copy_((torch.linalg.pinv(projection) * share)[:, :, None])
    residual = latents @ projection.T
    for layer in rvq.layers:
        book = layer.codebook
        centers = k_means(residual, book.codebook_size, generator)
        usage = torch.bincount(nearest(residual, centers), minlength=book.codebook_size).clamp(min=1).float()
        book.cluster_usage.copy_(usage)
        book.embed_sum.copy_(centers * usage[:, None])
        book.initialized.fill_(1.0)
        book._embed = None  # computed once and kept: without this the old, empty codebook stays in use
        residual = residual - book.embed[nearest(residual, book.embed)]


def random_mimi() -> MimiModel:
    """A small MimiModel whose filters have PyTorch's default scale."""
    filters = {"hidden_size": 64, "num_filters": 8, "num_residual_layers": 1, "upsampling_ratios": [8, 6, 5, 4]}
    books: dict[str, float] = {"codebook_size": 256, "codebook_dim": 32, "vector_quantization_hidden_dimension": 32}
    books |= {"num_quantizers": 8, "num_semantic_quantizers": 1, "frame_rate": 12.5, "upsample_groups": 64}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    config = MimiConfig(**filters, **books, **layers, intermediate_size=128)
    torch.manual_seed(1234)
    model = MimiModel(config).eval()
    for name, module in model.named_modules():
        # The library's init is made for training from scratch; random features need the usual fan-in scale.
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.Linear):
            module.reset_parameters()
        elif name.endswith("layer_scale"):
            nn.init.constant_(module.scale, 0.2)
    return model


@torch.no_grad()
def standardize_encoder(model: MimiModel, clips: torch.Tensor) -> None:
    """Makes random filters hear speech; clips (n, 1, samples).

    As drawn, the filters stay almost linear, so what is left at 12.5 Hz is the phase of the waveform. Unit variance
    into every ELU makes it rectify, and strided filters that are one smooth window per channel pair then average what
    was rectified: the latents follow the energy in random bands, as a scattering transform does.
    """

    def standardize(conv: nn.Conv1d, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        mean, deviation = output.mean(dim=(0, 2)), output.std(dim=(0, 2)).clamp(min=1e-6)
        if conv.bias is None:
            mean = torch.zeros_like(mean)
        else:
            conv.bias.copy_((conv.bias - mean) / deviation)
        conv.weight.div_(deviation[:, None, None])
        return (output - mean[None, :, None]) / deviation[None, :, None]

    convs = [module for module in model.encoder.modules() if isinstance(module, nn.Conv1d)]
    for conv in convs:
        if conv.stride[0] > 1:
            window = torch.hann_window(conv.kernel_size[0] + 2, periodic=False)[1:-1]
            conv.weight.copy_(torch.randn(conv.weight.shape[:2])[:, :, None] * window)
    handles = [conv.register_forward_hook(standardize) for conv in convs]
    model.encoder(clips)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def write_mimi(folder: Path, clips: list[torch.Tensor]) -> list[float]:
    """Builds, fits and saves the codec; returns the perplexity of each level over all clips."""
    model = random_mimi()
    standardize_encoder(model, torch.cat([clip[..., : 2 * SAMPLE_RATE] for clip in clips[::8]]))
    points = torch.cat([model.encoder(clip).latents[0].T for clip in clips])  # (frames, hidden)
    values, vectors = torch.linalg.eigh(torch.cov(points.T.double()))
    order = values.argsort(descending=True)[: model.config.vector_quantization_hidden_dimension]
    # eigh's sign is arbitrary: fix it, so that a rebuild gives the same codec.
    axes = vectors[:, order] * vectors[:, order].gather(0, vectors[:, order].abs().argmax(0, keepdim=True)).sign()
    whiten = (axes / values[order].clamp(min=1e-12).sqrt()).T.float()
    # The semantic codebook sees only the leading directions, so its codes differ from the first acoustic level's.
    semantic = whiten.clone()
    semantic[SEMANTIC_DIMS:] = 0
    # The model adds both outputs: the directions that both quantizers describe count half from each.
    share = torch.ones(len(whiten))
    share[:SEMANTIC_DIMS] = 0.5
    generator = torch.Generator().manual_seed(99)
    fit_quantizer(model.quantizer.semantic_residual_vector_quantizer, points, semantic, share, generator)
    fit_quantizer(model.quantizer.acoustic_residual_vector_quantizer, points, whiten, share, generator)
    codes = [model.encode(clip).audio_codes[0] for clip in clips]
    model.save_pretrained(folder)
    loaded = MimiModel.from_pretrained(folder).eval()
    for clip, code in zip(clips[:40], codes[:40], strict=True):
        if not torch.equal(loaded.encode(clip).audio_codes[0], code):
            raise RuntimeError("The saved codec gives other codes.")
    if not torch.isfinite(loaded.decode(codes[0][None]).audio_values).all():
        raise RuntimeError("The saved codec decodes to non-finite samples.")
    perplexities = []
    for level in torch.cat(codes, dim=1):
        share = torch.bincount(level, minlength=256).double() / len(level)
        perplexities.append(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()).item())
    return perplexities
