"""Builds assets/tiny: a spoken corpus, isolated words, a Llama base without weights, and benchmark folders.

    uv run python scripts/tiny/build_tiny_assets.py --output_dir assets/tiny

The codec, `mimi/`, and the listeners, `recogniser/` and `speaker_encoder/`, are trained on that corpus by
scripts/tiny/train_tiny_codec.py and train_tiny_listeners.py and are left alone here.

Everything is synthesised with espeak-ng from text written for this project and depends only on fixed seeds, so that
the whole project can be trained and evaluated offline in minutes.
"""

from __future__ import annotations

import csv
import io
import itertools
import platform
import random
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf
import tiny_text as text
import torch
import torchaudio
import transformers
from datasets import Audio, Features, Value
from tiny_text import SPEAKERS, Speaker
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from llama_mimi.checkpoint.huggingface import save_folder
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError

SAMPLE_RATE = 24_000  # Hz
OPUS_LEVEL = 0.95  # libsndfile's compression level; about 22 kbit/s for mono speech
PAUSE = np.zeros(SAMPLE_RATE // 8, dtype=np.float32)  # 0.125 s between parts that are synthesised separately
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>"]
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
PAIRS = 100
SPEAKER_PAIRS = 200
PARTS = ("corpus", "words", "llama", "benchmarks")
TRAINED = ("mimi", "recogniser", "speaker_encoder")
TAKES = {"train": (-1, 0, 1), "validation": (0.5,)}  # an isolated word's, each in its own pitch and speed
PROMPT_SECONDS = 1.6


def speak(sentence: str, speaker: Speaker) -> np.ndarray:
    """Speech of `sentence`: float32 mono at 24 kHz, silence at both ends cut to 50 ms, peak 0.9."""
    command = ["espeak-ng", "--stdout", "-v", speaker.voice, "-p", str(speaker.pitch), "-s", str(speaker.speed)]
    wav = subprocess.run([*command, sentence], check=True, capture_output=True).stdout
    # espeak-ng writes a placeholder length into the header when it streams, so the samples are read past it.
    rate = struct.unpack_from("<I", wav, 24)[0]
    samples = np.frombuffer(wav[44 : len(wav) - len(wav) % 2], dtype="<i2").astype(np.float32) / 32768
    audio = torchaudio.functional.resample(torch.from_numpy(samples), rate, SAMPLE_RATE).numpy()
    loud = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max())
    margin = SAMPLE_RATE // 20
    audio = audio[max(0, loud[0] - margin) : loud[-1] + margin]
    return (audio * (0.9 / np.abs(audio).max())).astype(np.float32)


