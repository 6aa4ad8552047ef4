"""Train a small Mimi on any corpus: the codec of assets/tiny, or one for your own speech.

uv run python scripts/tiny/train_tiny_codec.py --corpus "assets/tiny/corpus/train-*.parquet" \\
    --validation_corpus "assets/tiny/corpus/validation-*.parquet" --output_dir outputs/tiny_codec

The same command continues a run that was stopped. `--output_dir` gets `codec/` (what `MimiModel.from_pretrained` loads,
float16 storage), `samples/`, `tb/` (loss curves) and `checkpoint.pt` (all state; read with weights-only loading).
"""

import itertools
import json
import math
import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_codec import (
    DEPTHS,
    MelMagnitude,
    SpectralLoss,
    fit_codebooks,
    new_codec,
    reconstruct,
    save_half,
    standardize,
    tiny_mimi_config,
)
from torch.utils.tensorboard import SummaryWriter

from llama_mimi.audio.reading import Waveform, write_wav
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.common.versions import versions
from llama_mimi.data.clip_readers import AudioClip, AudioReader, Clip, SkippedClip
from llama_mimi.data.clips import ClipStream
from llama_mimi.data.corpora import open_corpus
from llama_mimi.data.order import Position, RowsInOrder, ShuffledOrder

CROP_FRAMES = 12  # 0.96 s
WARMUP_SHARE = 0.4  # so much of all steps is without quantization
FIT_BATCHES = 60  # whose frames k-means sees
COMMITMENT_WEIGHT = 0.25  # as in VQ-VAE (arXiv 1711.00937, section 3.2)
GRADIENT_NORM = 1.0
MAX_BAD_SHARE = 0.01  # more bad clips end the run, as in training
LOG_EVERY, SAVE_EVERY = 50, 500  # steps
HELD_OUT_CLIPS, HELD_OUT_SECONDS = 16, 3.0


def usable(clips: list[Clip]) -> list[AudioClip]:
    """The clips that could be read; the others are named."""
    for clip in clips:
        if isinstance(clip, SkippedClip):
            print(f"skipped: {clip.message}", flush=True)
    return [clip for clip in clips if isinstance(clip, AudioClip)]


@dataclass(frozen=True)
class CodecFlags:
    """What is trained, on what, and where to.

    Args:
        corpus: name, folder, or Parquet path or glob to train on
        validation_corpus: the same, of held-out clips
        output_dir: folder of the run
        steps: optimizer steps
        batch_size: crops of 0.96 s a step
        codebook_size: codes of a level
        learning_rate: peak
        seed: decides on weights, order and crops
    """

    corpus: str
    validation_corpus: str
    output_dir: Path
    steps: int = 6000
    batch_size: int = 8
    codebook_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 1


