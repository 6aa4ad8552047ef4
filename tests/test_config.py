"""Every shipped config is valid, and every mistake ends in one sentence."""

import copy
import json
import re
import shutil
import tomllib
from functools import reduce

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, TINY, checked_config
from datasets import Dataset
from simulated import write_codes
from transformers import MimiConfig

from llama_mimi.checkpoint.architectures import save_run_record, speech_config
from llama_mimi.checkpoint.dcp import complete_steps, set_aside_incomplete, set_aside_later
from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.checkpoint.stand_ins import write_tokenizer
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.clips import CodedClip
from llama_mimi.corpora.code_shards import MANIFEST
from llama_mimi.corpora.formats import CORPORA, RELEASED_NAMES
from llama_mimi.data.build import chosen_split
from llama_mimi.model.llama import FLAVORS
from llama_mimi.tokens.tokenizer import load_speech_tokenizer
from llama_mimi.training.checks import prepare_run
from llama_mimi.training.config_file import OLD_KEYS, parse_config

HIERARCHICAL = "--model.architecture hierarchical"
CONFIGS = sorted((ROOT / "config").glob("*.toml"))


@pytest.fixture(autouse=True)
def repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "1")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """Write the folders that the commands at the top of a large config create, without weights."""
    folder = tmp_path_factory.mktemp("downloads")
    MimiConfig(num_quantizers=32).save_pretrained(folder / "mimi")
    for flavor in ("1B", "8B", "768x8"):
        args = FLAVORS[flavor]
        args.vocab_size = 136_450
        hf_config(args).save_pretrained(folder / flavor)
        write_tokenizer(folder / flavor)
    for config, split in (("clean", "train"), ("validation", "validation")):
        (folder / "peoples_speech" / config).mkdir(parents=True)
        row = {"id": "a", "audio": {"bytes": b"", "path": "a"}, "text": "a"}
        Dataset.from_list([row]).to_parquet(folder / "peoples_speech" / config / f"{split}-00000-of-00001.parquet")
    (folder / "mimi" / "model.safetensors").touch()
    labels = {name: ["text", "speaker"] for name in ("emilia_en", "yodas_en", "librispeech_dev_clean")}
    labels |= {name: ["text"] for name in ("peoples_speech", "peoples_speech_all")}
    labels |= {"libri_light": ["speaker"], "voxpopuli_en": []}
    for name, columns in labels.items():
        clips = [CodedClip("a", np.zeros((10, 8), np.uint16), 0.8, False, text="a", speaker="b")]
        write_codes(folder / "data" / "codes" / name, str(folder / "mimi"), [clips], columns)
    for name in ("tiny_train", "tiny_validation", "new_voice", "new_voice_validation"):
        write_codes(folder / "data" / "codes" / name, str(TINY / "mimi"), [clips], ["text", "speaker"])
    for name in ("my_voice", "my_language", "peoples_speech_unlimited"):  # for the released model, without the window
        for split in ("", "_validation"):
            codes = folder / "data" / "codes" / f"{name}{split}"
            write_codes(codes, str(folder / "mimi"), [clips])
            manifest = json.loads((codes / MANIFEST).read_text())
            manifest["codec"]["sliding_window"] = False
            (codes / MANIFEST).write_text(json.dumps(manifest))
    shutil.copytree(TINY / "llama", folder / "tiny")
    config = json.loads((folder / "tiny/config.json").read_text())
    (folder / "tiny/config.json").write_text(json.dumps(config | {"vocab_size": 1538}))
    texts = folder / "data" / "fineweb_edu" / "sample" / "10BT"
    texts.mkdir(parents=True)
    for name in ("000_00000", "013_00000"):
        Dataset.from_list([{"text": "a"}]).to_parquet(texts / f"{name}.parquet")
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path, downloads, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2" if path.stem.startswith("tiny") else "8")
    text = path.read_text()
    assert f"--job.config_file config/{path.name}" in text.split("[job]")[0], "opens with its launch command"
    flags = ["--job.config_file", str(path), "--job.dump_folder", str(downloads / "run")]
    config = tomllib.loads(text)
    # The corpora of the config, in a user's working directory.
    for name in "training.dataset validation.dataset data.text_dataset data.validation_text_dataset".split():
        section, key = name.split(".")
        if value := config[section].get(key):
            flags += [f"--{name}", value.replace("data/", f"{downloads}/data/")]
    # The models have no weights.
    monkeypatch.setattr("llama_mimi.training.checks.check_initial_weights", lambda *args: None)
    if path.stem == "tiny_finetune":
        flags += ["--model.hf_assets_path", str(downloads / "tiny")]
    if not path.stem.startswith("tiny"):
        flavor = config["model"]["flavor"]
        flags += ["--model.hf_assets_path", str(downloads / flavor), "--codec.name", str(downloads / "mimi")]
        if "dataset_path" in config["validation"]:
            flags += ["--validation.dataset_path", str(downloads / "peoples_speech")]
    job_config = checked_config(flags)
    assert job_config.job.save_config_file and job_config.metrics.enable_tensorboard


