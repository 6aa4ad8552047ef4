"""Continue every prompt in a folder; ranks share the work, and a killed run can be resumed."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llama_mimi.audio.mimi import codec_hash
from llama_mimi.audio.reading import AUDIO_ENDINGS, AudioError, Waveform, write_wav
from llama_mimi.audio.streaming import decode_long
from llama_mimi.common.distributed import DistributedContext, broadcast_from_rank0
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import as_utf8, find_files, read_json, write_atomically
from llama_mimi.common.hub import weights_sha256
from llama_mimi.common.resume import ProgressLog, map_resumable, require_same
from llama_mimi.common.versions import versions
from llama_mimi.generation.continuation import (
    encode_prompts,
    finished,
    for_model,
    print_cut_prompts,
    read_prompt,
    with_progress,
)
from llama_mimi.generation.decoding import Request, decode
from llama_mimi.generation.options import SamplingOptions
from llama_mimi.generation.speech_model import SpeechModel

RESULTS, SETTINGS = "results.jsonl", "settings.json"
# Samples are drawn in groups of this many batches. After a kill, a whole group is drawn again, so that each sample is
# in a batch with the same other samples. Rounding, and therefore the bytes of a file, are then the same.
BATCHES_PER_GROUP = 4
NOT_COMPARED = ("model", "versions")  # the hash of the weights identifies a model
Record = dict[str, Any]
Sample = tuple[Path, Record]  # path of the prompt; record with file, prompt, prompt_sha256, sample (number) and seed


def continue_folder(
    model: SpeechModel,
    prompts: Path,
    output_dir: Path,
    options: SamplingOptions,
    num_rows: int,
    ranks: DistributedContext,
    made_by: Mapping[str, Any],
) -> list[Record]:
    """Continue all audio files in a folder and its subfolders. Samples of an earlier run are kept.

    ``num_rows`` is the batch size; ``made_by`` is the result of `describe_model`. The function writes
    ``<prompt>_<sample>.wav``, ``settings.json`` and, at the end, ``results.jsonl`` to ``output_dir``.

    Returns:
        The records of ``results.jsonl``, on every rank. If a prompt cannot be read, the records of its samples contain
        an ``error``.

    Raises:
        UserError: the folder is empty, two prompts have the same name, or ``settings.json`` contains other settings.
    """
    chosen = {"top_p": for_model(options, model).top_p, "last_frame": options.last_frame or model.last_frame}
    settings = {**asdict(options), **chosen, **made_by, "device": ranks.device.type, "batch_size": num_rows}
    log = ProgressLog(output_dir / "unfinished", {})  # settings.json contains the settings

    def prepare() -> dict[str, Sample]:
        folders = [os.path.realpath(folder) for folder in (prompts, output_dir)]
        if os.path.commonpath(folders) in folders:
            raise UserError(f"--output_dir '{output_dir}' and --prompts '{prompts}' overlap; choose separate folders")
        samples = _find_samples(prompts, options)
        earlier = read_json(str(output_dir), SETTINGS)
        if earlier is None:
            write_atomically(str(output_dir), SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())
        else:
            compared = {key: value for key, value in settings.items() if key not in NOT_COMPARED}
            require_same(earlier, compared, f"'{output_dir}'", "choose another --output_dir")
        if (results := output_dir / RESULTS).exists():  # copy the records of a finished run back to the log
            try:
                log.add({record["file"]: record for record in map(json.loads, results.read_text().splitlines())})
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"'{results}' is not a results file ({first_line(error)}); remove the file") from error
            results.unlink()
        return samples

    samples = broadcast_from_rank0(prepare)
    files, size = list(samples), BATCHES_PER_GROUP * num_rows
    groups = [{file: samples[file] for file in files[start : start + size]} for start in range(0, len(files), size)]

    def is_done(file: str, record: Record) -> bool:
        is_same = file in samples and record["prompt_sha256"] == samples[file][1]["prompt_sha256"]
        return is_same and ("error" in record or (output_dir / file).exists())

    work = partial(_continue_group, model, output_dir, options, num_rows)
    records = list(map_resumable(groups, work, log, ranks, unit="sample", is_done=is_done).values())
    if ranks.rank == 0:
        num_frames = {record["prompt"]: record.get("prompt_frames", 0) for record in records}
        print_cut_prompts(model, options, num_frames.values())
        write_atomically(str(output_dir), RESULTS, "".join(json.dumps(record) + "\n" for record in records).encode())
        log.close()
    ranks.wait()
    return records


def without_new_audio(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a clause with the number of samples without new audio, or "" if every sample has new audio."""
    number = sum(record.get("frames") == 0 for record in records)
    have = "has" if number == 1 else "have"
    return f"; {number:,} {have} no new audio, because the model ended the speech at once" if number else ""


