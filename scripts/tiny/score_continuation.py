"""How often a model continues a held-out prompt in the voice of the prompt.

    uv run python scripts/tiny/score_continuation.py --model_name models/tiny \\
        --corpus "assets/tiny/corpus/train-*.parquet" --validation_corpus "assets/tiny/corpus/validation-*.parquet"

A classifier fitted to original recordings names the speaker of what comes after the prompt: of the recording itself, of
its reconstruction by the codec at the model's depth, and of what the model says instead. Only recordings that go on for
a second after the prompt are used. A continuation shorter than `MIN_SECONDS` counts as a voice not kept.
"""

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

from spectrograms import draw_spectrograms
from speech_classifier import SpeechClassifier, read_clips
from tqdm import tqdm

from llama_mimi.common.errors import UserError, run_command
from llama_mimi.common.files import write_atomically
from llama_mimi.common.versions import versions
from llama_mimi.evaluation.accuracy import wilson_interval
from llama_mimi.generation.continuation import SamplingOptions, continue_codes
from llama_mimi.generation.loading import load_speech_model

MIN_SECONDS = 0.25  # below, statistics say nothing about a voice


@dataclass(frozen=True)
class ScoringFlags:
    """What is continued, how, and where the result goes.

    Args:
        model_name: hub id or folder
        corpus: Parquet path or glob with columns audio, speaker, text
        validation_corpus: the same, of held-out clips
        num_samples: continuations, of one clip after the other
        seconds: new audio at most
        picture: PNG of the first continuation and its recording
    """

    model_name: str
    corpus: str
    validation_corpus: str
    num_samples: int = 50
    prompt_seconds: float = 1.6
    seconds: float = 2.0
    temperature: float = 0.8
    top_k: int = 30
    output_file: Path = Path("results/continuation.json")
    picture: Path | None = None


def score_continuation(flags: ScoringFlags) -> None:
    """Continue held-out prompts, write what was heard, and print shares."""
    options = SamplingOptions(seconds=flags.seconds, temperature=flags.temperature, top_k=flags.top_k)
    for flag in ("num_samples", "prompt_seconds"):
        if not getattr(flags, flag) > 0:
            raise UserError(f"--{flag} is {getattr(flags, flag)}; it must be greater than 0")

    model = load_speech_model(flags.model_name)
    codec = model.codec
    rate = codec.sample_rate_hz
    prompt_frames = codec.num_frames(round(flags.prompt_seconds * rate))
    cut = prompt_frames * codec.frame_size
    train = read_clips(flags.corpus, rate)
    held_out = [clip for clip in read_clips(flags.validation_corpus, rate) if len(clip.samples_S) >= cut + rate]
    if not held_out:
        raise UserError(
            f"no clip of '{flags.validation_corpus}' goes on for a second after {flags.prompt_seconds:g} s; "
            f"choose a smaller --prompt_seconds"
        )
    classifier = SpeechClassifier(train, [clip.speaker for clip in train], rate)

    samples, too_short = [], 0
    heard: dict[str, list[bool]] = {"recording": [], "reconstruction": [], "continuation": []}
    used = list(itertools.islice(itertools.cycle(held_out), flags.num_samples))
    for seed, clip in enumerate(tqdm(used, unit="sample")):
        (codes_TQ,) = codec.encode([clip.samples_S])
        if seed < len(held_out):  # each clip once; only what is sampled differs the second time
            decoded_S = codec.decode(codes_TQ)[: len(clip.samples_S)]
            for kind, samples_S in (("recording", clip.samples_S), ("reconstruction", decoded_S)):
                heard[kind].append(classifier.names([samples_S[cut:]]) == [clip.speaker])
        (continued_TQ,) = continue_codes(model, codes_TQ[:prompt_frames], replace(options, seed=seed))
        continued_S = codec.decode(continued_TQ)
        seconds = (len(continued_S) - cut) / rate
        name = classifier.names([continued_S[cut:]])[0] if seconds >= MIN_SECONDS else None
        too_short += name is None
        heard["continuation"].append(name == clip.speaker)
        samples.append({"speaker": clip.speaker, "heard": name, "text": clip.text, "seed": seed, "seconds": seconds})
        if seed == 0 and flags.picture:
            shown = {"recording": clip.samples_S, "prompt, then continuation": continued_S}
            draw_spectrograms(flags.picture, shown, rate, title=f"“{clip.text}”", mark_seconds=cut / rate)
    shares = {kind: sum(kept) / len(kept) for kind, kept in heard.items()}
    report = {
        "model": flags.model_name,
        "speaker_kept": shares,
        "count": len(samples),
        "held_out_clips": len(held_out),
        "too_short": too_short,
        "settings": {key: str(value) for key, value in vars(flags).items()},
        "versions": versions(),
        "samples": samples,
    }
    write_atomically(
        str(flags.output_file.parent), flags.output_file.name, (json.dumps(report, indent=1) + "\n").encode()
    )
    for kind, share in shares.items():
        low, high = wilson_interval(share, len(heard[kind]))
        interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
        print(f"{kind}: speaker named in {100 * share:.1f} % of {len(heard[kind])} ({interval})")
    mean_s = sum(sample["seconds"] for sample in samples) / len(samples)
    print(f"{len(samples)} samples of {len(held_out)} clips, {mean_s:.2f} s on average, {too_short} too short to judge")


if __name__ == "__main__":
    run_command(score_continuation, __doc__)
