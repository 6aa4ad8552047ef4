"""Scores of all clips of a benchmark: in batches of like length, shared by ranks, and kept when a run is killed."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from tqdm import tqdm

from llama_mimi.batching import batches_of_like_size
from llama_mimi.clip_codes import CachedCodes
from llama_mimi.errors import UserError
from llama_mimi.likelihood import batch_scores
from llama_mimi.ranks import Ranks
from llama_mimi.scoring import Scoring
from llama_mimi.speech_model import SpeechModel


class ScoreLog:
    """What a run that was killed has scored: lines of JSON, a file for each process.

    Args:
        folder: of the log, gone when the run is over.
        header: everything that scores depend on; a log with another one is not read.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self._folder = folder
        self._header = json.dumps(header, sort_keys=True)
        self._path = folder / f"{uuid4().hex}.jsonl"

    def load(self) -> dict[int, list[float]]:
        """Scores by batch."""
        done: dict[int, list[float]] = {}
        for path in sorted(self._folder.glob("*.jsonl")):
            first, *lines = path.read_text().split("\n")
            if first != self._header:
                continue
            for line in lines[:-1]:  # what follows the last line end was cut off
                batch, scores = json.loads(line)
                done[batch] = scores
        return done

    def add(self, batch: int, scores: list[float]) -> None:
        """Keep the scores of a batch.

        Raises:
            UserError: the file system is full or refuses.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            is_new = not self._path.exists()
            with self._path.open("a") as file:
                file.write((f"{self._header}\n" if is_new else "") + json.dumps([batch, scores]) + "\n")
        except OSError as error:
            raise UserError(
                f"'{self._path}' could not be written ({error.strerror}); make room or mend --output_dir and start "
                "again: what is scored is kept"
            ) from error

    def close(self) -> None:
        """Remove the log."""
        shutil.rmtree(self._folder, ignore_errors=True)


def score_clips(
    model: SpeechModel,
    codes: Mapping[str, CachedCodes],
    scoring: Scoring,
    batch_tokens: int,
    log: ScoreLog,
    ranks: Ranks,
) -> dict[str, float]:
    """Scores by clip.

    Args:
        model: that scores.
        codes: of the clips, by what they are called.
        scoring: which tokens enter a score, and how.
        batch_tokens: the most a batch holds with its padding; one clip always fits.
        log: of what was scored before; batches are planned from the clips alone, so that they are the same again.
        ranks: that share the batches.

    Raises:
        UserError: the scoring does not fit the model, or the log cannot be written.
    """
    names = sorted(codes)
    lengths = [codes[name].codes_TQ.size for name in names]
    plan = batches_of_like_size(lengths, batch_tokens)
    done = ranks.from_first(log.load)
    mine = [batch for batch in reversed(range(len(plan))) if batch not in done][ranks.rank :: ranks.world_size]
    new: dict[int, list[float]] = {}
    with tqdm(
        total=sum(len(plan[batch]) for batch in mine), unit="clip", desc="scores", disable=ranks.rank > 0
    ) as progress:
        for batch in mine:  # the longest first: too large a batch fails at once
            clips = [codes[names[index]] for index in plan[batch]]
            new[batch] = batch_scores(
                model, [(torch.from_numpy(clip.codes_TQ.astype("int64")), clip.is_cut) for clip in clips], scoring
            )
            log.add(batch, new[batch])
            progress.update(len(clips))
    for others in ranks.gather(new):
        done |= others
    return {
        names[index]: score for batch, scores in done.items() for index, score in zip(plan[batch], scores, strict=True)
    }
