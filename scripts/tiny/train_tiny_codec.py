"""Train a small Mimi on any corpus: the codec of assets/tiny, or one for your own speech.

uv run python scripts/tiny/train_tiny_codec.py --corpus "assets/tiny/corpus/train-*.parquet" \\
    --validation_corpus "assets/tiny/corpus/validation-*.parquet" --output_dir outputs/tiny_codec

The same command continues a run that was stopped. `--output_dir` gets `codec/` (for `MimiModel.from_pretrained`, in
float16) and `checkpoint.pt` (the whole state).
"""

import dataclasses
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

import tiny_codec as tiny
import torch
from torch.nn.functional import l1_loss, pad

from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.common.versions import versions
from llama_mimi.corpora.clips import AudioClip, AudioReader, SkippedClip
from llama_mimi.corpora.formats import open_source
from llama_mimi.data.dataloader import Clip, ClipStream
from llama_mimi.data.order import ClipRef, Position, RowsInOrder, ShuffledOrder

CROP_FRAMES = 12  # 0.96 s
WARMUP_FRACTION = 0.4  # of all steps, without quantization
FIT_BATCHES = 60  # number of batches on which k-means fits the codebooks
COMMITMENT_WEIGHT = 0.25  # as in VQ-VAE (arXiv 1711.00937, section 3.2)
GRADIENT_NORM = 1.0
LOG_EVERY, SAVE_EVERY = 50, 500  # steps
HELD_OUT_CLIPS, HELD_OUT_SECONDS = 16, 3.0


