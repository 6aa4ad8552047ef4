"""Train a small Mimi: the codec of assets/tiny, or a codec for your own speech.

uv run python scripts/tiny/train_tiny_codec.py --corpus "assets/tiny/corpus/train-*.parquet" \\
    --validation_corpus "assets/tiny/corpus/validation-*.parquet" --output_dir outputs/tiny_codec

To resume a stopped run, repeat the command. The corpus is read into memory: 346 MB per hour of audio. The run writes
`codec/` (for `MimiModel.from_pretrained`, in float16) and `checkpoint.pt` (the state of the run) to `--output_dir`.
"""

import json
import math
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import tiny_codec as tiny
import torch
from torch.nn.functional import l1_loss, pad
from tqdm import tqdm

from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.common.versions import versions

CROP_FRAMES = 12  # 0.96 s
WARMUP_FRACTION = 0.4  # fraction of the steps without quantization
FIT_BATCHES = 60  # number of batches on which k-means fits the codebooks
COMMITMENT_WEIGHT = 0.25  # as in VQ-VAE (arXiv 1711.00937, section 3.2)
GRADIENT_NORM = 1.0
SAVE_EVERY = 500  # steps
HELD_OUT_CLIPS, HELD_OUT_FRAMES = 16, 37  # 2.96 s


@dataclass(frozen=True)
class CodecFlags:
    """Options of a training run."""

    corpus: str  # training corpus, in any format that llama_mimi.train reads
    validation_corpus: str  # held-out clips
    output_dir: Path  # folder of the run
    steps: int = 6000
    batch_size: int = 8  # number of crops of 0.96 s per step
    codebook_size: int = 256  # number of codes per level
    learning_rate: float = 1e-3  # peak learning rate
    seed: int = 1


