"""Benchmarks as they are published, in folders, on the hub and as Parquet, and what may be wrong in them."""

import csv
import shutil
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY
from datasets import Audio, Dataset, Features, Value

from llama_mimi.common.errors import UserError
from llama_mimi.evaluation.benchmarks import SALMON_PARTS, read_salmon, read_slm21, read_storycloze

BENCHMARKS = TINY / "benchmarks"


@pytest.mark.parametrize(
    ("reader", "folder", "parts"),
    [
        (read_salmon, "salmon", {"speaker_consistency": 200}),
        (read_slm21, "sLM21", {"lexical_dev": 100, "syntactic_dev": 100}),
        (read_storycloze, "storycloze", {"storycloze": 100}),
    ],
)
def test_tiny_benchmarks_are_read_whole(reader, folder, parts):
    pairs = reader(str(BENCHMARKS / folder)).pairs
    assert Counter(pair.part for pair in pairs) == parts
    names = {clip.name for pair in pairs for clip in (pair.positive, pair.negative)}
    files = list((BENCHMARKS / folder).rglob("*.ogg"))
    assert len(names) == len(files) == 2 * len(pairs)


def test_positives_are_the_official_ones():
    salmon = read_salmon(str(BENCHMARKS / "salmon")).pairs
    assert all(pair.positive.name.endswith("_0.ogg") for pair in salmon)
    assert [int(pair.name) for pair in salmon] == list(range(200))
    correct = {}
    for gold in (BENCHMARKS / "sLM21").rglob("gold.csv"):
        with gold.open() as file:
            correct |= {row["filename"]: row["correct"] for row in csv.DictReader(file)}
    for pair in read_slm21(str(BENCHMARKS / "sLM21")).pairs:
        assert correct[pair.positive.name.removesuffix(".ogg")] == "1"
        assert correct[pair.negative.name.removesuffix(".ogg")] == "0"
    for pair in read_storycloze(str(BENCHMARKS / "storycloze")).pairs:
        assert int(pair.negative.name.split("_")[0]) == int(pair.positive.name.split("_")[0]) + 1


def test_a_salmon_index_may_have_several_negatives(tmp_path):
    folder = tmp_path / "rir_consistency"
    folder.mkdir()
    for name in ("sample_3_0", "sample_3_2", "sample_3_10"):
        (folder / f"{name}.wav").touch()
    pairs = read_salmon(str(tmp_path)).pairs
    assert [(pair.positive.name, pair.negative.name) for pair in pairs] == [
        ("sample_3_0.wav", "sample_3_2.wav"),
        ("sample_3_0.wav", "sample_3_10.wav"),
    ]


@pytest.mark.parametrize(
    ("reader", "folder", "odd", "message"),
    [
        (read_salmon, "salmon", "speaker_consistency/sample_200_0.ogg", "no counterpart"),
        (read_salmon, "salmon", "speaker_consistency/other.ogg", "move the odd file out"),
        (read_slm21, "sLM21", "lexical/dev/other.ogg", "not listed in"),
        (read_storycloze, "storycloze", "200_fitting.ogg", "an odd number"),
        (read_storycloze, "storycloze", "other.ogg", "does not begin with a number"),
        (read_storycloze, "storycloze", "7_again.ogg", "the same number"),
    ],
)
def test_an_odd_file_out_is_named(reader, folder, odd, message, tmp_path):
    shutil.copytree(BENCHMARKS / folder, tmp_path / folder)
    shutil.copy(TINY / "prompt.wav", tmp_path / folder / odd)
    with pytest.raises(UserError) as error:
        reader(str(tmp_path / folder))
    assert message in str(error.value) and odd.split("/")[-1] in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    shutil.copytree(BENCHMARKS / "sLM21", tmp_path / "sLM21")
    victim = next((tmp_path / "sLM21" / "syntactic" / "dev").glob("*.ogg"))
    victim.unlink()
    with pytest.raises(UserError, match=f"lists '{victim.stem}'"):
        read_slm21(str(tmp_path / "sLM21"))


@pytest.mark.parametrize("reader", [read_salmon, read_slm21, read_storycloze])
def test_an_empty_or_missing_folder_is_refused(reader, tmp_path):
    with pytest.raises(UserError, match="holds no pairs"):
        reader(str(tmp_path))
    with pytest.raises(UserError, match="give its folder with --data_dir"):
        reader(str(tmp_path / "nothing"))