class CodecRun:
    """A training run and all of its state."""

    def __init__(self, flags: CodecFlags) -> None:
        self.flags = flags
        self.folder = flags.output_dir
        self.starts: list[dict[str, Any]] = []
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.num_fit_frames < flags.codebook_size:
            raise UserError(
                f"--codebook_size is {flags.codebook_size}, but they are fitted to {self.num_fit_frames} frames; "
                f"choose fewer codes or a larger --batch_size"
            )
        torch.manual_seed(flags.seed)
        config = tiny_mimi_config(flags.codebook_size)
        self.frame_size, self.sample_rate_hz = config.frame_size, config.sampling_rate
        reader = self._open(flags.corpus, max_seconds=20.0)
        self.order = ShuffledOrder(
            [reader.corpus], [1.0], dp_rank=0, dp_world_size=1, shuffle_window=1024, seed=flags.seed
        )
        self.stream = ClipStream([reader], self.order, flags.batch_size)
        self.batches = self.stream.load()
        reader = self._open(flags.validation_corpus, max_seconds=HELD_OUT_SECONDS)
        rows_per_group = reader.corpus.rows_per_group
        chunks = ClipStream([reader], RowsInOrder(rows_per_group, range(len(rows_per_group))), 1)
        clips = (clip for chunk in chunks.load() for clip in usable(chunk.clips))
        self.held_out = list(itertools.islice(clips, HELD_OUT_CLIPS))
        if not self.held_out:
            raise UserError(f"the corpus '{flags.validation_corpus}' has no usable clip to judge by")
        self.skipped: Counter[str] = Counter()
        self.step, self.seconds, self.clips_seen = 0, 0.0, 0
        self.model = new_codec(config).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=flags.learning_rate, betas=(0.8, 0.99), weight_decay=0.0
        )
        self.loss = SpectralLoss(self.sample_rate_hz).to(self.device)
        self.mel = MelMagnitude(self.sample_rate_hz).to(self.device)

    def _open(self, corpus: str, *, max_seconds: float) -> AudioReader:
        return AudioReader(
            open_corpus(corpus, None, "audio", None),
            sample_rate_hz=self.sample_rate_hz,
            frame_size=self.frame_size,
            max_frames=int(max_seconds * self.sample_rate_hz / self.frame_size),
        )

    @property
    def num_fit_frames(self) -> int:
        """Frames that k-means sees."""
        return FIT_BATCHES * self.flags.batch_size * CROP_FRAMES

    @property
    def fit_step(self) -> int:
        """The step before which the codebooks are fitted and from which on codes are used."""
        return round(self.flags.steps * WARMUP_SHARE)

    def crops(self) -> torch.Tensor:
        """The next batch of random crops (B, 1, S); a clip that is shorter is filled up with silence."""
        chunk = next(self.batches)
        for _ in chunk.refs:
            self.order.take()
        self.skipped.update(clip.reason for clip in chunk.clips if isinstance(clip, SkippedClip))
        clips = usable(chunk.clips)
        if not clips:
            raise UserError(f"the corpus '{self.flags.corpus}' has no usable clip; see the skipped ones above")
        self.clips_seen += len(clips)
        if self.skipped.total() > MAX_BAD_SHARE * max(self.clips_seen + self.skipped.total(), 100):
            raise UserError(
                f"{self.skipped.total()} clips of '{self.flags.corpus}' could not be used and {self.clips_seen} could, "
                f"more than {100 * MAX_BAD_SHARE:g} % of all; repair the corpus"
            )
        size = CROP_FRAMES * self.frame_size
        crops = []
        for clip in clips:
            start = int(torch.randint(max(len(clip.samples_S) - size, 0) + 1, ()))
            crop_S = clip.samples_S[start : start + size]
            crops.append(torch.nn.functional.pad(crop_S, (0, size - len(crop_S))))
        return torch.stack(crops)[:, None].to(self.device)

    def learning_rate(self) -> float:
        """A cosine from the peak to 2 % of it over all steps, with a linear warm-up over the first 100."""
        decay = 0.02 + 0.98 * (1 + math.cos(math.pi * self.step / self.flags.steps)) / 2
        return self.flags.learning_rate * min(1.0, (self.step + 1) / 100) * decay

    def train_step(self) -> dict[str, float]:
        """One optimizer step; everything random in it depends on the seed and the step alone."""
        torch.manual_seed(self.flags.seed * 1_000_003 + self.step)
        if self.step == 0:
            standardize(self.model, torch.cat([self.crops() for _ in range(8)]))
        if self.step == self.fit_step:
            fit_codebooks(self.model, [self.crops() for _ in range(FIT_BATCHES)])
        audio_B1S = self.crops()
        # Half of the clips at full depth; the others teach every prefix of levels to be a codec of its own.
        num_levels = self.model.config.num_quantizers
        depth_B = torch.randint(1, num_levels + 1, (len(audio_B1S),), device=self.device)
        depth_B[: len(audio_B1S) // 2] = num_levels
        decoded_B1S, commitment = reconstruct(self.model, audio_B1S, depth_B, is_quantized=self.step >= self.fit_step)
        spectral = self.loss(decoded_B1S, audio_B1S)
        waveform = torch.nn.functional.l1_loss(decoded_B1S, audio_B1S)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad()
        (spectral + waveform + COMMITMENT_WEIGHT * commitment).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        if not torch.isfinite(norm):
            raise UserError(
                f"the gradient of step {self.step + 1} is {norm.item()}; start again with a --learning_rate below "
                f"{self.flags.learning_rate:g}"
            )
        self.optimizer.step()
        self.step += 1
        values = {"spectral": spectral, "waveform": waveform, "commitment": commitment, "gradient_norm": norm}
        return {name: value.detach().item() for name, value in values.items()}

    @torch.no_grad()
    def held_out_distances(self) -> dict[int, float]:
        """Mean log-mel distance of held-out clips at each depth, with samples of the first one.

        While warming up, latents are not quantized, and depth only decides which of the two branches takes part.
        """
        torch.manual_seed(0)
        distances = dict.fromkeys(DEPTHS, 0.0)
        self.model.eval()
        for clip in self.held_out:
            num_frames = math.ceil(len(clip.samples_S) / self.frame_size)
            padding = num_frames * self.frame_size - len(clip.samples_S)
            audio_11S = torch.nn.functional.pad(clip.samples_S, (0, padding))[None, None].to(self.device)
            codes_1QT = self.model.encode(audio_11S).audio_codes if self.step > self.fit_step else None
            for depth in DEPTHS:
                if codes_1QT is not None:
                    decoded_11S = self.model.decode(codes_1QT[:, :depth]).audio_values
                else:
                    depth_B = torch.tensor([depth], device=self.device)
                    decoded_11S, _ = reconstruct(self.model, audio_11S, depth_B, is_quantized=False)
                log_distance, _ = self.mel.distances(decoded_11S, audio_11S)
                distances[depth] += float(log_distance) / len(self.held_out)
                if clip is self.held_out[0]:
                    samples = self.folder / "samples" / f"step-{self.step:06d}"
                    write_wav(samples / f"{depth}_levels.wav", Waveform(decoded_11S[0, 0].cpu(), self.sample_rate_hz))
        original = Waveform(self.held_out[0].samples_S, self.sample_rate_hz)
        write_wav(self.folder / "samples" / "original.wav", original)
        self.model.train()
        return distances

    def save(self) -> None:
        """Exports the codec, then writes the checkpoint aside and moves it into place.

        In this order: what is killed in between repeats some steps and exports again.
        """
        if self.step > self.fit_step:
            self.export(self.folder / "codec")
        state = {
            "settings": _settings(self.flags),
            "step": self.step,
            "seconds": self.seconds,
            "clips_seen": self.clips_seen,
            "skipped": dict(self.skipped),
            "starts": self.starts,
            "position": self.order.position.to_json(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        path = self.folder / "checkpoint.pt"
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def start(self) -> None:
        """Continues from `checkpoint.pt`, if there is one, and notes where and by which code."""
        path = self.folder / "checkpoint.pt"
        if path.exists():
            self._load(path)
            print(f"continuing after step {self.step} of {self.flags.steps}", flush=True)
        if self.step < self.flags.steps:
            self.starts.append({"step": self.step, "commit": versions()["commit"]})

    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["settings"] != _settings(self.flags):
            raise UserError(
                f"'{path}' was made with other settings ({state['settings']}); repeat its command line or choose "
                f"another --output_dir"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.order.position = Position.from_json(state["position"])
        self.batches = self.stream.load()
        self.skipped.update(state["skipped"])
        self.step, self.seconds, self.clips_seen = state["step"], state["seconds"], state["clips_seen"]
        self.starts = state["starts"]

    def export(self, folder: Path) -> None:
        """Writes the codec and a note of how it was made."""
        save_half(self.model, folder)
        flags = self.flags
        crop_seconds = CROP_FRAMES * self.frame_size / self.sample_rate_hz
        is_cpu = self.device.type == "cpu"
        device = f"CPU, {torch.get_num_threads()} threads" if is_cpu else torch.cuda.get_device_name(self.device)
        record = {
            "command": shlex.join(["uv", "run", "python", *sys.argv]),
            "corpus": flags.corpus,
            "steps": self.step,
            "clips_seen": self.clips_seen,
            "skipped": dict(self.skipped),
            "audio_hours_seen": round(self.step * flags.batch_size * crop_seconds / 3600, 2),
            "wall_hours": round(self.seconds / 3600, 2),
            "device": device,
            "starts": self.starts,
            "versions": {name: number for name, number in versions().items() if name != "commit"},
        }
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")

    def run(self) -> None:
        """Trains to the last step with progress, loss curves, samples and checkpoints on the way."""
        if self.step == self.flags.steps:
            return
        writer = SummaryWriter(self.folder / "tb", purge_step=self.step + 1)
        first, began, before = self.step, time.monotonic(), self.seconds
        sums: Counter[str] = Counter()
        while self.step < self.flags.steps:
            sums.update(self.train_step())
            self.seconds = before + time.monotonic() - began
            if self.step % LOG_EVERY == 0:
                means = {name: total / LOG_EVERY for name, total in sums.items()}
                sums.clear()
                for name, mean in means.items():
                    writer.add_scalar(f"train/{name}", mean, self.step)
                parts = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
                rate = (self.step - first) / (time.monotonic() - began)
                left = (self.flags.steps - self.step) / rate / 60
                print(
                    f"step {self.step}/{self.flags.steps}: {parts}; {rate:.2f} steps/s, {left:.0f} min left", flush=True
                )
            if self.step % SAVE_EVERY == 0 and self.step < self.flags.steps:
                self._judge_and_save(writer)
        self._judge_and_save(writer)
        writer.close()

    def _judge_and_save(self, writer: SummaryWriter) -> None:
        distances = self.held_out_distances()
        for depth, distance in distances.items():
            writer.add_scalar(f"held_out_log_mel/{depth}_levels", distance, self.step)
        parts = ", ".join(f"{distance:.3f} at {depth}" for depth, distance in distances.items())
        print(f"step {self.step}/{self.flags.steps}: held-out log-mel distance {parts} levels", flush=True)
        self.save()


def _settings(flags: CodecFlags) -> dict[str, Any]:
    """What a continued run must share."""
    return {name: value for name, value in vars(flags).items() if name not in ("output_dir", "validation_corpus")}


def train_tiny_codec(flags: CodecFlags) -> None:
    """Train a codec, or continue."""
    for flag in ("steps", "batch_size", "learning_rate"):
        if not getattr(flags, flag) > 0:
            raise UserError(f"--{flag} is {getattr(flags, flag)}; it must be greater than 0")
    if flags.seed < 0:
        raise UserError(f"--seed is {flags.seed}; it must not be negative")
    if flags.output_dir.exists() and not flags.output_dir.is_dir():
        raise UserError(f"--output_dir is '{flags.output_dir}', which is a file; name a folder")
    if flags.codebook_size < 2 or flags.codebook_size & (flags.codebook_size - 1):
        raise UserError(f"--codebook_size is {flags.codebook_size}; Mimi takes a power of 2, such as 256")
    torch.set_flush_denormal(True)  # numbers near zero would otherwise slow the CPU down
    run = CodecRun(flags)
    run.start()
    run.run()
    print(f"codec: {flags.output_dir / 'codec'}")


if __name__ == "__main__":
    run_command(train_tiny_codec, __doc__)
