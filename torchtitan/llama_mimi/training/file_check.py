"""What cannot run on this machine: device, corpora, model folder, earlier runs."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torchtitan.tools.logging import logger
from transformers import LlamaConfig

from llama_mimi.audio.mimi import attention_of, load_codec_config, whole_frames
from llama_mimi.checkpoint.architectures import check_initial_weights, load_config
from llama_mimi.checkpoint.dcp import complete_steps, is_distributed, read_index
from llama_mimi.checkpoint.huggingface import NETWORK_KEYS, hf_config
from llama_mimi.checkpoint.run_record import ASSETS_FOLDER, speech_config
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import visible_files
from llama_mimi.data.build import chosen_split, dataset_names
from llama_mimi.data.code_store import CodeCorpus, is_store
from llama_mimi.data.corpus_files import check_corpus
from llama_mimi.model.llama import FLAVORS
from llama_mimi.tokens.sequences import load_sequences
from llama_mimi.tokens.units import has_text
from llama_mimi.training.optimizer import log_schedule_changes

# What must agree between a flavour, a Hugging Face folder and an earlier run in the same dump_folder.
SHAPE_KEYS = (*NETWORK_KEYS, "tie_word_embeddings")


def check_files(job_config: Any) -> None:
    """Refuse what cannot run on this machine: device, corpora, model folder, earlier runs.

    Raises:
        UserError: one sentence for the first thing that is wrong.
    """
    _check_device(job_config)
    _check_data(job_config)
    _check_model(job_config)
    _check_resume(job_config)


def checkpoint_folder(job_config: Any) -> Path:
    return Path(job_config.job.dump_folder) / job_config.checkpoint.folder


def _check_device(job_config: Any) -> None:
    cp = job_config.parallelism.context_parallel_degree
    if cp > 1 and not torch.cuda.is_available():
        raise UserError(f"parallelism.context_parallel_degree is {cp}, but it needs GPUs; set it to 1")


def _check_data(job_config: Any) -> None:
    data, codec = job_config.data, job_config.codec
    sections = {"training": job_config.training}
    if job_config.validation.enable:
        sections["validation"] = job_config.validation
    for section, values in sections.items():
        names = dataset_names(values)
        split = chosen_split(job_config, values)
        if len(names) != 1:
            if section == "validation" or not names:
                raise UserError(f"{section}.dataset is '{values.dataset}'; name one corpus")
            for name in names:
                if not is_store(name):
                    raise UserError(
                        f"training.dataset mixes '{name}' with others, but it is no tokenised corpus; tokenise it with "
                        "scripts/tokenize_corpus.py and name the folder"
                    )
        for name in names:
            if is_store(name):
                for key, value in (("dataset_path", values.dataset_path), ("split", split)):
                    if value is not None:
                        raise UserError(
                            f"the {key} of {section} is '{value}', but '{name}' is a tokenised corpus; leave it out"
                        )
                CodeCorpus(name, codec.name, codec.num_quantizers, codec.attention, with_text=data.task == "tts")
            else:
                check_corpus(name, values.dataset_path, split)
    names = dataset_names(job_config.training)
    if data.weights and (len(data.weights) != len(names) or not all(0 < w < math.inf for w in data.weights)):
        raise UserError(
            f"data.weights is {data.weights}; it takes one positive number for each of the {len(names)} corpora in "
            "training.dataset"
        )


def _check_model(job_config: Any) -> None:
    model, codec = job_config.model, job_config.codec
    if not Path(model.hf_assets_path).is_dir():
        raise UserError(
            f"model.hf_assets_path is '{model.hf_assets_path}', which is no folder; make it once with "
            f"`python scripts/prepare_base_model.py --base_model HUB_ID_OR_FOLDER --codec {codec.name} "
            f"--num_quantizers {codec.num_quantizers} --vocabulary {model.vocabulary} "
            f"--output_dir {model.hf_assets_path}`"
        )
    whole_frames(job_config.data.max_audio_seconds, load_codec_config(codec.name, codec.num_quantizers))
    sequences = load_sequences(model.hf_assets_path, codec.name, codec.num_quantizers, model.vocabulary)
    if model.vocabulary == "llama" and not has_text(sequences.tokenizer):
        raise UserError(
            f"model.vocabulary is 'llama', but the tokenizer in '{model.hf_assets_path}' holds no text; set it to "
            "'audio', or name a folder prepared by scripts/prepare_base_model.py with --vocabulary llama"
        )
    args = copy.copy(FLAVORS[model.flavor])
    base, kind = load_config(model.hf_assets_path, "model")
    if kind.model_type != "llama":
        raise UserError(
            f"model.hf_assets_path '{model.hf_assets_path}' is a '{kind.model_type}'; name a prepared Llama, or "
            "go on from a run by a step of it as checkpoint.initial_load_path"
        )
    problem = f"model.flavor '{model.flavor}' is not the model in '{model.hf_assets_path}'"
    _require_same(hf_config(args), base, SHAPE_KEYS, problem)
    # What prepare_base_model writes names its codec, but was trained on no codes.
    is_trained = hasattr(base, "codec_attention") or (hasattr(base, "num_quantizers") and not hasattr(base, "codec"))
    if job_config.checkpoint.initial_load_in_hf and is_trained and attention_of(base) != codec.attention:
        raise UserError(
            f"'{model.hf_assets_path}' was trained on codes of the codec's attention '{attention_of(base)}', but "
            f"codec.attention is '{codec.attention}'; set it to '{attention_of(base)}'"
        )
    if job_config.checkpoint.initial_load_in_hf:
        weights = job_config.checkpoint.initial_load_path or model.hf_assets_path
        if not visible_files(Path(weights), "*.safetensors"):
            raise UserError(
                f"'{weights}' holds no *.safetensors weights; prepare it without --random_weights, or "
                "start from random weights with --checkpoint.no-initial_load_in_hf"
            )
        if base.vocab_size != sequences.vocabulary.size:
            raise UserError(
                f"'{model.hf_assets_path}' has {base.vocab_size} vocabulary entries, not the "
                f"{sequences.vocabulary.size} of model.vocabulary '{model.vocabulary}' and {codec.num_quantizers} "
                "quantizers; prepare it by scripts/prepare_base_model.py with "
                f"--vocabulary {model.vocabulary} and name the result as model.hf_assets_path"
            )
        args.update_from_config(job_config)
        check_initial_weights(weights, args)
    folder = Path(job_config.job.dump_folder)
    if (folder / job_config.checkpoint.folder).is_dir() and (folder / ASSETS_FOLDER).is_dir():
        args.update_from_config(job_config)
        wanted = speech_config(args, sequences, codec.name, codec.attention)
        earlier, kind = load_config(str(folder / ASSETS_FOLDER), "run record")
        problem = f"job.dump_folder '{folder}' holds the run of another model"
        _require_same(wanted, earlier, ("model_type",), f"{problem}.architecture")
        _require_same(wanted, earlier, (*SHAPE_KEYS, "num_quantizers", "codec", "codec_attention"), problem)
        _require_same(wanted, earlier, (kind.entries_key,), f"{problem}.vocabulary or tokenizer")


def _check_resume(job_config: Any) -> None:
    """Refuse a step that cannot be resumed. The loader itself checks that a saved position fits the data."""
    settings, folder = job_config.checkpoint, checkpoint_folder(job_config)
    if not settings.enable:
        return
    if settings.initial_load_path and not Path(settings.initial_load_path).is_dir():
        raise UserError(f"checkpoint.initial_load_path '{settings.initial_load_path}' is no folder; name a step")
    steps = complete_steps(folder)
    if settings.load_step != -1 and settings.load_step not in steps:
        there = ", ".join(map(str, sorted(steps))) or "none"
        raise UserError(
            f"checkpoint.load_step is {settings.load_step}, but the complete steps in '{folder}' are: {there}"
        )
    if not steps:
        if settings.initial_load_path and not settings.initial_load_in_hf:
            read_index(Path(settings.initial_load_path), verify=False)
        return
    number = max(steps) if settings.load_step == -1 else settings.load_step
    step = steps[number]
    instead = "start another job.dump_folder with it as checkpoint.initial_load_path"
    if not is_distributed(step):
        raise UserError(
            f"'{step}' holds weights only, in Hugging Face's format, and cannot be resumed; {instead} and with "
            "checkpoint.initial_load_in_hf"
        )
    saved = read_index(step, verify=False).state_dict_metadata
    # From step 0, a seed checkpoint, TorchTitan loads the weights alone, so that no position is needed.
    if number and "dataloader" not in settings.exclude_from_loading and "dataloader.position" not in saved:
        raise UserError(f"'{step}' holds weights only, no position in the data, and cannot be resumed; {instead}")
    if number:
        log_schedule_changes(job_config)
    if number >= job_config.training.steps:
        logger.warning(
            f"the run has reached step {number} of {job_config.training.steps}, so nothing is left to train; set a "
            "higher --training.steps to continue"
        )


def _require_same(wanted: LlamaConfig, found: LlamaConfig, keys: tuple[str, ...], problem: str) -> None:
    for key in keys:
        a, b = getattr(wanted, key, None), getattr(found, key, None)
        if a != b:
            raise UserError(f"{problem}: {key} is {b!r} there and {a!r} in this config; change one of them")