@dataclass(frozen=True)
class CodecFlags:
    """Options of a training run.

    Args:
        corpus: name, folder, or Parquet path or glob to train on
        validation_corpus: held-out clips
        output_dir: folder of the run
        batch_size: crops of 0.96 s per step
        codebook_size: codes of a level, a power of 2
        learning_rate: peak
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
    """A training run and its whole state; it continues from the checkpoint in its folder."""

    def __init__(self, flags: CodecFlags) -> None:
        num_fit_frames = FIT_BATCHES * flags.batch_size * CROP_FRAMES
        if flags.codebook_size not in [2**bits for bits in range(1, num_fit_frames.bit_length())]:
            problem = f"--codebook_size is {flags.codebook_size}, but codebooks are fitted to {num_fit_frames} frames"
            raise UserError(f"{problem}; choose a smaller power of 2, or a larger --batch_size")
        self.flags, self.path = flags, flags.output_dir / "checkpoint.pt"
        # A continued run must have the same settings.
        self.settings = vars(flags) | {"output_dir": None, "validation_corpus": None}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(flags.seed)
        self.config = config = tiny.tiny_mimi_config(flags.codebook_size)
        self.crop_size = CROP_FRAMES * config.frame_size
        reader = self._open(flags.corpus, max_seconds=20.0)
        self.order = ShuffledOrder([reader], [1.0], 0, 1, 1024, flags.seed)
        self.stream = ClipStream([reader], self.order, flags.batch_size)
        self.held_out = self._held_out_clips()
        self.starts: list[dict[str, Any]] = []  # step and commit of each start
        self.step = 0
        self.fit_step = round(flags.steps * WARMUP_FRACTION)  # the codec is quantized from this step on
        self.model = tiny.new_codec(config).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.8, 0.99), weight_decay=0.0)
        self.loss = tiny.SpectralLoss(config.sampling_rate).to(self.device)
        self.mel = tiny.MelMagnitude(config.sampling_rate).to(self.device)
        self._resume()
        self.batches = iter(self.stream)

    def _open(self, corpus: str, *, max_seconds: float) -> AudioReader:
        rate_hz, frame_size = self.config.sampling_rate, self.config.frame_size
        max_frames = int(max_seconds * rate_hz / frame_size)
        source = open_source(corpus, None, "audio", None)
        return AudioReader(source, sample_rate_hz=rate_hz, frame_size=frame_size, max_frames=max_frames)

    def _held_out_clips(self) -> list[torch.Tensor]:
        """Return the first held-out clips (S,)."""
        reader = self._open(self.flags.validation_corpus, max_seconds=HELD_OUT_SECONDS)
        chunks = ClipStream([reader], RowsInOrder(reader.rows_per_unit), 1)
        clips = (samples_S for chunk in chunks for samples_S in usable(chunk))
        if found := list(itertools.islice(clips, HELD_OUT_CLIPS)):
            return found
        raise UserError(f"no clip of the corpus '{self.flags.validation_corpus}' can be used; fix the skipped ones")

    def crops(self) -> torch.Tensor:
        """Return the next batch of random crops (B, 1, S); shorter clips are padded with silence."""
        chunk = next(self.batches)
        for _ in chunk:
            self.order.next_clip()
        crops = []
        for samples_S in usable(chunk):
            start = int(torch.randint(max(len(samples_S) - self.crop_size, 0) + 1, ()))
            crop_S = samples_S[start : start + self.crop_size]
            crops.append(pad(crop_S, (0, self.crop_size - len(crop_S))))
        if not crops:
            raise UserError(f"no clip of a batch of '{self.flags.corpus}' can be used; fix the skipped ones")
        return torch.stack(crops)[:, None].to(self.device)

    def train_step(self) -> dict[str, float]:
        """Take one optimizer step; its randomness depends on the seed and the step only."""
        torch.manual_seed(self.flags.seed * 1_000_003 + self.step)
        if self.step == 0:
            tiny.standardize(self.model, torch.cat([self.crops() for _ in range(8)]))
        if self.step == self.fit_step:
            tiny.fit_codebooks(self.model, [self.crops() for _ in range(FIT_BATCHES)])
        audio_B1S = self.crops()
        # Half of the clips have all levels; the others train every prefix of the levels as a codec of its own.
        num_levels = self.config.num_quantizers
        depth_B = torch.randint(1, num_levels + 1, (len(audio_B1S),), device=self.device)
        depth_B[: len(audio_B1S) // 2] = num_levels
        decoded_B1S, commitment = tiny.reconstruct(
            self.model, audio_B1S, depth_B, is_quantized=self.step >= self.fit_step
        )
        spectral, waveform = self.loss(decoded_B1S, audio_B1S), l1_loss(decoded_B1S, audio_B1S)
        # A cosine from the peak to 2 % of it, with a linear warm-up over the first 100 steps.
        decay = 0.02 + 0.98 * (1 + math.cos(math.pi * self.step / self.flags.steps)) / 2
        rate = self.flags.learning_rate * min(1.0, (self.step + 1) / 100) * decay
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        (spectral + waveform + COMMITMENT_WEIGHT * commitment).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.step += 1
        if not torch.isfinite(norm):
            problem = f"the gradient of step {self.step} is {norm.item()}"
            raise UserError(f"{problem}; start again with a --learning_rate below {self.flags.learning_rate:g}")
        self.optimizer.step()
        values = {"spectral": spectral, "waveform": waveform, "commitment": commitment, "gradient_norm": norm}
        return {name: value.detach().item() for name, value in values.items()}

    @torch.no_grad()
    def held_out_distances(self) -> dict[int, float]:
        """Return the mean log-mel distance of held-out clips at each depth."""
        distances = dict.fromkeys(tiny.DEPTHS, 0.0)
        self.model.eval()
        for samples_S in self.held_out:
            audio_11S = pad(samples_S, (0, -len(samples_S) % self.config.frame_size))[None, None].to(self.device)
            codes_1QT = self.model.encode(audio_11S).audio_codes
            for depth in tiny.DEPTHS:
                decoded_11S = self.model.decode(codes_1QT[:, :depth]).audio_values
                distances[depth] += float(self.mel.distances(decoded_11S, audio_11S)[0]) / len(self.held_out)
        self.model.train()
        return distances

    def save(self) -> None:
        """Export the codec with a record of its training, then replace the checkpoint."""
        folder = self.flags.output_dir / "codec"
        tiny.save_half(self.model, folder)
        command = shlex.join(["uv", "run", "python", *sys.argv])
        record = {"command": command, "corpus": self.flags.corpus, "steps": self.step, "starts": self.starts}
        record["versions"] = {name: number for name, number in versions().items() if name != "commit"}
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        state = {"settings": self.settings, "step": self.step, "starts": self.starts}
        state |= {"position": dataclasses.asdict(self.order.position)}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def _resume(self) -> None:
        if self.path.exists():
            state = torch.load(self.path, map_location=self.device, weights_only=True)
            if state["settings"] != self.settings:
                problem = f"'{self.path}' was made with other settings ({state['settings']})"
                raise UserError(f"{problem}; repeat its command line or choose another --output_dir")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.order.position = Position.from_json(state["position"])
            self.step, self.starts = state["step"], state["starts"]
            print(f"continuing after step {self.step} of {self.flags.steps}", flush=True)
        if self.step < self.flags.steps:
            self.starts.append({"step": self.step, "commit": versions()["commit"]})

    def run(self) -> None:
        """Train to the last step, with progress and checkpoints."""
        first, began = self.step, time.monotonic()
        sums: Counter[str] = Counter()
        while self.step < self.flags.steps:
            sums.update(self.train_step())
            progress = f"step {self.step}/{self.flags.steps}:"
            if self.step % LOG_EVERY == 0:
                parts = ", ".join(f"{name} {total / LOG_EVERY:.3f}" for name, total in sums.items())
                sums.clear()
                rate = (self.step - first) / (time.monotonic() - began)
                left = (self.flags.steps - self.step) / rate / 60
                print(f"{progress} {parts}; {rate:.2f} steps/s, {left:.0f} min left", flush=True)
            if self.step % SAVE_EVERY == 0 or self.step == self.flags.steps:
                if self.step > self.fit_step:
                    parts = ", ".join(f"{value:.3f} at {depth}" for depth, value in self.held_out_distances().items())
                    print(f"{progress} held-out log-mel distance {parts} levels", flush=True)
                self.save()


def usable(chunk: list[tuple[ClipRef, Clip]]) -> list[torch.Tensor]:
    """Return the samples of the clips that can be used, and name the others."""
    clips = [clip for _, clip in chunk]
    for clip in clips:
        if isinstance(clip, SkippedClip):
            print(f"skipped: {clip.message}", flush=True)
    return [torch.from_numpy(clip.samples_S) for clip in clips if isinstance(clip, AudioClip)]


def train_tiny_codec(flags: CodecFlags) -> None:
    """Train a codec, or continue."""
    torch.set_flush_denormal(True)  # numbers near zero would slow the CPU down
    CodecRun(flags).run()
    print(f"codec: {flags.output_dir / 'codec'}")


if __name__ == "__main__":
    run_command(train_tiny_codec, __doc__)
