"""What the three benchmark scripts share: flags, and the way from a source to scores."""

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from llama_mimi.audio.mimi import CodecAttention, codec_hash, whole_frames
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import write_atomically
from llama_mimi.common.hub import weights_sha256
from llama_mimi.common.ranks import Ranks, from_first, torchrun_ranks
from llama_mimi.common.versions import versions
from llama_mimi.evaluation.benchmarks import Benchmark
from llama_mimi.evaluation.clip_codes import CodeCache, cache_key, encode_clips
from llama_mimi.evaluation.clip_scores import ScoreLog, score_clips
from llama_mimi.evaluation.results import (
    FORMAT,
    MAX_AUDIO_SECONDS,
    check_earlier,
    codes_sha256,
    log_key,
    model_folder,
    results,
    summary,
    write_submissions,
)
from llama_mimi.evaluation.scoring import Preset, check_levels, preset, with_options
from llama_mimi.generation.speech_model import DECODER_DTYPES, load_speech_model

BATCH_TOKENS = (4096, 32768)  # without and with a GPU


@dataclass(frozen=True)
class BenchmarkScript:
    """One of the scripts in eval/.

    Args:
        name: of the benchmark, and of its folder of results.
        hub_source: read when no ``--data_dir`` is given.
        read: a reader of `llama_mimi.evaluation.benchmarks`.
        levels: that both presets score; None is all.
        mean_of: parts whose mean is the benchmark's one number, where it has one.
        has_windows: offers ``--window_seconds``.
    """

    name: str
    hub_source: str
    read: Callable[[str], Benchmark]
    levels: tuple[int, ...] | None
    mean_of: Sequence[str] = ()
    has_windows: bool = False

    def run(self, doc: str | None) -> None:
        """Parse the command line, score, report.

        Args:
            doc: the script's docstring.

        Raises:
            UserError: a flag, the data or the model cannot be used.
        """
        flags = self._parse(doc)
        with torchrun_ranks(flags.device) as ranks:
            chosen = self._preset(flags)
            try:
                self._evaluate(flags, chosen, ranks)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"the memory of '{ranks.device}' is full; lower --batch_tokens, or score in --dtype bfloat16"
                ) from error

    def _preset(self, flags: argparse.Namespace) -> Preset:
        for name in ("max_audio_seconds", "batch_tokens"):
            value = getattr(flags, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name} is {value}; it must be a positive number")
        if flags.preset == "original" and flags.max_audio_seconds != MAX_AUDIO_SECONDS:
            raise UserError(f"--preset original cuts at {MAX_AUDIO_SECONDS:g} s; leave out --max_audio_seconds")
        if flags.preset == "original" and flags.codec_attention == "windowed":
            raise UserError("--preset original encodes without the codec's window; leave out --codec_attention")
        return with_options(
            preset(flags.preset, self.levels),
            levels=flags.levels,
            end_token=None if flags.end_token is None else flags.end_token == "in",
            statistic=flags.statistic,
            window_seconds=flags.window_seconds if self.has_windows else None,
        )

    def _parse(self, doc: str | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--model_name", default="llm-jp/Llama-Mimi-1.3B", help="hub id or folder")
        parser.add_argument("--data_dir", default=self.hub_source, help="official layout, Parquet, or a hub id")
        parser.add_argument("--output_dir", type=Path, default=Path("results"))
        parser.add_argument("--codes_dir", help="codes of clips, kept for other runs (default <output_dir>/codes)")
        parser.add_argument("--codec", help="hub id or folder; by default what the model names")
        parser.add_argument(
            "--codec_attention", choices=get_args(CodecAttention), help="by default that of the model's training codes"
        )
        parser.add_argument("--device", help="by default the accelerator where there is one")
        parser.add_argument(
            "--dtype", choices=DECODER_DTYPES, default="float32", help="of the decoder; the first release: float16"
        )
        parser.add_argument("--batch_tokens", type=int, help="tokens of a batch, with padding; default by device")
        parser.add_argument(
            "--max_audio_seconds", type=float, default=MAX_AUDIO_SECONDS, help="longer clips are cut, and counted"
        )
        parser.add_argument(
            "--preset",
            choices=("official", "original"),
            default="official",
            help="the benchmark's own rule, or what the first release of Llama-Mimi computes",
        )
        options = parser.add_argument_group("other scoring, which is named in the result file")
        options.add_argument("--levels", help="quantizer levels to score: all, or 0, or 0,1")
        options.add_argument("--end_token", choices=("in", "out"), help="score </audio> or not")
        options.add_argument("--statistic", choices=("mean", "sum"), help="of the log-likelihoods of a clip's tokens")
        if self.has_windows:
            options.add_argument("--window_seconds", type=float, help="score the least likely window of this length")
        return parser.parse_args()

    def _evaluate(self, flags: argparse.Namespace, chosen: Preset, ranks: Ranks) -> None:
        benchmark = self.read(flags.data_dir)
        model = load_speech_model(
            flags.model_name,
            codec_name=flags.codec,
            attention="whole" if chosen.scoring.as_released else flags.codec_attention,
            device=str(ranks.device),
            dtype=flags.dtype,
        )
        if not whole_frames(flags.max_audio_seconds, model.codec.config):
            raise UserError(
                f"--max_audio_seconds is {flags.max_audio_seconds}, less than a frame of the codec; raise it"
            )
        check_levels(chosen.scoring, model.codec.num_quantizers)
        header = {
            "format": FORMAT,
            "benchmark": self.name,
            "preset": chosen.name,
            "model": flags.model_name,
            "model_sha256": from_first(lambda: weights_sha256(flags.model_name)),
            "data": flags.data_dir,
            "scoring": chosen.describe(),
            "num_quantizers": model.codec.num_quantizers,
            "codec": {
                "name": model.codec.name,
                "sha256": codec_hash(model.codec.name),
                "attention": model.codec.attention,
            },
            "settings": {
                "dtype": flags.dtype,
                "device": ranks.device.type,
                "batch_tokens": flags.batch_tokens or BATCH_TOKENS[ranks.device.type == "cuda"],
                "max_audio_seconds": flags.max_audio_seconds,
            },
            "versions": versions(),
        }
        path = flags.output_dir / self.name / model_folder(flags.model_name) / f"{chosen.name}.json"
        replaced = from_first(lambda: check_earlier(path, header))

        clips = benchmark.clips
        as_released = chosen.scoring.as_released
        codes_dir = flags.codes_dir or str(flags.output_dir / "codes")
        cache = CodeCache(codes_dir, cache_key(model.codec, flags.max_audio_seconds, as_released=as_released))
        audio_ids, codes = encode_clips(
            model.codec, clips, cache, ranks, flags.max_audio_seconds, as_released=as_released
        )
        header["audio_sha256"] = hashlib.sha256("".join(audio_ids).encode()).hexdigest()
        header["codes_sha256"] = codes_sha256(audio_ids, codes)
        log = ScoreLog(path.with_suffix(".partial"), log_key(header, adds_bos=model.sequences.adds_bos))
        scores = score_clips(model, codes, chosen.scoring, header["settings"]["batch_tokens"], log, ranks)
        if ranks.rank == 0:
            report = header | results(benchmark, audio_ids, codes, scores, chosen, self.mean_of)
            content = json.dumps(report, indent=1, allow_nan=False) + "\n"
            write_atomically(str(path.parent), path.name, content.encode())
            submissions = write_submissions(
                path.with_name(f"{chosen.name}_submission"), clips, [scores[audio_id] for audio_id in audio_ids]
            )
            log.close()
            for line in [*summary(report), *submissions, *replaced, f"written to {path}"]:
                print(line)