def fix_ogg_serial(data: bytes) -> bytes:
    """Sets the stream number of every Ogg page to 1; libsndfile draws it at random, which would change every build."""
    pages = bytearray(data)
    start = 0
    while start < len(pages):
        segments = pages[start + 26]
        end = start + 27 + segments + sum(pages[start + 27 : start + 27 + segments])
        struct.pack_into("<III", pages, start + 14, 1, struct.unpack_from("<I", pages, start + 18)[0], 0)
        # Ogg's checksum is zlib's CRC-32 with the bits of every byte, and of the result, in the other order.
        crc = zlib.crc32(bytes(pages[start:end]).translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
        struct.pack_into("<I", pages, start + 22, int(f"{crc:032b}"[::-1], 2))
        start = end
    return bytes(pages)


def to_opus(audio: np.ndarray, level: float = OPUS_LEVEL) -> bytes:
    """Ogg Opus bytes of a 24 kHz mono clip, checked to decode to the same number of samples."""
    buffer = io.BytesIO()
    sf.write(buffer, audio, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=level)
    data = fix_ogg_serial(buffer.getvalue())
    decoded, rate = sf.read(io.BytesIO(data), dtype="float32")
    if rate != SAMPLE_RATE or abs(len(decoded) - len(audio)) > 8 or not np.isfinite(decoded).all():
        raise RuntimeError(f"Opus clip decodes to {len(decoded)} samples at {rate} Hz, expected {len(audio)}.")
    return data


def write_opus(path: Path, audio: np.ndarray, level: float = OPUS_LEVEL) -> None:
    """Writes a clip as Ogg Opus; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_opus(audio, level))


def make_rows(maker: text.SentenceMaker, split: str, seconds: float) -> list[dict]:
    """Corpus rows of clips of 2.0 to 4.8 s, speakers in turn, until their total exceeds `seconds`."""
    rows: list[dict] = []
    total, turn = 0.0, 0
    while total < seconds:
        speaker, sentence = SPEAKERS[turn % len(SPEAKERS)], maker.corpus()
        turn += 1
        audio = speak(sentence, speaker)
        duration = len(audio) / SAMPLE_RATE
        if not 2.0 <= duration <= 4.8:
            continue
        name = f"{split}-{len(rows):05d}"
        clip = {"bytes": to_opus(audio), "path": f"{name}.ogg"}
        rows.append({"id": name, "audio": clip, "text": sentence, "speaker": speaker.name, "duration": duration})
        total += duration
    maker.rng.shuffle(rows)
    return rows


def make_words(split: str) -> list[dict]:
    """Corpus rows of the ten digits said alone by every speaker, a little off their usual pitch and speed."""
    rows: list[dict] = []
    for speaker, take, word in itertools.product(SPEAKERS, TAKES[split], text.DIGITS):
        pitch, speed = round(speaker.pitch + 6 * take), round(speaker.speed + 15 * take)
        audio = speak(word, replace(speaker, pitch=min(max(pitch, 0), 99), speed=speed))
        name = f"word-{split}-{len(rows):03d}"
        clip = {"bytes": to_opus(audio), "path": f"{name}.ogg"}
        duration = len(audio) / SAMPLE_RATE
        rows.append({"id": name, "audio": clip, "text": word, "speaker": speaker.name, "duration": duration})
    return rows


def write_corpus(folder: Path, split: str, rows: list[dict], shards: int) -> None:
    """Writes rows to parquet shards, in row groups of 32, with the schema metadata that `datasets` reads."""
    string = Value("string")
    names = {"id": string, "audio": Audio(), "text": string, "speaker": string, "duration": Value("float64")}
    schema = Features(names).arrow_schema
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        table = pa.Table.from_pylist(rows[shard::shards], schema=schema)
        path = folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
        pq.write_table(table, path, row_group_size=32, compression="none")


def write_llama(folder: Path, lines: list[str]) -> None:
    """Writes the base Llama folder: a config without weights and a byte-level BPE tokenizer of 512 entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=512 - len(SPECIALS), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    bos, eos, pad, _ = SPECIALS
    ids = {token: tokenizer.token_to_id(token) for token in SPECIALS}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, ids[bos])]
    )
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, model_max_length=131072)
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    shape = {"vocab_size": 512, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 131072}
    other = {"rms_norm_eps": 1e-5, "rope_parameters": rope, "tie_word_embeddings": True}
    other |= {"bos_token_id": ids[bos], "eos_token_id": ids[eos], "architectures": ["LlamaForCausalLM"]}
    config = LlamaConfig(**shape, **other)
    save_folder(folder, config, fast)
    if len(fast) != 512 or fast("hello").input_ids[0] != ids[bos] or list(ids.values()) != [508, 509, 510, 511]:
        raise RuntimeError("The tokenizer does not have 512 entries with the special tokens last.")