class CodecRun:
    """Training run that resumes from the checkpoint in its folder."""

    def __init__(self, flags: CodecFlags) -> None:
        self.flags, self.path = flags, flags.output_dir / "checkpoint.pt"
        # A resumed run must have the same settings.
        self.settings = vars(flags) | {"output_dir": None, "validation_corpus": None}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(flags.seed)
        self.config = config = tiny.tiny_mimi_config(flags.codebook_size)
        self.crop_size, held_out_size = CROP_FRAMES * config.frame_size, HELD_OUT_FRAMES * config.frame_size
        limit = FIT_BATCHES * flags.batch_size * CROP_FRAMES
        if flags.codebook_size > limit:
            problem = f"--codebook_size is {flags.codebook_size}, more than the {limit} frames that k-means uses"
            raise UserError(f"{problem}; lower --codebook_size or raise --batch_size")
        self.clips = [clip.samples_S for clip in tiny.read_clips(flags.corpus, config.sampling_rate)]
        held_out = tiny.read_clips(flags.validation_corpus, config.sampling_rate)[:HELD_OUT_CLIPS]
        self.held_out = [clip.samples_S[:held_out_size] for clip in held_out]
        self.step = 0
        self.fit_step = round(flags.steps * WARMUP_FRACTION)  # quantization starts at this step
        self.model = tiny.new_codec(config).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.8, 0.99), weight_decay=0.0)
        self.loss = tiny.SpectralLoss(config.sampling_rate).to(self.device)
        self.mel = tiny.MelMagnitude(config.sampling_rate).to(self.device)
        self._resume()

    def crops(self) -> torch.Tensor:
        """Return a batch of random crops (B, 1, S). Clips that are shorter than a crop are padded with silence."""
        crops = []
        for index in torch.randint(len(self.clips), (self.flags.batch_size,)).tolist():
            samples_S = self.clips[index]
            start = int(torch.randint(max(len(samples_S) - self.crop_size, 0) + 1, ()))
            crop_S = samples_S[start : start + self.crop_size]
            crops.append(pad(crop_S, (0, self.crop_size - len(crop_S))))
        return torch.stack(crops)[:, None].to(self.device)

    def train_step(self) -> dict[str, float]:
        """Take one optimizer step; its random numbers depend only on the seed and the step number."""
        torch.manual_seed(self.flags.seed * 1_000_003 + self.step)
        if self.step == 0:
            tiny.standardize(self.model, torch.cat([self.crops() for _ in range(8)]))
        if self.step == self.fit_step:
            tiny.fit_codebooks(self.model, [self.crops() for _ in range(FIT_BATCHES)])
        audio_B1S = self.crops()
        # Half of the clips use all levels. The other clips use their first levels, so that every depth is trained.
        num_levels = self.config.num_quantizers
        depth_B = torch.randint(1, num_levels + 1, (len(audio_B1S),), device=self.device)
        depth_B[: len(audio_B1S) // 2] = num_levels
        decoded_B1S, commitment = tiny.reconstruct(
            self.model, audio_B1S, depth_B, is_quantized=self.step >= self.fit_step
        )
        spectral, waveform = self.loss(decoded_B1S, audio_B1S), l1_loss(decoded_B1S, audio_B1S)
        # Linear warm-up over 100 steps, then a cosine from the peak to 2 % of the peak.
        decay = 0.02 + 0.98 * (1 + math.cos(math.pi * self.step / self.flags.steps)) / 2
        rate = self.flags.learning_rate * min(1.0, (self.step + 1) / 100) * decay
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        (spectral + waveform + COMMITMENT_WEIGHT * commitment).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.step += 1
        if not torch.isfinite(norm):
            problem = f"the gradient norm of step {self.step} is {norm.item()}"
            remedy = f"set --learning_rate below {self.flags.learning_rate:g}, and --output_dir to a new folder"
            raise UserError(f"{problem}; {remedy}")
        self.optimizer.step()
        values = {"spectral": spectral, "waveform": waveform, "commitment": commitment, "gradient_norm": norm}
        return {name: value.detach().item() for name, value in values.items()}

    @torch.no_grad()
    def held_out_distances(self) -> dict[int, float]:
        """Return the mean log-mel distance of the held-out clips for each number of levels."""
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
        """Export the codec with a record of its training, and replace the checkpoint."""
        folder = self.flags.output_dir / "codec"
        tiny.save_half(self.model, folder)
        command = shlex.join(["uv", "run", "python", *sys.argv])
        record = {"command": command, "corpus": self.flags.corpus, "steps": self.step, "versions": versions()}
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        state = {"settings": self.settings, "step": self.step}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def _resume(self) -> None:
        if self.path.exists():
            state = torch.load(self.path, map_location=self.device, weights_only=True)
            if state["settings"] != self.settings:
                problem = f"'{self.path}' was written with other settings ({state['settings']})"
                raise UserError(f"{problem}; run again with the saved settings, or set --output_dir to a new folder")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            print(f"resumed at step {self.step} of {self.flags.steps}", flush=True)

    def run(self) -> None:
        """Train to the last step; show progress and save checkpoints."""
        steps = self.flags.steps
        for _ in (progress := tqdm(range(self.step, steps), initial=self.step, total=steps, unit="step")):
            progress.set_postfix({name: f"{value:.3f}" for name, value in self.train_step().items()}, refresh=False)
            if self.step % SAVE_EVERY == 0 or self.step == steps:
                if self.step > self.fit_step:
                    parts = ", ".join(f"{value:.3f} at {depth}" for depth, value in self.held_out_distances().items())
                    progress.write(f"step {self.step}: held-out log-mel distance {parts} levels")
                self.save()


def train_tiny_codec(flags: CodecFlags) -> None:
    """Train a codec, or resume its training."""
    torch.set_flush_denormal(True)  # denormal numbers would slow the CPU down
    CodecRun(flags).run()
    print(f"codec: {flags.output_dir / 'codec'}")


if __name__ == "__main__":
    run_command(train_tiny_codec, __doc__)
