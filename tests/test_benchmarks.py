"""Readers of benchmarks: official folders, hub data sets, Parquet files, and folders with wrong files."""

import csv
import itertools
import math
import random
import shutil
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import soundfile
from conftest import TINY
from datasets import Audio, Dataset, Features, Value

from llama_mimi.common.errors import UserError
from llama_mimi.evaluation.benchmarks import (
    SALMON_PARTS,
    Clip,
    read_prosaudit,
    read_salmon,
    read_slm21,
    read_storycloze,
)
from llama_mimi.evaluation.options import EvaluationOptions
from llama_mimi.evaluation.results import part_results, write_submissions
from llama_mimi.evaluation.script import BENCHMARK_SCRIPTS

BENCHMARKS = TINY / "benchmarks"
READERS = {"salmon": read_salmon, "sLM21": read_slm21, "storycloze": read_storycloze, "prosaudit": read_prosaudit}


@pytest.fixture
def copied(tmp_path):
    """Return a function that copies a tiny benchmark, so that a test can change the copy."""
    return lambda folder: shutil.copytree(BENCHMARKS / folder, tmp_path / folder)


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def write_gold(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


PARTS = {
    "salmon": {"speaker_consistency": 200},
    "sLM21": {"lexical_dev": 100, "syntactic_dev": 100},
    "storycloze": {"storycloze": 100},
    "prosaudit": {"english_dev_lexical": 100, "english_dev_protosyntax": 100},
}


@pytest.mark.parametrize(("folder", "parts"), PARTS.items())
def test_tiny_benchmarks_are_read_whole_and_positives_are_the_official_ones(folder, parts):
    benchmark = READERS[folder](str(BENCHMARKS / folder))
    assert Counter(pair.part for pair in benchmark.pairs) == parts and benchmark.notes == []
    files = list((BENCHMARKS / folder).rglob("*.ogg"))
    assert len({clip.name for clip in benchmark.clips}) == len(files) == 2 * len(benchmark.pairs)
    correct = {}
    for gold in (BENCHMARKS / folder).rglob("gold.csv"):
        with gold.open() as file:
            correct |= {f"{row['filename']}.ogg": row["correct"] for row in csv.DictReader(file)}
    with (BENCHMARKS / "sLM21" / "syntactic" / "dev" / "gold.csv").open() as file:
        voices = [row["voice"] for row in csv.DictReader(file) if row["correct"] == "1"]  # the eight voices alternate
    for number, pair in enumerate(benchmark.pairs):
        positive, negative = pair.positive.name, pair.negative.name
        if folder == "salmon":
            assert (int(pair.name), positive) == (number, f"sample_{number}_0.ogg")
            assert pair.speaker == voices[number % 8]
        elif folder in ("sLM21", "prosaudit"):
            assert (correct[positive], correct[negative]) == ("1", "0")
            lengths = {soundfile.info(clip.source).frames for clip in (pair.positive, pair.negative)}
            assert folder == "sLM21" or len(lengths) == 1  # the same sentence and pause
        else:
            assert int(negative.split("_")[0]) == int(positive.split("_")[0]) + 1


def test_a_salmon_index_may_have_several_negatives_and_an_aggregate_part_is_left_out(tmp_path):
    touch(tmp_path / "rir_consistency", "sample_3_0.wav", "sample_3_2.wav", "sample_3_10.wav")
    for name in ("all", "all_consistency"):
        touch(tmp_path / name, "sample_0_0.wav", "sample_0_1.wav")
    found = [(pair.part, pair.positive.name, pair.negative.name) for pair in read_salmon(str(tmp_path)).pairs]
    assert found == [("rir_consistency", "sample_3_0.wav", f"sample_3_{number}.wav") for number in (2, 10)]


def test_speakers_of_salmon_are_read_from_a_table_if_there_is_one(tmp_path):
    folder = tmp_path / "speaker_consistency"
    touch(folder, *(f"sample_{index}_{k}.wav" for index in (0, 2, 11) for k in range(2)))
    touch(tmp_path / "rir_consistency", "sample_0_0.wav", "sample_0_1.wav")
    assert {pair.speaker for pair in read_salmon(str(tmp_path)).pairs} == {""}
    (folder / "speakers.csv").write_text("index,speaker\n11,ann\n0,bob\n2,ann\n")
    speakers = {(pair.part[:3], pair.name): pair.speaker for pair in read_salmon(str(tmp_path)).pairs}
    assert speakers == {("rir", "0"): "", ("spe", "0"): "bob", ("spe", "2"): "ann", ("spe", "11"): "ann"}
    for rows, index in (("0,a\n2,b", 11), ("0,a\n2,\n11,c", 2), ("0,a\n2,b\n2,c\n11,d", 2), ("0,a\n2,b\n11,c,d", 11)):
        (folder / "speakers.csv").write_text(f"index,speaker\n{rows}\n")
        with pytest.raises(UserError, match=f"index '{index}' must have audio, and one row with its speaker"):
            read_salmon(str(tmp_path))
    (folder / "speakers.csv").write_text("sample,speaker\n0,a\n")
    with pytest.raises(UserError, match="index '0' must have audio"):
        read_salmon(str(tmp_path))


def test_transcripts_are_read_from_the_official_columns_and_from_a_table(tmp_path):
    words, sentences = (
        [pair for pair in read_slm21(str(BENCHMARKS / "sLM21")).pairs if pair.part == part]
        for part in ("lexical_dev", "syntactic_dev")
    )
    assert all(clip.text == clip.name.split("_")[0] for pair in words for clip in (pair.positive, pair.negative))
    assert all(
        sorted(pair.positive.text.lower()) == sorted(pair.negative.text.lower()) and pair.positive.text[-1] == "."
        for pair in sentences
    )
    stories = read_storycloze(str(BENCHMARKS / "storycloze")).pairs
    for pair in stories:
        one, other = pair.positive, pair.negative
        assert (one.prompt, one.prompt_seconds) == (other.prompt, other.prompt_seconds) and one.text != other.text
        assert one.prompt.count(".") == 2 and one.text.startswith("In the end, ") and one.text.count(".") == 1
        assert 1 < one.prompt_seconds < soundfile.info(one.source).duration - 1

    touch(tmp_path, "1_a.wav", "2_b.wav")
    (pair,) = read_storycloze(str(tmp_path)).pairs
    assert pair.positive == Clip("1_a.wav", tmp_path / "1_a.wav", prompt_seconds=pair.positive.prompt_seconds)
    table, header = tmp_path / "transcripts.csv", "file,prompt,ending,prompt_seconds\n"
    table.write_text(f'{header}2_b.wav,"One. Two.",B.,1.5\n1_a.wav,"One. Two.",A.,late\n')
    (pair,) = read_storycloze(str(tmp_path)).pairs
    assert (pair.positive.text, pair.negative.text, pair.negative.prompt) == ("A.", "B.", "One. Two.")
    assert pair.negative.prompt_seconds == 1.5 and math.isnan(pair.positive.prompt_seconds)
    for rows in (
        "1_a.wav,O.,A.,\n",
        "1_a.wav,O.,A.,\n2_b.wav,O.,,2\n",
        "1_a.wav,O.,A.,\n2_b.wav,O.,B.,\n2_b.wav,O.,B.,\n",
    ):
        table.write_text(header + rows)
        with pytest.raises(UserError, match="file '2_b.wav' must have audio, and one row with its prompt and ending"):
            read_storycloze(str(tmp_path))


def test_an_odd_file_out_is_named(copied):
    for folder, odd, message in (
        ("salmon", "speaker_consistency/sample_200_0.ogg", "sample_200_0.ogg' is the only file with its index"),
        ("sLM21", "lexical/dev/other.ogg", "'other' must have one row in '.*gold.csv' and one audio file"),
        ("storycloze", "200_fitting.ogg", r"odd number of files \(last: '200_fitting.ogg'\)"),
    ):
        root = copied(folder)
        shutil.copy(TINY / "prompt.wav", root / odd)
        with pytest.raises(UserError, match=message):
            READERS[folder](str(root))
    for name, message in (("07_x.ogg", "have the same number; remove"), ("other.ogg", "'.*other.ogg' does not match")):
        (root / odd).unlink(missing_ok=True)
        shutil.copy(TINY / "prompt.wav", root / name)
        with pytest.raises(UserError, match=message):
            read_storycloze(str(root))
        (root / name).unlink()


def test_an_empty_or_missing_folder_is_refused(tmp_path):
    for reader in READERS.values():
        with pytest.raises(UserError, match="does not contain pairs"):
            reader(str(tmp_path))
        with pytest.raises(UserError, match="set --data_dir to (the new|a) folder"):
            reader(str(tmp_path / "nothing"))


def test_voices_of_a_word_are_one_group_and_bands_are_the_words(tmp_path):
    """As in the official tool, the bands begin at 0, 1, 5, 20 and 100, so the band "6-20" includes 5."""
    bands = {0: "oov", 1: "1-5", 4: "1-5", 5: "6-20", 19: "6-20", 20: "21-100", 99: "21-100", 100: ">100", "": None}
    folder = tmp_path / "lexical" / "dev"
    places = itertools.product(bands, "AB", (1, 0))
    rows = [(f"w{n}{voice}{right}", f"id{n}", voice, n if right else "", right) for n, voice, right in places]
    touch(folder, *(f"{name}.wav" for name, *_ in rows))
    write_gold(folder / "gold.csv", ["filename", "id", "voice", "frequency", "correct"], rows[::-1])
    pairs = read_slm21(str(tmp_path)).pairs
    assert Counter(pair.group for pair in pairs) == {f"id{n}": 2 for n in bands}
    found = {pair.name: pair.labels.get("frequency") for pair in pairs}
    assert found == {f"id{n}_{voice}": band for n, band in bands.items() for voice in "AB"}
    assert all(pair.positive.name == pair.negative.name.replace("0.wav", "1.wav") for pair in pairs)


def test_syntactic_groups_are_types_subtypes_and_ids(tmp_path):
    folder = tmp_path / "syntactic" / "dev"
    places = itertools.product(enumerate(("agreement", "binding", "agreement")), "AB", (1, 0))
    rows = [(f"s{i}{voice}{right}", i // 2, voice, kind, right) for (i, kind), voice, right in places]
    touch(folder, *(f"{name}.wav" for name, *_ in rows))
    header = ["filename", "id", "voice", "type", "correct"]
    write_gold(folder / "gold.csv", header, rows)
    groups = Counter(pair.group for pair in read_slm21(str(tmp_path)).pairs)
    assert groups == {"agreement__0": 2, "binding__0": 2, "agreement__1": 2}
    for changed, message in (
        ([*rows, *rows[:2]], "'s0A0' must have one row"),
        ([rows[0], *rows[2:4], rows[1], *rows[4:]], "must have the same id and voice, and exactly one"),
    ):
        write_gold(folder / "gold.csv", header, changed)
        with pytest.raises(UserError, match=message):
            read_slm21(str(tmp_path))


def prosaudit_rows():
    """Return rows of ProsAudit's ``gold.csv``: ids are repeated in both types, and one sentence has two voices."""
    places = [("protosyntax", 0, "A"), ("protosyntax", 0, "B"), ("protosyntax", 1, "A"), ("lexical", 0, "A")]
    return [
        {
            "id": i,
            "filename": f"{kind[0]}{i}{voice}{right}",
            "voice": voice,
            "type": kind,
            "subtype": "",
            "correct": right,
        }
        for (kind, i, voice), right in itertools.product(places, (1, 0))
    ]


def write_prosaudit(root, rows, split="dev"):
    folder = root / "english" / split
    touch(folder, *(f"{row['filename']}.wav" for row in rows))
    write_gold(folder / "gold.csv", [*rows[0], "transcription"], [[*row.values(), "a b"] for row in rows])
    return folder


def test_prosaudit_pairs_have_the_same_type_id_and_voice(tmp_path):
    rows = prosaudit_rows()
    folder = write_prosaudit(tmp_path, random.Random(0).sample(rows, len(rows)))
    touch(tmp_path / "english" / "test", "a.wav", "b.wav")
    benchmark = read_prosaudit(str(tmp_path))
    found = {(pair.part, pair.group, pair.positive.name, pair.negative.name) for pair in benchmark.pairs}
    assert found == {
        ("english_dev_protosyntax", "0", "p0A1.wav", "p0A0.wav"),
        ("english_dev_protosyntax", "0", "p0B1.wav", "p0B0.wav"),
        ("english_dev_protosyntax", "1", "p1A1.wav", "p1A0.wav"),
        ("english_dev_lexical", "0", "l0A1.wav", "l0A0.wav"),
    }
    assert all(pair.labels == {} for pair in benchmark.pairs)
    assert [clip.split for clip in benchmark.clips] == ["english_dev"] * 8 + ["english_test"] * 2
    assert len(benchmark.unpaired) == 2 and "for the submission only" in benchmark.notes[0]
    write_prosaudit(tmp_path, [row | {"type": "lexical"} if row["filename"] == "p1A0" else row for row in rows])
    with pytest.raises(UserError, match="exactly one row must have 'correct' = 1"):
        read_prosaudit(str(tmp_path))
    (folder / "gold.csv").unlink()
    with pytest.raises(UserError, match="english/dev' lacks gold.csv"):
        read_prosaudit(str(tmp_path))
    with pytest.raises(UserError, match="--data_dir is missing"):  # the official data are not on the hub
        BENCHMARK_SCRIPTS["prosaudit"].run(EvaluationOptions(device="cpu"))


def test_prosaudit_accuracies_are_those_of_zerospeechs_toolkit(tmp_path):
    """Ties count half; decisions are averaged over the voices of an id, then over the ids of a type."""
    rows = prosaudit_rows()
    write_prosaudit(tmp_path, rows)
    scores = dict(zip((row["filename"] for row in rows), [-1, -2, -3, -3, -2, -1, -1, -2], strict=True))

    # The toolkit's steps: pairs by the order of rows, decisions, mean by (type, id), mean by type.
    table = pd.DataFrame(rows).assign(score=[scores[row["filename"]] for row in rows])
    right, wrong = (table[table["correct"] == value].reset_index() for value in (1, 0))
    decisions = (right["score"] > wrong["score"]) + 0.5 * (right["score"] == wrong["score"])
    by_pair = decisions.groupby([right["type"], right["id"]]).mean()
    expected = by_pair.groupby("type").mean().to_dict()

    benchmark = read_prosaudit(str(tmp_path))
    decided = []
    for pair in benchmark.pairs:
        positive, negative = (scores[Path(clip.name).stem] for clip in (pair.positive, pair.negative))
        correct = 0.5 if positive == negative else float(positive > negative)
        decided.append(vars(pair) | {"correct": correct, "is_tie": positive == negative, "is_cut": False})
    parts = part_results(decided, by_group=True)
    assert {part.removeprefix("english_dev_"): parts[part]["accuracy"] for part in parts} == expected
    assert expected == {"lexical": 1.0, "protosyntax": 0.375}
    write_submissions(tmp_path / "out", benchmark.clips, [scores[Path(clip.name).stem] for clip in benchmark.clips])
    lines = (tmp_path / "out" / "english_dev.txt").read_text().split("\n")
    assert sorted(lines[:-1]) == sorted(f"{name} {score}" for name, score in scores.items())


def test_a_misspelt_folder_of_slm21_is_named(tmp_path):
    for name in ("lexical", "syntatic"):
        (tmp_path / name / "dev").mkdir(parents=True)
    with pytest.raises(UserError, match="syntatic' is not a folder of sLM21; rename it to lexical, syntactic"):
        read_slm21(str(tmp_path))


def test_a_damaged_gold_file_is_named(tmp_path):
    folder = tmp_path / "lexical" / "dev"
    touch(folder, "a.wav", "b.wav")
    for lines, message in (
        ("a,0,A,many,1\nb,0,A,,0", "the frequency 'many' is not a count"),
        ("a,0,A,1,1\nb,0", "must have rows with the columns correct, filename"),
        ("a,0,A,1,1", "'b' must have one row"),
    ):
        (folder / "gold.csv").write_text(f"filename,id,voice,frequency,correct\n{lines}\n")
        with pytest.raises(UserError, match=message):
            read_slm21(str(tmp_path))
    (folder / "gold.csv").unlink()
    with pytest.raises(UserError, match="lexical/dev' lacks gold.csv"):
        read_slm21(str(tmp_path))


def test_stories_may_lie_in_two_folders_and_gaps_in_their_numbers_are_reported(tmp_path):
    names = ["9_a.wav", "10_good.wav", "11_bad.wav", "12_b.wav"]
    for part in ("sStoryCloze", "tStoryCloze"):
        touch(tmp_path / part, *names)
    benchmark = read_storycloze(str(tmp_path))
    assert [clip.name for clip in benchmark.clips] == 2 * names
    assert [pair.part for pair in benchmark.pairs] == ["sStoryCloze"] * 2 + ["tStoryCloze"] * 2
    (tmp_path / "1_lost.wav").touch()
    with pytest.raises(UserError, match="1_lost.wav' is outside the subfolders"):
        read_storycloze(str(tmp_path))
    touch(tmp_path / "gaps", *(f"{number}.wav" for number in (1, 2, 3, 5, 6, 8)))
    (note,) = read_storycloze(str(tmp_path / "gaps")).notes
    assert "2 of 3 pairs do not have consecutive numbers, such as '3.wav' and '5.wav'" in note


def table(columns, **others):
    """Return two pairs as a `Dataset`, and the content of their audio files."""
    clips = sorted((BENCHMARKS / "salmon" / "speaker_consistency").glob("sample_[01]_*.ogg"))
    contents = [{"bytes": clip.read_bytes(), "path": clip.name} for clip in clips]
    dataset = Dataset.from_dict({columns[0]: contents[::2], columns[1]: contents[1::2], **others})
    for column in columns:
        dataset = dataset.cast_column(column, Audio(decode=False))
    return dataset, [clip.read_bytes() for clip in clips]


@pytest.fixture
def write_table(tmp_path, monkeypatch):
    """Return a function that writes a table like a hub download: ``<folder>/train-00000-of-00001.parquet``."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def write(dataset, *folders):
        folder = tmp_path.joinpath(*folders)
        folder.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(folder / "train-00000-of-00001.parquet")

    return write


def test_tables_are_read_as_parquet(tmp_path, write_table):
    dataset, contents = table(("positive_audio", "negative_audio"), task=["x", "x"], ind=[0, 1])
    for part in ("rir_consistency", "all"):
        write_table(dataset, "SALMon", part)
    benchmark = read_salmon(str(tmp_path / "SALMon"))
    assert [(pair.part, pair.group) for pair in benchmark.pairs] == [("rir_consistency", "0"), ("rir_consistency", "1")]
    assert [clip.source.read_bytes() for clip in benchmark.clips] == contents

    words, _ = table(("positive", "negative"))
    sentences, _ = table(("positive", "negative"), id=[5, 5], voice=["A", "B"], type=["t", "t"], subtype=["s", "s"])
    for name, dataset in (("sWUGGY", words), ("sBLIMP", sentences), ("tStoryCloze", words)):
        write_table(dataset, "speed", name, "data")
    benchmark = read_slm21(str(tmp_path / "speed"))  # the folder also has stories
    assert benchmark.notes == ["'sWUGGY' has no column 'id'; each row counts as one word or sentence"]
    groups = [f"{pair.part} {pair.group}" for pair in benchmark.pairs]
    assert groups == ["lexical_dev 0", "lexical_dev 1", "syntactic_dev t_s_5", "syntactic_dev t_s_5"]
    assert benchmark.pairs[2].labels == {"type": "t", "subtype": "s"}
    assert [clip.source.read_bytes() for clip in benchmark.clips] == contents * 2
    assert [pair.part for pair in read_slm21(str(tmp_path / "speed" / "sBLIMP")).pairs] == ["syntactic_dev"] * 2
    assert [pair.part for pair in read_storycloze(str(tmp_path / "speed")).pairs] == ["tStoryCloze"] * 2
    write_table(words.rename_column("negative", "other"), "speed", "tStoryCloze", "data")
    with pytest.raises(UserError, match="has the columns positive, other; choose a data set with the columns positive"):
        read_storycloze(str(tmp_path / "speed"))


def test_hub_data_sets_are_opened_by_name(monkeypatch):
    """Stand-ins replace the hub, because tests run offline."""
    opened = []

    def load(*arguments, split):
        opened.append((*arguments, split))
        return table(("positive_audio", "negative_audio") if len(arguments) > 1 else ("positive", "negative"))[0]

    module = "llama_mimi.evaluation.benchmarks"
    monkeypatch.setattr(f"{module}.load_dataset", load)
    monkeypatch.setattr(f"{module}.get_dataset_config_names", lambda hub_id: ["all", "all_x", *SALMON_PARTS])
    assert Counter(pair.part for pair in read_salmon("slprl/SALMon").pairs) == dict.fromkeys(SALMON_PARTS, 2)
    assert opened == [("slprl/SALMon", part, "train") for part in SALMON_PARTS]
    opened.clear()
    assert Counter(pair.part for pair in read_slm21("speed").pairs) == {"lexical_dev": 2, "syntactic_dev": 2}
    assert Counter(pair.part for pair in read_storycloze("speed").pairs) == {"sStoryCloze": 2, "tStoryCloze": 2}
    assert len(read_slm21("speed/sBLIMP").pairs) == 2
    names = ["sWUGGY", "sBLIMP", "sStoryCloze", "tStoryCloze", "sBLIMP"]
    assert opened == [(f"speed/{name}", "train") for name in names]


def test_a_row_without_audio_is_named(tmp_path, write_table):
    rows = {"positive": [{"bytes": None, "path": "lost.wav"}], "negative": [None]}
    features = Features({column: {"bytes": Value("binary"), "path": Value("string")} for column in rows})
    write_table(Dataset.from_dict(rows, features=features), "sStoryCloze")
    for clip in read_storycloze(str(tmp_path)).clips:
        with pytest.raises(UserError, match="row 0 lacks audio bytes"):
            clip.source.read_bytes()


def test_hidden_files_and_tables_beside_audio_are_ignored(copied):
    root = copied("salmon")
    expected = [pair.name for pair in read_salmon(str(root)).pairs]
    part = next(root.iterdir())
    touch(part, "._sample_0_0.ogg")
    touch(root / ".cache" / "huggingface", "sample_0_0.wav")
    for folder in (".ipynb_checkpoints", "__MACOSX"):
        shutil.copytree(part, root / folder)
    assert [pair.name for pair in read_salmon(str(root)).pairs] == expected
    root = copied("storycloze")
    (root / "codes").mkdir()  # a cache of codes is not a benchmark
    table(("positive", "negative"))[0].to_parquet(root / "codes" / "x.parquet")
    assert len(read_storycloze(str(root)).pairs) == 100