def test_voices_of_a_word_are_one_group_and_bands_are_the_words(tmp_path):
    folder = tmp_path / "lexical" / "dev"
    folder.mkdir(parents=True)
    rows = []
    for word_id, frequency in ((7, 3), (8, 0)):
        for voice in ("A", "B"):
            for correct in (1, 0):
                name = f"w{word_id}{voice}{correct}"
                (folder / f"{name}.wav").touch()
                rows.append([name, word_id, voice, frequency if correct else "", correct])
    write_gold(folder / "gold.csv", ["filename", "id", "voice", "frequency", "correct"], rows[::-1])
    pairs = read_slm21(str(tmp_path)).pairs
    assert Counter(pair.group for pair in pairs) == {"7": 2, "8": 2}
    assert {pair.name: pair.labels["frequency"] for pair in pairs} == {
        "7_A": "1-5",
        "7_B": "1-5",
        "8_A": "oov",
        "8_B": "oov",
    }
    assert all(pair.positive.name == pair.negative.name.replace("0.wav", "1.wav") for pair in pairs)


def test_syntactic_groups_are_types_subtypes_and_ids(tmp_path):
    folder = tmp_path / "syntactic" / "dev"
    folder.mkdir(parents=True)
    rows = [
        (f"s{i}{voice}{correct}", i // 2, voice, kind, correct)
        for i, kind in enumerate(("agreement", "binding", "agreement"))
        for voice in "AB"
        for correct in (1, 0)
    ]
    for name, *_ in rows:
        (folder / f"{name}.wav").touch()
    header = ["filename", "id", "voice", "type", "correct"]
    write_gold(folder / "gold.csv", header, rows)
    groups = Counter(pair.group for pair in read_slm21(str(tmp_path)).pairs)
    assert groups == {"agreement__0": 2, "binding__0": 2, "agreement__1": 2}
    write_gold(folder / "gold.csv", header, [rows[0], *rows[2:4], rows[1], *rows[4:]])
    with pytest.raises(UserError, match="differ in id or voice"):
        read_slm21(str(tmp_path))


def test_a_test_split_without_gold_is_for_the_submission(tmp_path):
    shutil.copytree(BENCHMARKS / "sLM21", tmp_path / "sLM21")
    (tmp_path / "sLM21" / "lexical" / "test").mkdir()
    shutil.copy(TINY / "prompt.wav", tmp_path / "sLM21" / "lexical" / "test" / "xyz.wav")
    benchmark = read_slm21(str(tmp_path / "sLM21"))
    assert [(clip.name, clip.split) for clip in benchmark.unpaired] == [("xyz.wav", "lexical/test")]
    assert len(benchmark.clips) == 2 * len(benchmark.pairs) + 1 and "its 1 clips are scored" in benchmark.notes[0]
    (tmp_path / "sLM21" / "syntactic" / "dev" / "gold.csv").unlink()
    (tmp_path / "sLM21" / "phonetic" / "dev-clean").mkdir(parents=True)  # the rest of ZeroSpeech 2021
    with pytest.raises(UserError, match="syntactic/dev' has no gold.csv"):
        read_slm21(str(tmp_path / "sLM21"))


def test_stories_may_lie_in_two_folders(tmp_path):
    for part in ("sStoryCloze", "tStoryCloze"):
        (tmp_path / part).mkdir()
        for name in ("10_good.wav", "9_a.wav", "11_bad.wav", "12_b.wav"):
            (tmp_path / part / name).touch()
    pairs = read_storycloze(str(tmp_path)).pairs
    assert [(pair.part, pair.positive.name, pair.negative.name) for pair in pairs] == [
        (part, *names)
        for part in ("sStoryCloze", "tStoryCloze")
        for names in (("9_a.wav", "10_good.wav"), ("11_bad.wav", "12_b.wav"))
    ]
    (tmp_path / "1_lost.wav").touch()
    with pytest.raises(UserError, match="1_lost.wav' lies beside folders"):
        read_storycloze(str(tmp_path))


@pytest.mark.parametrize("name", ["all", "all_consistency"])
def test_an_aggregate_part_is_left_out_and_named(tmp_path, name):
    for part in ("rir_consistency", name):
        (tmp_path / part).mkdir()
        for k in (0, 1):
            (tmp_path / part / f"sample_0_{k}.wav").touch()
    benchmark = read_salmon(str(tmp_path))
    assert [pair.part for pair in benchmark.pairs] == ["rir_consistency"]
    assert benchmark.notes == [f"the part '{name}' repeats pairs of the others and is left out"]


def table(columns, **others):
    """Two pairs of a benchmark as `datasets` stores them, with their audio."""
    clips = sorted((BENCHMARKS / "salmon" / "speaker_consistency").glob("sample_[01]_*.ogg"))
    contents = [{"bytes": clip.read_bytes(), "path": clip.name} for clip in clips]
    rows = {columns[0]: contents[::2], columns[1]: contents[1::2], **others}
    dataset = Dataset.from_dict(rows)
    for column in columns:
        dataset = dataset.cast_column(column, Audio(decode=False))
    return dataset, [clip.read_bytes() for clip in clips]


def test_salmon_as_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    dataset, contents = table(("positive_audio", "negative_audio"), task=["x", "x"], ind=[0, 1])
    for part in ("rir_consistency", "all"):
        (tmp_path / "SALMon" / part).mkdir(parents=True)
        dataset.to_parquet(tmp_path / "SALMon" / part / "train-00000-of-00001.parquet")
    benchmark = read_salmon(str(tmp_path / "SALMon"))
    assert [(pair.part, pair.group) for pair in benchmark.pairs] == [("rir_consistency", "0"), ("rir_consistency", "1")]
    assert [clip.read() for clip in benchmark.clips] == contents and len(benchmark.notes) == 1
    several, _ = table(("positive_audio", "negative_audio"), task=list(SALMON_PARTS[:2]))
    several.to_parquet(tmp_path / "one_file.parquet")
    assert [pair.part for pair in read_salmon(str(tmp_path / "one_file.parquet")).pairs] == list(SALMON_PARTS[:2])
    for name in ("all", *SALMON_PARTS[:2]):  # files in place of folders
        (tmp_path / "files").mkdir(exist_ok=True)
        dataset.to_parquet(tmp_path / "files" / f"{name}.parquet")
    assert Counter(pair.part for pair in read_salmon(str(tmp_path / "files")).pairs) == dict.fromkeys(
        SALMON_PARTS[:2], 2
    )


def test_slm21_and_stories_as_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    columns = ("positive", "negative")
    words, contents = table(columns)
    sentences, _ = table(columns, id=[5, 5], voice=["A", "B"], type=["t", "t"], subtype=["s", "s"])
    for name, dataset in (("sWUGGY", words), ("sBLIMP", sentences), ("tStoryCloze", words)):
        (tmp_path / "speed" / name / "data").mkdir(parents=True)
        dataset.to_parquet(tmp_path / "speed" / name / "data" / "train-00000-of-00001.parquet")
    benchmark = read_slm21(str(tmp_path / "speed"))  # a mirror of the owner: stories lie beside
    assert benchmark.notes == ["'sWUGGY' has no column 'id': its rows are counted one by one, not by word or sentence"]
    pairs = benchmark.pairs
    one_alone = read_slm21(str(tmp_path / "speed" / "sBLIMP")).pairs
    assert [pair.part for pair in one_alone] == ["syntactic_dev"] * 2
    assert [(pair.part, pair.group) for pair in pairs] == [
        ("syntactic_dev", "t_s_5"),
        ("syntactic_dev", "t_s_5"),
        ("lexical_dev", "0"),
        ("lexical_dev", "1"),
    ]
    assert pairs[0].labels == {"type": "t", "subtype": "s"}
    assert [clip.read() for pair in pairs[2:] for clip in (pair.positive, pair.negative)] == contents
    stories = tmp_path / "speed" / "tStoryCloze"
    assert [pair.part for pair in read_storycloze(str(stories)).pairs] == ["tStoryCloze"] * 2
    (tmp_path / "speed" / "tStoryCloze").rename(tmp_path / "unknown")
    with pytest.raises(UserError, match="lies in no folder named sStoryCloze or tStoryCloze"):
        read_storycloze(str(tmp_path / "unknown"))
    (tmp_path / "unknown").rename(tmp_path / "tStoryCloze")
    words.rename_column("negative", "other").to_parquet(
        tmp_path / "tStoryCloze" / "data" / "train-00000-of-00001.parquet"
    )
    with pytest.raises(UserError, match="no column 'negative', only positive, other"):
        read_storycloze(str(tmp_path / "tStoryCloze"))
    (tmp_path / "tStoryCloze" / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="no readable Parquet"):
        read_storycloze(str(tmp_path / "tStoryCloze"))


def test_hub_data_sets_are_opened_by_name(monkeypatch):
    """The hub is not reachable here: what would be asked of it, and what is made of the answer."""
    opened = []

    def load(hub_id, config, split):
        opened.append((hub_id, config, split))
        return table(("positive_audio", "negative_audio") if config else ("positive", "negative"))[0]

    monkeypatch.setattr("llama_mimi.evaluation.pair_tables.load_dataset", load)
    monkeypatch.setattr(
        "llama_mimi.evaluation.pair_tables.get_dataset_config_names", lambda hub_id: ["all", "all_x", *SALMON_PARTS]
    )
    assert Counter(pair.part for pair in read_salmon("slprl/SALMon").pairs) == dict.fromkeys(SALMON_PARTS, 2)
    assert opened == [("slprl/SALMon", part, "train") for part in SALMON_PARTS]
    opened.clear()
    assert Counter(pair.part for pair in read_slm21("speed").pairs) == {"lexical_dev": 2, "syntactic_dev": 2}
    assert Counter(pair.part for pair in read_storycloze("speed").pairs) == {"sStoryCloze": 2, "tStoryCloze": 2}
    assert len(read_slm21("speed/sBLIMP").pairs) == 2
    names = ["sWUGGY", "sBLIMP", "sStoryCloze", "tStoryCloze", "sBLIMP"]
    assert opened == [(f"speed/{name}", None, "train") for name in names]


def write_gold(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def test_a_hole_in_the_numbers_of_stories_is_said(tmp_path):
    for number in (1, 2, 3, 5, 6, 8):
        (tmp_path / f"{number}.wav").touch()
    (note,) = read_storycloze(str(tmp_path)).notes
    assert "the numbers of 2 of 3 pairs do not follow each other, as in '3.wav' and '5.wav'" in note
    assert read_storycloze(str(BENCHMARKS / "storycloze")).notes == []


def test_audio_goes_before_other_files(tmp_path):
    """A cache of codes or other results in the folder of a benchmark are not taken for it."""
    shutil.copytree(BENCHMARKS / "storycloze", tmp_path / "stories")
    (tmp_path / "stories" / "codes").mkdir()
    table(("positive", "negative"))[0].to_parquet(tmp_path / "stories" / "codes" / "x.parquet")
    assert len(read_storycloze(str(tmp_path / "stories")).pairs) == 100


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["filename,id,voice,frequency,correct", "a,0,A,many,1", "b,0,A,,0"], "has the frequency 'many'"),
        (["filename,id,voice,frequency,correct", "a,0,A,-3,1", "b,0,A,,0"], "has the frequency '-3'"),
        (["filename,id,voice,frequency,correct", "a,0,A,1,1", "b,0"], "too few cells in line 3"),
        (["filename,id,voice,frequency,correct", "a,0,A,1,1", "b,0,A,,1"], "need one correct each"),
        (["filename,voice,correct", "a,A,1"], "needs rows with the columns correct, filename, id, voice"),
    ],
)
def test_a_damaged_gold_file_is_named(tmp_path, lines, message):
    folder = tmp_path / "lexical" / "dev"
    folder.mkdir(parents=True)
    for name in ("a.wav", "b.wav"):
        (folder / name).touch()
    (folder / "gold.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=message):
        read_slm21(str(tmp_path))


def test_a_row_without_audio_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"positive": [{"bytes": None, "path": "lost.wav"}], "negative": [None]}
    features = Features({column: {"bytes": Value("binary"), "path": Value("string")} for column in rows})
    (tmp_path / "sStoryCloze").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "sStoryCloze" / "train.parquet")
    for clip in read_storycloze(str(tmp_path)).clips:
        with pytest.raises(UserError, match="row 0 of the table has no audio bytes"):
            clip.read()