def write_speaker_consistency(folder: Path, maker: text.SentenceMaker) -> None:
    """SALMon pairs: one speaker throughout against a change of speaker half-way, same words."""
    for index in range(SPEAKER_PAIRS):
        # The second speaker runs through all seven others as `index` grows.
        speaker, other = (SPEAKERS[i % len(SPEAKERS)] for i in (index, index + 1 + index // 8 % 7))
        while True:
            first, second = maker.halves()
            opening = speak(first, speaker)
            clips = [np.concatenate([opening, PAUSE, speak(second, voice)]) for voice in (speaker, other)]
            if all(2.0 <= len(clip) / SAMPLE_RATE <= 5.0 for clip in clips):
                break
        for k, clip in enumerate(clips):
            write_opus(folder / f"sample_{index}_{k}.ogg", clip)


def phones_of(word: str, speaker: Speaker) -> list[str]:
    """Phones of a word in the accent of `speaker`, in espeak-ng's IPA."""
    command = ["espeak-ng", "-q", "--ipa", "--sep= ", "-v", speaker.voice, word]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def write_gold(path: Path, rows: list[dict]) -> None:
    """The benchmark's table of clips, one row each."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_lexical(folder: Path, counts: Counter[str], rng: random.Random) -> None:
    """sLM21 lexical pairs: a word of the training text against the same word with two letters changed."""
    names = {name.lower() for name in (*text.NAMES, "Saturday")}
    words = sorted(word for word in counts if len(word) >= 5 and text.syllables(word) >= 2 and word not in names)
    rng.shuffle(words)
    rows: list[dict] = []
    taken = set(counts)
    for word in words:
        speaker, pair = SPEAKERS[len(rows) // 2 % len(SPEAKERS)], len(rows) // 2
        made = text.non_word(word, random.Random(f"non-word of {word}"), taken)
        if made is None or phones_of(word, speaker) == phones_of(made, speaker):
            continue
        taken.add(made)
        for item, correct in ((word, 1), (made, 0)):
            name = f"{item}_{speaker.name}"
            phones = phones_of(item, speaker)
            row = {"filename": name, "id": pair, "voice": speaker.name, "frequency": counts[word], "word": item}
            rows.append(row | {"phones": " ".join(phones), "length": len(phones), "correct": correct})
            write_opus(folder / f"{name}.ogg", speak(item, speaker))
        if len(rows) == 2 * PAIRS:
            break
    if len(rows) != 2 * PAIRS:
        raise RuntimeError(f"Only {len(rows) // 2} word pairs could be made.")
    write_gold(folder / "gold.csv", rows)


def write_syntactic(folder: Path, maker: text.SentenceMaker) -> None:
    """sLM21 syntactic pairs: a new sentence against the same words in a wrong order."""
    rows: list[dict] = []
    for pair in range(PAIRS):
        # The kind advances every eight pairs, so that kinds and speakers mix.
        kind = text.SYNTACTIC_TYPES[(pair + pair // len(SPEAKERS)) % len(text.SYNTACTIC_TYPES)]
        speaker = SPEAKERS[pair % len(SPEAKERS)]
        for sentence, correct in zip(maker.order_pair(kind), (1, 0), strict=True):
            name = f"syntactic_{pair:03d}_{correct}"
            row = {"id": pair, "filename": name, "voice": speaker.name, "type": "word_order", "subtype": kind}
            rows.append(row | {"transcription": sentence, "correct": correct})
            write_opus(folder / f"{name}.ogg", speak(sentence, speaker))
    write_gold(folder / "gold.csv", rows)


def write_storycloze(folder: Path, maker: text.SentenceMaker) -> None:
    """Story pairs (2i, 2i+1): the same opening with a fitting and with an unrelated ending, under 10 s."""
    for index in range(PAIRS):
        speaker = SPEAKERS[index % len(SPEAKERS)]
        story, *endings = maker.story()
        opening = speak(story, speaker)
        for offset, (name, ending) in enumerate(zip(("fitting", "unrelated"), endings, strict=True)):
            clip = np.concatenate([opening, PAUSE, speak(ending, speaker)])
            assert len(clip) < 10 * SAMPLE_RATE, f"Story {index} is too long."
            # The longest clips get a lower rate (about 16 kbit/s), which keeps the whole folder under 14 MB.
            write_opus(folder / f"{2 * index + offset}_{name}.ogg", clip, 0.971)


def write_readme(root: Path, train: list[dict], validation: list[dict]) -> None:
    """Writes what the folder holds and how to make it again."""
    espeak = subprocess.run(["espeak-ng", "--version"], check=True, capture_output=True, text=True).stdout
    seconds = [sum(row["duration"] for row in rows) for rows in (train, validation)]
    fields: dict[str, float | str] = {
        part: sum(f.stat().st_size for f in (root / part).rglob("*") if f.is_file()) / 1e6
        for part in (*PARTS, *TRAINED)
    }
    fields |= {"prompt": (root / "prompt.wav").stat().st_size / 1e6, "pairs": PAIRS}
    fields |= {"train_clips": len(train), "train_minutes": seconds[0] / 60}
    fields |= {"validation_clips": len(validation), "validation_minutes": seconds[1] / 60}
    fields["words_mb"] = fields.pop("words")
    fields |= {"takes": len(TAKES["train"]), "words": len(text.DIGITS) * len(SPEAKERS), "speaker_pairs": SPEAKER_PAIRS}
    fields["voices"] = "\n".join(f"| {s.name} | `{s.voice}` | {s.pitch} | {s.speed} |" for s in SPEAKERS)
    fields["command"] = "uv run python scripts/tiny/build_tiny_assets.py --output_dir assets/tiny"
    fields["versions"] = (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"soundfile {sf.__version__} ({sf.__libsndfile_version__}), espeak-ng {espeak.split(':')[1].split()[0]}"
    )
    (root / "README.md").write_text(text.README.format(**fields))


def build_tiny_assets(
    output_dir: Path = Path("assets/tiny"), train_minutes: float = 23.0, validation_minutes: float = 2.5
) -> None:
    """Builds every part in turn.

    Args:
        output_dir: folder to fill
        train_minutes: speech in the training split
        validation_minutes: speech in the validation split
    """
    if shutil.which("espeak-ng") is None:
        raise UserError("espeak-ng is not on PATH; install it (for example `apt-get install espeak-ng`)")
    for part in PARTS:
        shutil.rmtree(output_dir / part, ignore_errors=True)
    maker = text.SentenceMaker(random.Random(2024))

    train = make_rows(maker, "train", train_minutes * 60)
    validation = make_rows(maker, "validation", validation_minutes * 60)
    write_corpus(output_dir / "corpus", "train", train, 4)
    write_corpus(output_dir / "corpus", "validation", validation, 1)
    minutes = sum(row["duration"] for row in train) / 60
    print(f"corpus: {len(train)} training clips ({minutes:.2f} min), {len(validation)} validation clips", flush=True)

    for split in TAKES:
        write_corpus(output_dir / "words", split, make_words(split), 1)
    print("words: digits by every speaker", flush=True)

    write_llama(output_dir / "llama", [row["text"] for row in train])
    print("llama: config and tokenizer of 512 entries", flush=True)

    # Cut in mid-sentence: after a whole one, the likeliest continuation is none.
    prompt = speak(text.render(maker.plain()), SPEAKERS[7])[: round(PROMPT_SECONDS * SAMPLE_RATE)]
    sf.write(output_dir / "prompt.wav", prompt, SAMPLE_RATE, subtype="PCM_16")
    print(f"prompt: {len(prompt) / SAMPLE_RATE:.2f} s", flush=True)

    benchmarks = output_dir / "benchmarks"
    counts = Counter(word for row in train for word in text.words_of(row["text"]))
    write_speaker_consistency(benchmarks / "salmon" / "speaker_consistency", maker)
    print("benchmarks: speaker consistency", flush=True)
    write_lexical(benchmarks / "sLM21" / "lexical" / "dev", counts, random.Random(7))
    write_syntactic(benchmarks / "sLM21" / "syntactic" / "dev", maker)
    print("benchmarks: lexical and syntactic", flush=True)
    write_storycloze(benchmarks / "storycloze", maker)
    print("benchmarks: storycloze", flush=True)

    write_readme(output_dir, train, validation)
    total = sum(file.stat().st_size for file in output_dir.rglob("*") if file.is_file())
    print(f"total: {total / 1e6:.2f} MB in {output_dir}", flush=True)


if __name__ == "__main__":
    run_command(build_tiny_assets, __doc__)
