"""Build assets/tiny: a spoken corpus, isolated words, a base Llama without weights, and benchmark folders.

    uv run python scripts/tiny/build_tiny_assets.py --output_dir assets/tiny

espeak-ng synthesises the speech from text that was written for this project. All seeds are fixed. This script does not
change the codec (`mimi/`), the ASR model (`recogniser/`) or the speaker encoder (`speaker_encoder/`).
train_tiny_codec.py and train_tiny_listeners.py train these models on the corpus.
"""

import io
import itertools
import random
import re
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf
import tiny_text as text
import torch
import torchaudio
from datasets import Audio, Features, Value
from espeak_phones import Phone, speak_phones
from tiny_text import NEW_VOICE, SPEAKERS, Speaker
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from llama_mimi.checkpoint.huggingface import save_folder
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError

SAMPLE_RATE = 24_000  # Hz
OPUS_LEVEL = 0.95  # libsndfile's compression level; about 22 kbit/s for mono speech
PAUSE = np.zeros(SAMPLE_RATE // 8, dtype=np.float32)  # 0.125 s of silence between parts of a clip
PROSODY_PAUSE = np.zeros(2 * SAMPLE_RATE // 5, dtype=np.float32)  # 0.4 s
FADE = np.linspace(0, 1, SAMPLE_RATE // 100, dtype=np.float32)  # 10 ms before and after a pause
VOWELS = "aeiouæɐɑɒɔəɚɛɜɪʉʊʌᵻ"  # noqa: RUF001  (first symbols of vowels in espeak-ng's English accents)
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>"]
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
PAIRS = 100
SPEAKER_PAIRS = 200
TAKES = {"train": (-1, 0, 1), "validation": (0.5,)}  # variants of an isolated word, with different pitch and speed
PROMPT_SECONDS = 1.6


def speak(sentence: str, speaker: Speaker) -> np.ndarray:
    """Synthesise a sentence as 24 kHz mono float32 audio with a peak of 0.9, and with 50 ms of silence at both ends."""
    command = ["espeak-ng", "--stdout", "-v", speaker.voice, "-p", str(speaker.pitch), "-s", str(speaker.speed)]
    wav = subprocess.run([*command, sentence], check=True, capture_output=True).stdout
    # The length in the header is wrong, because espeak-ng writes to a pipe.
    rate = struct.unpack_from("<I", wav, 24)[0]
    samples = np.frombuffer(wav[44 : len(wav) - len(wav) % 2], dtype="<i2").astype(np.float32) / 32768
    return trim(samples, rate)[0]


def trim(samples: np.ndarray, rate_hz: int) -> tuple[np.ndarray, int]:
    """Resample to 24 kHz, scale to a peak of 0.9 and trim silence to 50 ms; return the audio and its first sample."""
    audio = torchaudio.functional.resample(torch.from_numpy(samples), rate_hz, SAMPLE_RATE).numpy()
    loud = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max())
    margin = SAMPLE_RATE // 20
    start = max(0, loud[0] - margin)
    audio = audio[start : loud[-1] + margin]
    return (audio * (0.9 / np.abs(audio).max())).astype(np.float32), start


def fix_ogg_serial(data: bytes) -> bytes:
    """Set the stream number of every Ogg page to 1. libsndfile would write a different random number in every build."""
    pages = bytearray(data)
    start = 0
    while start < len(pages):
        segments = pages[start + 26]
        end = start + 27 + segments + sum(pages[start + 27 : start + 27 + segments])
        struct.pack_into("<III", pages, start + 14, 1, struct.unpack_from("<I", pages, start + 18)[0], 0)
        # Ogg's checksum is zlib's CRC-32 with reversed bits in every byte and in the result.
        crc = zlib.crc32(bytes(pages[start:end]).translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
        struct.pack_into("<I", pages, start + 22, int(f"{crc:032b}"[::-1], 2))
        start = end
    return bytes(pages)


def to_opus(audio: np.ndarray, level: float = OPUS_LEVEL) -> bytes:
    """Encode a 24 kHz mono clip as Ogg Opus, and return the bytes."""
    buffer = io.BytesIO()
    sf.write(buffer, audio, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=level)
    return fix_ogg_serial(buffer.getvalue())


def write_opus(path: Path, audio: np.ndarray, level: float = OPUS_LEVEL) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_opus(audio, level))


def corpus_row(name: str, audio: np.ndarray, sentence: str, speaker: Speaker) -> dict:
    clip = {"bytes": to_opus(audio), "path": f"{name}.ogg"}
    duration = len(audio) / SAMPLE_RATE
    return {"id": name, "audio": clip, "text": sentence, "speaker": speaker.name, "duration": duration}


def make_rows(maker: text.SentenceMaker, split: str, seconds: float) -> list[dict]:
    """Return corpus rows: clips of 2.0 to 4.8 s that last at least ``seconds`` in total. The speakers alternate."""
    rows: list[dict] = []
    total, turn = 0.0, 0
    while total < seconds:
        speaker, sentence = SPEAKERS[turn % len(SPEAKERS)], maker.corpus()
        turn += 1
        audio = speak(sentence, speaker)
        duration = len(audio) / SAMPLE_RATE
        if not 2.0 <= duration <= 4.8:
            continue
        rows.append(corpus_row(f"{split}-{len(rows):05d}", audio, sentence, speaker))
        total += duration
    maker.rng.shuffle(rows)
    return rows


def make_words(split: str) -> list[dict]:
    """Return corpus rows of isolated digits. Every speaker says every digit once for each variant in `TAKES`."""
    rows: list[dict] = []
    for speaker, take, word in itertools.product(SPEAKERS, TAKES[split], text.DIGITS):
        pitch, speed = round(speaker.pitch + 6 * take), round(speaker.speed + 15 * take)
        audio = speak(word, speaker._replace(pitch=min(max(pitch, 0), 99), speed=speed))
        rows.append(corpus_row(f"word-{split}-{len(rows):03d}", audio, word, speaker))
    return rows


def write_corpus(folder: Path, split: str, rows: list[dict], shards: int) -> None:
    """Write Parquet shards with row groups of 32 rows and the schema metadata that `datasets` reads."""
    string = Value("string")
    names = {"id": string, "audio": Audio(), "text": string, "speaker": string, "duration": Value("float64")}
    schema = Features(names).arrow_schema
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        table = pa.Table.from_pylist(rows[shard::shards], schema=schema)
        path = folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
        pq.write_table(table, path, row_group_size=32, compression="none")


def write_new_voice(folder: Path, maker: text.SentenceMaker) -> None:
    """Write folders of clips with a ninth voice, for fine-tuning: about 5 minutes to train on, and 1 to validate."""
    for split, num_clips in (("train", 96), ("validation", 20)):
        index = 0
        while index < num_clips:
            audio = speak(maker.corpus(), NEW_VOICE)
            if 2.0 <= len(audio) / SAMPLE_RATE <= 4.8:
                write_opus(folder / split / f"{split}_{index:03d}.ogg", audio)
                index += 1


def write_llama(folder: Path, lines: list[str]) -> None:
    """Write the folder of the base Llama: a config and a byte-level BPE tokenizer of 512 entries, without weights."""
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
    save_folder(folder, LlamaConfig(**shape, **other), fast)


def write_speaker_consistency(folder: Path, maker: text.SentenceMaker) -> None:
    """Write SALMon pairs, and the speaker of each pair's beginning.

    The clips of a pair have the same words. In the second clip, the speaker changes halfway.
    """
    rows: list[dict] = []
    for index in range(SPEAKER_PAIRS):
        speaker, other = (SPEAKERS[i % len(SPEAKERS)] for i in (index, index + 1 + index // 8 % 7))
        while True:
            first, second = maker.halves()
            opening = speak(first, speaker)
            clips = [np.concatenate([opening, PAUSE, speak(second, voice)]) for voice in (speaker, other)]
            if all(2.0 <= len(clip) / SAMPLE_RATE <= 5.0 for clip in clips):
                break
        for k, clip in enumerate(clips):
            write_opus(folder / f"sample_{index}_{k}.ogg", clip)
        rows.append({"index": index, "speaker": speaker.name})
    pd.DataFrame(rows).to_csv(folder / "speakers.csv", index=False)


def phones_of(word: str, speaker: Speaker) -> list[str]:
    """Return the phones of a word in a speaker's accent, as IPA symbols from espeak-ng."""
    command = ["espeak-ng", "-q", "--ipa", "--sep= ", "-v", speaker.voice, word]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def write_lexical(folder: Path, counts: Counter[str], rng: random.Random) -> None:
    """Write sLM21 lexical pairs: a word of the training text, and a non-word that differs in two letters."""
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
            name, phones = f"{item}_{speaker.name}", phones_of(item, speaker)
            row = {"filename": name, "id": pair, "voice": speaker.name, "frequency": counts[word], "word": item}
            rows.append(row | {"phones": " ".join(phones), "length": len(phones), "correct": correct})
            write_opus(folder / f"{name}.ogg", speak(item, speaker))
        if len(rows) == 2 * PAIRS:
            break
    pd.DataFrame(rows).to_csv(folder / "gold.csv", index=False)


def write_syntactic(folder: Path, maker: text.SentenceMaker) -> None:
    """Write sLM21 syntactic pairs: a new sentence, and the same words in a wrong order."""
    rows: list[dict] = []
    for pair in range(PAIRS):
        # The kind also changes every eight pairs, so that every speaker gets every kind.
        kind = text.SYNTACTIC_TYPES[(pair + pair // len(SPEAKERS)) % len(text.SYNTACTIC_TYPES)]
        speaker = SPEAKERS[pair % len(SPEAKERS)]
        for sentence, correct in zip(maker.order_pair(kind), (1, 0), strict=True):
            name = f"syntactic_{pair:03d}_{correct}"
            row = {"id": pair, "filename": name, "voice": speaker.name, "type": "word_order", "subtype": kind}
            rows.append(row | {"transcription": sentence, "correct": correct})
            write_opus(folder / f"{name}.ogg", speak(sentence, speaker))
    pd.DataFrame(rows).to_csv(folder / "gold.csv", index=False)


def write_storycloze(folder: Path, maker: text.SentenceMaker) -> None:
    """Write story pairs (files 2i and 2i + 1): the same opening, and a fitting or unrelated ending; each under 10 s."""
    rows: list[dict] = []
    for index in range(PAIRS):
        speaker = SPEAKERS[index % len(SPEAKERS)]
        story, *endings = maker.story()
        opening = speak(story, speaker)
        for offset, (kind, ending) in enumerate(zip(("fitting", "unrelated"), endings, strict=True)):
            clip = np.concatenate([opening, PAUSE, speak(ending, speaker)])
            # A lower bit rate (about 16 kbit/s), because these clips are the longest.
            name = f"{2 * index + offset}_{kind}.ogg"
            write_opus(folder / name, clip, 0.971)
            seconds = round((len(opening) + len(PAUSE)) / SAMPLE_RATE, 3)
            rows.append({"file": name, "prompt": story, "ending": ending, "prompt_seconds": seconds})
    pd.DataFrame(rows).to_csv(folder / "transcripts.csv", index=False)


def insert_pause(audio: np.ndarray, sample: int) -> np.ndarray:
    """Insert 0.4 s of silence before a sample."""
    before, after = audio[:sample].copy(), audio[sample:].copy()
    before[-len(FADE) :] *= FADE[::-1]
    after[: len(FADE)] *= FADE
    return np.concatenate([before, PROSODY_PAUSE, after])


def protosyntax_pair(sentence: str, speaker: Speaker, rng: random.Random) -> list[np.ndarray]:
    """Speak a sentence with a comma; return it with a pause at the comma, and with a pause at a later word border.

    The pause of the original speech is removed from both clips.
    """
    samples, rate_hz, phones = speak_phones(sentence, speaker)
    audio, first = trim(samples, rate_hz)
    after_comma = sentence.index(",") + 3  # position of the first word after the comma
    end = next(i for i, phone in enumerate(phones) if phone.word == after_comma and phone.symbol)
    begin = end
    while not phones[begin - 1].symbol:
        begin -= 1
    words = {phone.word: phone for phone in reversed(phones[end:]) if phone.symbol}  # the first phone of each word
    border = rng.choice([words[position] for position in sorted(words)[2:]])
    comma, clause, other = (
        round(phone.start_s * SAMPLE_RATE) - first for phone in (phones[begin], phones[end], border)
    )
    audio = np.concatenate([audio[:comma], audio[clause:]])
    return [insert_pause(audio, sample) for sample in (comma, other - (clause - comma))]


def lexical_pair(sentence: str, speaker: Speaker, rng: random.Random) -> list[np.ndarray]:
    """Speak a sentence; return it with a pause before or after a word, and with a pause within this word.

    The pause within a word is before its second vowel, or before the consonant that precedes this vowel.
    """
    samples, rate_hz, phones = speak_phones(sentence, speaker)
    audio, first = trim(samples, rate_hz)
    spoken = [phone for phone in phones if phone.symbol]
    words = [list(word) for _, word in itertools.groupby(spoken, key=lambda phone: phone.word)]
    inner: list[tuple[int, Phone]] = []  # number of a word, and the phone after a pause within this word
    for i, word in enumerate(words[1:-1], 1):
        vowels = [k for k, phone in enumerate(word) if phone.symbol[0] in VOWELS]
        if len(vowels) > 1:
            inner.append((i, word[max(vowels[0] + 1, vowels[1] - 1)]))
    i, phone = rng.choice(inner)
    places = words[i + rng.randrange(2)][0], phone
    return [insert_pause(audio, round(place.start_s * SAMPLE_RATE) - first) for place in places]


def write_prosaudit(folder: Path, maker: text.SentenceMaker, rng: random.Random) -> None:
    """Write ProsAudit pairs: a sentence with a pause of 0.4 s at a natural place, and at an unnatural place."""
    rows: list[dict] = []
    tasks = (
        ("protosyntax", maker.fronted, protosyntax_pair),
        ("lexical", lambda: text.render(maker.plain()), lexical_pair),
    )
    for task, new_sentence, make_pair in tasks:
        for pair in range(PAIRS):
            speaker, sentence = SPEAKERS[pair % len(SPEAKERS)], new_sentence()
            for clip, correct in zip(make_pair(sentence, speaker, rng), (1, 0), strict=True):
                name = f"{task}_{pair:03d}_{correct}"
                row = {"id": len(rows) // 2, "filename": name, "voice": speaker.name, "type": task, "subtype": ""}
                rows.append(row | {"correct": correct, "transcription": sentence})
                write_opus(folder / f"{name}.ogg", clip, 0.971)
    pd.DataFrame(rows).to_csv(folder / "gold.csv", index=False)


def build_tiny_assets(output_dir: Path = Path("assets/tiny")) -> None:
    """Build all parts of the assets."""
    if shutil.which("espeak-ng") is None:
        raise UserError("espeak-ng is not on PATH; install this program, for example with `apt-get install espeak-ng`")
    for part in ("corpus", "words", "llama", "new_voice", "benchmarks"):
        shutil.rmtree(output_dir / part, ignore_errors=True)
    maker = text.SentenceMaker(random.Random(2024))

    train, validation = make_rows(maker, "train", 23 * 60), make_rows(maker, "validation", 2.5 * 60)
    write_corpus(output_dir / "corpus", "train", train, 4)
    write_corpus(output_dir / "corpus", "validation", validation, 1)
    print(f"corpus: {len(train)} training clips, {len(validation)} validation clips", flush=True)
    for split in TAKES:
        write_corpus(output_dir / "words", split, make_words(split), 1)
    write_llama(output_dir / "llama", [row["text"] for row in train])
    # The prompt ends in mid-sentence, because a model that has read a whole sentence emits </audio>.
    prompt = speak(text.render(maker.plain()), SPEAKERS[7])[: round(PROMPT_SECONDS * SAMPLE_RATE)]
    sf.write(output_dir / "prompt.wav", prompt, SAMPLE_RATE, subtype="PCM_16")
    write_new_voice(output_dir / "new_voice", text.SentenceMaker(random.Random(2026)))
    print("words, tokenizer, prompt and new voice", flush=True)

    benchmarks = output_dir / "benchmarks"
    counts = Counter(word for row in train for word in re.findall(r"[a-z]+", row["text"].lower()))
    write_speaker_consistency(benchmarks / "salmon" / "speaker_consistency", maker)
    write_lexical(benchmarks / "sLM21" / "lexical" / "dev", counts, random.Random(7))
    write_syntactic(benchmarks / "sLM21" / "syntactic" / "dev", maker)
    write_storycloze(benchmarks / "storycloze", maker)
    write_prosaudit(benchmarks / "prosaudit" / "english" / "dev", maker, random.Random(8))
    print("benchmarks", flush=True)


if __name__ == "__main__":
    run_command(build_tiny_assets, __doc__)