def test_what_a_download_leaves_beside_the_files_is_ignored(tmp_path):
    root = tmp_path / "salmon"
    shutil.copytree(TINY / "benchmarks" / "salmon", root)
    expected = [pair.name for pair in read_salmon(str(root)).pairs]
    part = next(root.iterdir())
    (part / "._sample_0_0.ogg").write_bytes(b"a sidecar")
    (root / ".cache" / "huggingface").mkdir(parents=True)
    (root / ".cache" / "huggingface" / "sample_0_0.wav").write_bytes(b"a part")
    for folder in (".ipynb_checkpoints", "__MACOSX"):
        shutil.copytree(part, root / folder)
    assert [pair.name for pair in read_salmon(str(root)).pairs] == expected
    root = tmp_path / "sLM21"
    shutil.copytree(TINY / "benchmarks" / "sLM21", root)
    (root / ".cache" / "huggingface").mkdir(parents=True)
    assert len(read_slm21(str(root)).pairs) == 200


@pytest.mark.parametrize("file", ["{split}-00000-of-00001.parquet", "{split}/0.parquet"])
def test_a_table_of_several_splits_is_refused(tmp_path, file):
    for split in ("train", "test"):
        path = tmp_path / "gender_consistency" / file.format(split=split)
        path.parent.mkdir(exist_ok=True, parents=True)
        struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        cell = pa.array([{"bytes": b"x", "path": None}], struct)
        pq.write_table(pa.table({"positive_audio": cell, "negative_audio": cell}), path)
    with pytest.raises(UserError, match="has the splits test, train; move all but one out"):
        read_salmon(str(tmp_path))