@pytest.mark.parametrize("path", [path for path in CONFIGS if "_1b" in path.stem], ids=lambda path: path.stem)
def test_flags_for_64_gpus_are_valid(path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "64")
    command = ["--job.config_file", str(path)]
    with pytest.raises(UserError, match="training.global_batch_size"):
        parse_config(command)
    named = " ".join(re.findall("^#   (--.*)$", path.read_text(), re.M)).split()
    assert parse_config([*command, *named]).parallelism.data_parallel_replicate_degree == 8


LORA = "--model.converters lora --checkpoint.initial_load_in_hf"


def tiny_with(*flags):
    """Return the flags of the tiny config, with a dump_folder that the commands of the README do not use."""
    elsewhere = () if "--job.dump_folder" in flags else ("--job.dump_folder", "outputs/of_no_run")
    return ["--job.config_file", str(ROOT / "config/tiny.toml"), *elsewhere, *flags]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        # Rules
        ("--model.flavor 2B", "choose one of: tiny, 1B, 8B; or set width x layers, such as '768x12'"),
        ("--model.flavor 700x12", "model.flavor is '700x12'; choose one of: "),  # not a multiple of 256
        ("--model.flavor 768x12+100x2", "the second width is a multiple of 16"),
        ("--training.max_norm nan", "training.max_norm is nan; set a positive number, or inf"),
        ("--lr_scheduler.total_steps 419", "lr_scheduler.total_steps is 419; set at least 420"),
        ("--validation.steps 0", "TorchTitan does not accept a setting (validation steps must be positive or -1)"),
        ("--checkpoint.folder /elsewhere/checkpoints", "choose a folder inside job.dump_folder"),
        ("--loss.level_weights 1,2", "4 positive numbers"),
        (f"{HIERARCHICAL} --parallelism.tensor_parallel_degree 2", "supports only FSDP and HSDP"),
        ("--model.converters quantize.linear.float8", "with `uv sync --inexact --extra float8`"),
        ("--model.converters lora", "set checkpoint.initial_load_in_hf to true: LoRA needs an existing model"),
        (f"{LORA} --parallelism.tensor_parallel_degree 2", "LoRA supports only FSDP, HSDP and one GPU"),
        (f"{LORA} --checkpoint.last_save_in_hf", "checkpoint.last_save_in_hf is True; use convert_dcp_to_hf.py"),
        (f"{LORA} --lora.targets q_proj,wk", "choose one or more of: q_proj, k_proj, v_proj"),
        (f"{LORA} --lora.dropout 1", "lora.dropout is 1.0; set a number of at least 0 and below 1"),
        (f"{LORA} --checkpoint.create_seed_checkpoint", "a seed checkpoint contains random weights"),
        ("--parallelism.tensor_parallel_degree 4", "the degrees in [parallelism] do not fit 2 ranks"),
        ("--parallelism.data_parallel_replicate_degree 2", "use FSDP or HSDP"),
        ("--model.flavor 768x8 --parallelism.tensor_parallel_degree 2", "is 2; set a divisor of 3, the number"),
        ("--parallelism.tensor_parallel_degree 2 --training.seq_len 257", "training.seq_len is 257; set a multiple"),
        ("--training.global_batch_size 6", "set a multiple of 4"),
        ("--validation.patience -1", "validation.patience is -1; set a finite number of at least 0"),
        (
            "--validation.patience 1 --validation.freq 100",
            "validation.freq is 100; set a multiple of checkpoint.interval",
        ),
        ("--validation.patience 2 --checkpoint.keep_latest_k 4", "checkpoint.keep_latest_k is 4; set 0, or more than"),
        (
            "--validation.patience 1 --checkpoint.keep_latest_k 3 --checkpoint.last_save_in_hf",
            "checkpoint.last_save_in_hf is True; set false: a run that",
        ),
        # Files
        ("--parallelism.context_parallel_degree 2", "more than 1 on a CPU; set it to 1, or use GPUs"),
        (
            "--model.flavor 1B",
            "assets/tiny/llama' was made with hidden_size = 192, but the current value is 2048",
        ),
        ("--codec.name models/nothing/here", "codec folder 'models/nothing/here' does not exist"),
        ("--model.hf_assets_path models/nothing", "prepare_base_model.py"),
        ("--training.dataset assets/tiny/corpus,assets/tiny/words", "set one corpus, or several corpora tokenised"),
        ("--training.dataset assets/tiny/corpus", "contains the splits train, validation; set data.split"),
        ("--checkpoint.initial_load_in_hf", "vocab_size = 512, but the current value is 1538"),
        ("--checkpoint.initial_load_path models/nothing", "models/nothing/.metadata' is missing"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the sentences of a machine without a GPU")
def test_impossible_configs_are_refused(flags, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("llama_mimi.training.checks.find_spec", lambda package: None)  # torchao is not installed
    with pytest.raises(UserError) as error:
        checked_config(tiny_with(*flags.split()))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_each_section_takes_its_split():
    folder = "assets/tiny/corpus"
    flags = f"--training.dataset {folder} --validation.dataset {folder} --data.split train --data.validation_split dev"
    config = checked_config(tiny_with(*flags.split()))
    assert [chosen_split(config, section) for section in (config.training, config.validation)] == ["train", "dev"]


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[training]\nstepz = 3\n", "'training.stepz'; use training.steps"),
        ("[model]\nnum_quantizers = 4\n", "'model.num_quantizers'; use codec.num_quantizers"),
        ("[evaluation]\n", "'evaluation'; use the scripts in eval/"),
        ("codec = 4\n", "expected a section [codec]"),
        ('[training]\nsteps = "150"\n', "expected int"),
        ("[training]\ndataset_path = 4\n", "expected str | None"),
        ("[model]\nconverters = [4]\n", "expected list[str]"),
    ],
)
def test_mistakes_in_a_file_are_refused(toml, message, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(toml)
    for flags in (["--job.config_file", str(path)], [f"--job.config-file={path}"]):
        with pytest.raises(UserError) as error:
            parse_config(flags)
        assert message in str(error.value)


def test_configs_of_the_first_release_are_told_what_keys_and_datasets_are_called_here():
    with pytest.raises(UserError, match="set 'llama_mimi', and choose the size with model.flavor"):
        parse_config([])
    job_config = parse_config(tiny_with())
    for old, new in OLD_KEYS.items():
        assert old == "evaluation" or reduce(getattr, new.split("."), job_config) is not None
        with pytest.raises(AttributeError):
            reduce(getattr, old.split("."), job_config)
    for section in ("training", "validation"):
        with pytest.raises(UserError, match="first release of Llama-Mimi; set dataset to 'librispeech_clean_test'"):
            checked_config(tiny_with(f"--{section}.dataset", "librispeech_asr_test"))
    assert {name for name in RELEASED_NAMES.values() if name.startswith("'")} <= {f"'{name}'" for name in CORPORA}


def test_a_shape_with_random_weights_needs_only_the_tokenizer(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    checked_config(tiny_with("--model.flavor", "256x2"))
    with pytest.raises(UserError, match="was made with hidden_size = 192, but the current value is 256"):
        checked_config(tiny_with("--model.flavor", "256x2", "--checkpoint.initial_load_in_hf"))


def test_another_models_run_is_not_continued(tmp_path, tokenizer):
    flags = tiny_with("--job.dump_folder", str(tmp_path))
    (tmp_path / "checkpoint").mkdir()
    args = copy.copy(FLAVORS["tiny"])
    args.update_from_config(checked_config(flags))
    save_run_record(str(tmp_path), speech_config(args, tokenizer, "assets/tiny/mimi"), tokenizer)
    checked_config(flags)
    with pytest.raises(UserError, match="was made with vocab_size = 1538, but the current value is 1029"):
        checked_config([*flags, "--model.vocabulary", "audio"])
    with pytest.raises(UserError, match="the run in job.dump_folder .* was made with codec = .*; set the old value"):
        checked_config([*flags, "--codec.name", str(TINY / "mimi")])


def test_a_folder_without_text_needs_a_vocabulary_of_audio(tmp_path):
    shutil.copy(TINY / "llama" / "config.json", tmp_path)
    tokenizer = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), 4, "audio")
    tokenizer.text_tokenizer.save_pretrained(tmp_path)
    flags = tiny_with("--model.hf_assets_path", str(tmp_path))
    with pytest.raises(UserError, match="lacks text tokens; set model.vocabulary to 'audio', .* --vocabulary llama"):
        checked_config(flags)
    checked_config([*flags, "--model.vocabulary", "audio"])