def describe_model(model_name: str, model: SpeechModel) -> Record:
    """Return the entries of ``settings.json`` that describe a model."""
    return {
        "model": model_name,
        "model_sha256": weights_sha256(model_name),
        "codec_sha256": codec_hash(model.codec.name),
        "codec_sliding_window": model.codec.sliding_window,
        "dtype": model.dtype,
        "versions": versions(),
    }


def _find_samples(prompts: Path, options: SamplingOptions) -> dict[str, Sample]:
    paths = [Path(path) for path in find_files(str(prompts), AUDIO_ENDINGS)] if prompts.is_dir() else []
    if not paths:
        raise UserError(f"'{prompts}' does not contain {', '.join(AUDIO_ENDINGS)} files; choose a folder of prompts")
    samples: dict[str, Sample] = {}
    for path in paths:
        relative = path.relative_to(prompts.absolute())
        prompt, sha256 = as_utf8(str(relative)), hashlib.sha256(path.read_bytes()).hexdigest()
        for number in range(options.num_samples):
            seed = int.from_bytes(hashlib.sha256(os.fsencode(f"{options.seed}/{relative}/{number}")).digest()[:4])
            file = f"{Path(prompt).with_suffix('')}_{number}.wav"
            record = {"file": file, "prompt": prompt, "prompt_sha256": sha256, "sample": number, "seed": seed}
            if (other := samples.setdefault(file, (path, record))[1]) is not record:
                both = f"'{other['prompt']}' and '{prompt}'"
                raise UserError(f"samples of {both} would have the same file name; rename one of the prompts")
    return samples


def _continue_group(
    model: SpeechModel, output_dir: Path, options: SamplingOptions, num_rows: int, group: Mapping[str, Sample]
) -> Iterator[tuple[str, Record]]:
    codec = model.codec
    waveforms: dict[Path, Waveform] = {}
    for path in dict.fromkeys(path for path, _ in group.values()):
        try:
            waveforms[path] = read_prompt(str(path), codec)
        except AudioError as error:
            text = as_utf8(str(error))
            yield from ((file, {**record, "error": text}) for file, (other, record) in group.items() if other == path)
    codes = dict(zip(waveforms, encode_prompts(model, list(waveforms.values()), options), strict=True))
    usable = [(file, path, record) for file, (path, record) in group.items() if path in codes]
    requests = [Request(codes[path], record["seed"]) for _, path, record in usable]
    sampling = for_model(options, model)
    drawn = decode(model, requests, sampling, num_rows)
    drawn = with_progress(drawn, len(requests), sampling.max_frames, codec.frame_rate_hz)
    for number, new_TQ, end, began in finished(drawn, codec.num_quantizers):
        (file, path, record), prompt_TQ = usable[number], requests[number].prompt_TQ
        waveform = Waveform(decode_long(codec, torch.cat([prompt_TQ, new_TQ])), codec.sample_rate_hz)
        write_wav(output_dir / file, waveform)
        found = {
            "prompt_frames": len(prompt_TQ),
            "frames": len(new_TQ),
            "distinct_frames": len(new_TQ.unique(dim=0)),  # few if the model repeats itself
            "end": end.value,
            "audio_warnings": list(waveforms[path].audio_warnings),
            "seconds": round(time.perf_counter() - began, 3),  # from the first frame to the file
        }
        yield file, record | found
