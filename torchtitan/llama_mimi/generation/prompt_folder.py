"""Continue, speak or transcribe many prompts; ranks share the work, and a killed run can be resumed."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama_mimi.audio.mimi import codec_hash
from llama_mimi.audio.reading import AUDIO_ENDINGS, AudioError, Waveform, write_wav
from llama_mimi.audio.streaming import decode_long
from llama_mimi.common.distributed import DistributedContext, broadcast_from_rank0
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import as_utf8, find_files, read_json, write_atomically
from llama_mimi.common.hub import weights_sha256
from llama_mimi.common.resume import ProgressLog, map_resumable, require_same
from llama_mimi.common.versions import versions
from llama_mimi.corpora.source import reading
from llama_mimi.generation.continuation import decode_with_bar, encode_prompts, finished, for_model, read_prompt
from llama_mimi.generation.decoding import FinishReason, Request
from llama_mimi.generation.options import SamplingOptions
from llama_mimi.generation.speech_model import SpeechModel
from llama_mimi.generation.transcription import transcribe

RESULTS, SETTINGS = "results.jsonl", "settings.json"
# Samples are drawn in groups of this many batches. After a kill, a whole group is drawn again, so that each sample is
# in a batch with the same other samples. Rounding, and therefore the bytes of a file, are then the same.
BATCHES_PER_GROUP = 4
NOT_COMPARED = ("model", "versions")  # the hash of the weights identifies a model
INPUTS = ("prompt_sha256", "text")  # entries of a record; a sample with another input is drawn again
Record = dict[str, Any]


class Prompt(NamedTuple):
    """Speech, a text to speak, or both (the text then begins with the transcript of the speech)."""

    name: str  # path of the speech relative to its folder, or number of the text; unique without the ending
    path: Path | None = None
    text: str | None = None


Sample = tuple[Prompt, Record]  # a record has file, prompt, prompt_sha256 and text (if any), sample (number) and seed


def find_prompts(folder: Path, output_dir: Path) -> list[Prompt]:
    """Return the audio files in a folder and its subfolders; raise a `UserError` if the folder has no audio files."""
    folders = [os.path.realpath(each) for each in (folder, output_dir)]
    if os.path.commonpath(folders) in folders:
        raise UserError(f"--output_dir '{output_dir}' and the input '{folder}' overlap; choose separate folders")
    paths = [Path(path) for path in find_files(str(folder), AUDIO_ENDINGS)] if folder.is_dir() else []
    if not paths:
        raise UserError(f"'{folder}' does not contain {', '.join(AUDIO_ENDINGS)} files; choose a folder of audio files")
    return [Prompt(str(path.relative_to(folder.absolute())), path) for path in paths]


def read_texts(path: Path) -> list[Prompt]:
    """Return the lines of a file, which are named by their numbers. Empty lines are skipped."""
    with reading(str(path), "text file in UTF-8"):
        lines = path.read_text("utf-8").split("\n")
    return [Prompt(f"{number:06}", text=line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def draw_samples(
    model: SpeechModel,
    prompts: Sequence[Prompt],
    output_dir: Path,
    options: SamplingOptions,
    num_rows: int,
    ranks: DistributedContext,
    made_by: Mapping[str, Any],
    transcribes: bool = False,
) -> list[Record]:
    """Continue or speak each prompt ``options.num_samples`` times, or transcribe it. Earlier samples are kept.

    The function writes ``<prompt>_<sample>.wav`` or ``<prompt>.txt``, ``settings.json`` and, at the end,
    ``results.jsonl`` to ``output_dir``. It returns the records of ``results.jsonl``, on every rank. If a prompt cannot
    be read, the records of its samples contain an ``error``. A `UserError` is raised if the model was not trained on
    the task, two prompts have the same name, or ``settings.json`` contains other settings.

    Args:
        num_rows: number of samples in a batch.
        made_by: result of `describe_model`.
    """
    if transcribes:
        model.require_task("transcription", "asr")
    else:
        model.require_speech(any(prompt.text is not None for prompt in prompts))
    chosen = {"top_p": for_model(options, model).top_p, "last_frame": options.last_frame or model.last_frame}
    settings = {**asdict(options), **chosen, **made_by, "device": ranks.device.type, "batch_size": num_rows}
    settings["transcribes"] = transcribes
    log = ProgressLog(output_dir / "unfinished", {})  # settings.json contains the settings

    def prepare() -> dict[str, Sample]:
        endings = [".txt"] if transcribes else [f"_{number}.wav" for number in range(options.num_samples)]
        samples = _plan(prompts, endings, options.seed)
        earlier = read_json(str(output_dir), SETTINGS)
        if earlier is None:
            write_atomically(str(output_dir), SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())
        else:
            compared = {key: value for key, value in settings.items() if key not in NOT_COMPARED}
            require_same({"transcribes": False, **earlier}, compared, f"'{output_dir}'", "choose another --output_dir")
        if (results := output_dir / RESULTS).exists():  # copy the records of a finished run back to the log
            with reading(str(results), "results file"):
                log.add({record["file"]: record for record in map(json.loads, results.read_text().splitlines())})
            results.unlink()
        return samples

    samples = broadcast_from_rank0(prepare)
    files, size = list(samples), BATCHES_PER_GROUP * num_rows
    groups = [{file: samples[file] for file in files[start : start + size]} for start in range(0, len(files), size)]

    def is_done(file: str, record: Record) -> bool:
        is_same = file in samples and all(record.get(key) == samples[file][1].get(key) for key in INPUTS)
        return is_same and ("error" in record or (output_dir / file).exists())

    work = partial(_complete_group, model, output_dir, options, num_rows, transcribes)
    records = list(map_resumable(groups, work, log, ranks, unit="sample", is_done=is_done).values())
    if ranks.rank == 0:
        write_atomically(str(output_dir), RESULTS, "".join(json.dumps(record) + "\n" for record in records).encode())
        log.close()
    ranks.wait()
    return records


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


def _plan(prompts: Sequence[Prompt], endings: Sequence[str], first_seed: int) -> dict[str, Sample]:
    samples: dict[str, Sample] = {}
    for prompt in prompts:
        inputs = {"prompt": as_utf8(prompt.name)}
        if prompt.path is not None:
            inputs["prompt_sha256"] = hashlib.sha256(prompt.path.read_bytes()).hexdigest()
        if prompt.text is not None:
            inputs["text"] = prompt.text
        for number, ending in enumerate(endings):
            content = os.fsencode(f"{first_seed}/{prompt.name}/{number}")
            seed = int.from_bytes(hashlib.sha256(content).digest()[:4])
            file = f"{Path(inputs['prompt']).with_suffix('')}{ending}"
            record = {"file": file, **inputs, "sample": number, "seed": seed}
            if (other := samples.setdefault(file, (prompt, record))[1]) is not record:
                both = f"'{other['prompt']}' and '{inputs['prompt']}'"
                raise UserError(f"samples of {both} would have the same file name; rename one of the prompts")
    return samples


def _complete_group(
    model: SpeechModel,
    output_dir: Path,
    options: SamplingOptions,
    num_rows: int,
    transcribes: bool,
    group: Mapping[str, Sample],
) -> Iterator[tuple[str, Record]]:
    codec = model.codec
    waveforms: dict[Path | None, Waveform] = {}
    for path in dict.fromkeys(prompt.path for prompt, _ in group.values() if prompt.path):
        try:
            waveforms[path] = read_prompt(str(path), codec)
        except AudioError as error:
            problem = as_utf8(str(error))
            yield from ((file, {**record, "error": problem}) for file, (p, record) in group.items() if p.path == path)
    codes = dict(zip(waveforms, encode_prompts(model, list(waveforms.values()), options), strict=True))
    codes[None] = torch.zeros(0, codec.num_quantizers, dtype=torch.long)  # only a text
    usable: list[tuple[str, Record]] = []
    requests: list[Request] = []
    for file, (prompt, record) in group.items():
        if prompt.path in codes:
            prompt_TQ, waveform = codes[prompt.path], waveforms.get(prompt.path)
            warnings = list(waveform.audio_warnings) if waveform else []
            usable.append((file, record | {"prompt_frames": len(prompt_TQ), "audio_warnings": warnings}))
            requests.append(Request(prompt_TQ, record["seed"], prompt.text))
    if transcribes:
        transcripts = transcribe(model, [request.prompt_TQ for request in requests], num_rows)
        for (file, record), (text, is_cut) in zip(usable, transcripts, strict=True):
            path, end = output_dir / file, FinishReason.LENGTH if is_cut else FinishReason.EOS
            write_atomically(str(path.parent), path.name, f"{text}\n".encode())
            yield file, record | {"transcript": text, "end": end.value}
        return
    drawn = decode_with_bar(model, requests, options, num_rows)
    for number, new_TQ, end, began in finished(drawn, codec.num_quantizers):
        (file, record), codes_TQ = usable[number], torch.cat([requests[number].prompt_TQ, new_TQ])
        samples_S = decode_long(codec, codes_TQ) if len(codes_TQ) else torch.zeros(0)
        write_wav(output_dir / file, Waveform(samples_S, codec.sample_rate_hz))
        found = {
            "frames": len(new_TQ),
            "distinct_frames": len(new_TQ.unique(dim=0)),  # few if the model repeats itself
            "end": end.value,
            "seconds": round(time.perf_counter() - began, 3),  # from the first frame to the file
        }
        yield file, record | found