def test_changed_settings_of_the_schedule_are_named_on_resume(tmp_path, caplog):
    """A run without remaining steps prints a warning. A damaged config of the last start is ignored."""
    flags = tiny_with("--job.dump_folder", str(tmp_path))
    save_loader_position(tmp_path, checked_config(flags))
    caplog.clear()
    checked_config(flags)
    assert not caplog.text
    changed = [*flags, "--optimizer.lr", "0.5", "--lr_scheduler.warmup_steps", "2", "--training.steps", "5"]
    checked_config(changed)
    changes = "optimizer.lr 0.003 -> 0.5, lr_scheduler.warmup_steps 10 -> 2, training.steps 420 -> 5"
    assert f"settings changed since the last start: {changes}" in caplog.text
    assert "the run has already reached step 5" in caplog.text
    (tmp_path / "job_config.json").write_text("{")
    checked_config(changed)


def save_loader_position(folder, job_config, has_position=True):
    state = {"dataloader": {"position": "..."}} if has_position else {"model": torch.zeros(1)}
    dcp.save(state, checkpoint_id=folder / "checkpoint" / "step-5", no_dist=True)
    (folder / "job_config.json").write_text(json.dumps(job_config.to_dict()))


def test_a_checkpoint_whose_files_are_not_all_there_is_not_resumed(tmp_path):
    flags = tiny_with("--job.dump_folder", str(tmp_path))
    save_loader_position(tmp_path, checked_config(flags))
    shutil.copytree(tmp_path / "checkpoint" / "step-5", tmp_path / "checkpoint" / "step-7")
    (tmp_path / "checkpoint" / "step-7" / "__0_0.distcp").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"step-7/.*' is missing or truncated.* to use the last good step '.*/step-5'"):
        checked_config([*flags, "--checkpoint.exclude_from_loading", "dataloader"])
    (tmp_path / "checkpoint").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"step-7/.*' is missing or truncated"):
        checked_config([*flags, "--checkpoint.initial_load_path", str(tmp_path / "elsewhere" / "step-7")])


