"""Continuations of every prompt in a folder: shared by ranks, and kept when a run is killed."""

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llama_mimi.audio.mimi import codec_hash
from llama_mimi.audio.reading import AUDIO_ENDINGS, AudioError, Waveform, write_wav
from llama_mimi.audio.silence import silences
from llama_mimi.audio.streaming import decode_long
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import as_utf8, find_files, parse_json, read_json, write_atomically
from llama_mimi.common.hub import weights_sha256
from llama_mimi.common.ranks import Ranks, from_first, gather
from llama_mimi.common.resume import ProgressLog
from llama_mimi.common.versions import versions
from llama_mimi.generation.continuation import SamplingOptions, encode_prompts, finished, read_prompt
from llama_mimi.generation.decoding import Request, decode
from llama_mimi.generation.speech_model import SpeechModel

RESULTS, SETTINGS = "results.jsonl", "settings.json"
# Samples that are drawn together, in rows; a killed run begins the groups that it has not finished anew, so that each
# sample has the same neighbours in its batch, and so the same rounding and the same bytes.
ROUNDS_OF_A_GROUP = 4
LONG_SILENCE_SECONDS = 2.0
NOT_COMPARED = ("model", "versions")  # the hashes of weights say what a model is
Record = dict[str, Any]


@dataclass(frozen=True)
class _Sample:
    prompt: str  # name of the prompt: its path as UTF-8
    path: str  # relative to the folder
    number: int
    seed: int

    @property
    def file(self) -> str:
        return f"{Path(self.prompt).with_suffix('')}_{self.number}.wav"

    def record(self, **found: Any) -> Record:
        return {"prompt": self.prompt, "sample": self.number, "seed": self.seed, **found}


def continue_folder(
    model: SpeechModel,
    prompts: Path,
    output_dir: Path,
    options: SamplingOptions,
    num_rows: int,
    ranks: Ranks,
    made_by: Mapping[str, Any],
) -> list[Record]:
    """Continue every audio file below a folder; what an earlier run has finished is kept.

    Args:
        prompts: folder; files at any depth are taken.
        output_dir: gets ``<prompt>_<sample>.wav``, ``settings.json`` and, when all is done, ``results.jsonl``.
        num_rows: samples that are drawn at once.
        made_by: what the samples depend on besides the options, as `describe_model` says it.

    Returns:
        On every rank the lines of ``results.jsonl``: of each sample ``prompt``, ``prompt_sha256``, ``sample`` and
        ``seed``, and either ``file``, ``prompt_frames``, ``frames``, ``distinct_frames`` (few
        in a loop), ``end`` ("ended" by the model or "cut"),
        ``remarks`` on the prompt, ``silences`` (start and length of those of 2 s or more) and the ``seconds`` from its
        first frame to its file, or the ``error`` for which there is none.

    Raises:
        UserError: no prompts, two of one name, or a folder of other settings.
    """
    sampling = options.for_model(model)
    if not prompts.is_dir():
        raise UserError(f"--prompts is '{prompts}', which is no folder; one file is a --prompt")
    if output_dir.resolve().is_relative_to(prompts.resolve()):
        raise UserError(f"--output_dir '{output_dir}' lies in --prompts '{prompts}', of which it would become a part")
    samples = from_first(lambda: list(_samples(prompts, options)))
    inputs = {os.path.realpath(prompts / sample.path) for sample in samples}
    if replaced := [sample.file for sample in samples if os.path.realpath(output_dir / sample.file) in inputs]:
        raise UserError(f"'{output_dir / replaced[0]}' would replace a prompt; name another --output_dir")
    chosen = {"top_p": sampling.top_p, "last_frame": options.last_frame or model.last_frame}
    settings = {**asdict(options), **chosen, **made_by, "device": ranks.device.type, "batch_size": num_rows}
    from_first(lambda: _keep_settings(output_dir, settings))
    log = ProgressLog(output_dir / "unfinished", {})  # of these settings, as the folder is
    done = from_first(lambda: _finished_before(output_dir) | log.load())
    size = ROUNDS_OF_A_GROUP * num_rows
    groups = [samples[start : start + size] for start in range(0, len(samples), size)]
    hashes = from_first(
        lambda: {prompt: _sha256(prompts / path) for prompt, path in {s.prompt: s.path for s in samples}.items()}
    )

    def is_done(sample: _Sample) -> bool:
        """The same prompt was continued before, or could not be."""
        record = done.get(_key(sample.record()))
        if record is None or record["prompt_sha256"] != hashes[sample.prompt]:
            return False
        return "error" in record or (output_dir / sample.file).exists()

    todo = [group for group in groups if not all(map(is_done, group))]
    if ranks.rank == 0 and len(todo) < len(groups):
        print(f"{len(samples) - sum(map(len, todo)):,} of {len(samples):,} samples were finished before", flush=True)
    mine = todo[ranks.rank :: ranks.world_size]
    new: dict[str, Record] = {}
    with tqdm(total=sum(map(len, mine)), unit="sample", disable=ranks.rank > 0) as progress:
        for group in mine:
            records = {}
            for record in _continue_group(model, prompts, output_dir, group, options, num_rows):
                records[_key(record)] = record | {"prompt_sha256": hashes[record["prompt"]]}
                progress.update()
            log.add(records)
            new |= records
    for others in gather(new):
        done |= others
    results = [done[_key(sample.record())] for sample in samples]
    if ranks.rank == 0:
        content = "".join(json.dumps(record) + "\n" for record in results)
        write_atomically(str(output_dir), RESULTS, content.encode())
        log.close()
    ranks.wait()
    return results