def test_the_resumed_step_is_checked(tmp_path):
    flags = tiny_with("--job.dump_folder", str(tmp_path))
    save_loader_position(tmp_path, checked_config(flags))
    newest = tmp_path / "checkpoint" / "step-10"
    newest.mkdir()
    (newest / "model.safetensors.index.json").touch()  # a step in the format of Hugging Face
    for extra in ([], ["--checkpoint.exclude_from_loading", "dataloader"]):
        with pytest.raises(UserError, match=r"step-10' contains weights but not the position"):
            checked_config([*flags, *extra])
    checked_config([*flags, "--checkpoint.load_step", "5"])
    with pytest.raises(UserError, match=r"load_step is 6, but the complete steps in '.*' are \[5, 10\]"):
        checked_config([*flags, "--checkpoint.load_step", "6"])
    shutil.rmtree(tmp_path / "checkpoint")
    save_loader_position(tmp_path, checked_config(flags), has_position=False)
    with pytest.raises(UserError, match="step-5' contains weights but not the position"):
        checked_config(flags)
    checked_config([*flags, "--checkpoint.exclude_from_loading", "dataloader"])


def test_an_interrupted_save_is_set_aside_and_other_files_are_not_moved(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "step-5").mkdir(parents=True)
    set_aside_incomplete(checkpoint)
    set_aside_incomplete(checkpoint)  # does nothing without a folder
    assert not checkpoint.exists() and (tmp_path / "checkpoint.incomplete-0" / "step-5").is_dir()
    (checkpoint / "step-10").mkdir(parents=True)
    for name in (".metadata", "model.safetensors.index.json"):
        (checkpoint / "step-5").mkdir()
        (checkpoint / "step-5" / name).touch()
        set_aside_incomplete(checkpoint)
        assert (checkpoint / "step-10").is_dir()
        shutil.rmtree(checkpoint / "step-5")
    (checkpoint / "pretrained").mkdir()
    (tmp_path / "link").symlink_to("checkpoint")
    for name, fault in (("checkpoint", "contains 'pretrained'"), ("link", "is a symbolic link")):
        with pytest.raises(UserError, match=f"{fault} and does not contain a complete step; rename"):
            set_aside_incomplete(tmp_path / name)