def describe_model(model_name: str, model: SpeechModel, dtype: str) -> Record:
    """What samples depend on besides the options.

    Args:
        model_name: hub id or folder.
        dtype: of the decoder.
    """
    return {
        "model": model_name,
        "model_sha256": weights_sha256(model_name),
        "codec_sha256": codec_hash(model.codec.name),
        "codec_attention": model.codec.attention,
        "dtype": dtype,
        "versions": versions(),
    }


def _samples(prompts: Path, options: SamplingOptions) -> Iterator[_Sample]:
    found = find_files(str(prompts), AUDIO_ENDINGS)
    paths = [str(Path(path).relative_to(prompts.absolute())) for path in found]
    if not paths:
        raise UserError(f"'{prompts}' holds no {', '.join(AUDIO_ENDINGS)} file; name a folder of prompts")
    of_name: dict[str, str] = {}
    for path in paths:
        prompt = as_utf8(path)
        name = str(Path(prompt).with_suffix(""))
        if name in of_name:
            raise UserError(f"'{prompt}' and '{of_name[name]}' would have one name in --output_dir; rename one of them")
        of_name[name] = prompt
        for number in range(options.num_samples):
            digest = hashlib.sha256(os.fsencode(f"{options.seed}/{path}/{number}")).digest()
            yield _Sample(prompt, path, number, int.from_bytes(digest[:4]))


def _key(record: Record) -> str:
    return f"{record['prompt']}/{record['sample']}"


def _keep_settings(output_dir: Path, settings: Record) -> None:
    earlier = read_json(str(output_dir), SETTINGS)
    if earlier is not None:
        earlier = {"last_frame": "pad"} | earlier  # folders of earlier versions do not name it
    for key, value in settings.items():
        if earlier is not None and key not in NOT_COMPARED and earlier.get(key) != value:
            raise UserError(
                f"'{output_dir}' holds continuations with {key} {earlier.get(key)!r}, not {value!r}; name another "
                "--output_dir"
            )
    if earlier is None:
        write_atomically(str(output_dir), SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())


def _finished_before(output_dir: Path) -> dict[str, Record]:
    path = output_dir / RESULTS
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        return {_key(record): record for record in map(parse_json, lines)}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"'{path}' is no list of results ({first_line(error)}); remove it, or mend it") from error


def _sha256(path: Path) -> str:
    """Of a prompt, which may be replaced by another of the same name."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _continue_group(
    model: SpeechModel, root: Path, output_dir: Path, group: Sequence[_Sample], options: SamplingOptions, num_rows: int
) -> Iterator[Record]:
    codec = model.codec
    waveforms: dict[str, Waveform] = {}
    for prompt, path in {sample.prompt: sample.path for sample in group}.items():
        try:
            waveforms[prompt] = read_prompt(str(root / path), codec)
        except AudioError as error:
            yield from (sample.record(error=as_utf8(str(error))) for sample in group if sample.prompt == prompt)
    codes = dict(zip(waveforms, encode_prompts(model, list(waveforms.values()), options), strict=True))
    usable = [sample for sample in group if sample.prompt in codes]
    requests = [Request(codes[sample.prompt], sample.seed) for sample in usable]
    began: dict[int, float] = {}

    def noted() -> Iterator[Any]:
        for number, new in decode(model, requests, options.for_model(model), num_rows):
            began.setdefault(number, time.perf_counter())
            yield number, new

    for number, new_TQ, end in finished(noted(), codec.num_quantizers):
        sample, prompt_TQ = usable[number], requests[number].prompt_TQ
        waveform = Waveform(decode_long(codec, torch.cat([prompt_TQ, new_TQ])), codec.sample_rate_hz)
        try:
            write_wav(output_dir / sample.file, waveform)
        except UserError as error:
            if getattr(error.__cause__, "errno", None) != errno.ENAMETOOLONG:
                raise
            yield sample.record(error=f"'{sample.file}' is too long for a file name; shorten the prompt's name")
            continue
        yield sample.record(
            file=sample.file,
            prompt_frames=len(prompt_TQ),
            frames=len(new_TQ),
            distinct_frames=len(new_TQ.unique(dim=0)),
            end=end.value,
            remarks=list(waveforms[sample.prompt].remarks),
            silences=silences(waveform, LONG_SILENCE_SECONDS),
            seconds=round(time.perf_counter() - began[number], 3),
        )