def test_steps_after_the_one_to_load_are_set_aside(tmp_path):
    checkpoint, aside = tmp_path / "checkpoint", tmp_path / "checkpoint.after-step-5-0"
    for step in (5, 10, 15):
        (checkpoint / f"step-{step}").mkdir(parents=True)
        (checkpoint / f"step-{step}" / ".metadata").touch()
    for step in (15, 5):
        set_aside_later(checkpoint, step)
    assert complete_steps(checkpoint).keys() == {5} and complete_steps(aside).keys() == {10, 15}
    (aside / "step-9-best").mkdir()
    (aside / "step-9-best" / ".metadata").touch()
    with pytest.raises(UserError, match="TorchTitan would load '.*/step-9-best' as a step"):
        complete_steps(aside)


def test_no_run_starts_from_random_weights_in_place_of_a_checkpoint(tmp_path):
    job_config = checked_config(tiny_with("--job.dump_folder", str(tmp_path)))
    (tmp_path / "checkpoint").mkdir()
    prepare_run(job_config)
    assert (tmp_path / "checkpoint").is_dir(), "no initial weights were requested"
    dcp.save({"model": torch.zeros(1)}, checkpoint_id=tmp_path / "step-5", no_dist=True)
    job_config.checkpoint.initial_load_path = str(tmp_path / "step-5")
    prepare_run(job_config)
    assert not (tmp_path / "checkpoint").exists()
    job_config.training.dataset = "nothing.parquet"
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(UserError, match="does not match any Parquet, tar, audio, JSONL or text file"):
        prepare_run(job_config)
    assert (tmp_path / "checkpoint").is_dir(), "a run that does not start moves nothing"


@pytest.mark.parametrize("of_first", [None, [5]], ids=["removed", "written"])
def test_nodes_wait_until_they_see_what_the_first_sees(of_first, tmp_path, monkeypatch):
    job_config = checked_config(tiny_with("--job.dump_folder", str(tmp_path)))
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.setattr("llama_mimi.training.checks.broadcast_from_rank0", lambda prepare: of_first)
    monkeypatch.setattr("llama_mimi.training.checks.SECONDS_FOR_NODES_TO_AGREE", 1)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"the saved steps in '.*' are \[\] on .*, but .* on the first node"):
        prepare_run(job_config)
